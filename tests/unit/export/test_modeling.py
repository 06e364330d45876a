"""The class that goes along with exports: generation with a cache, padding, loss."""

import pytest
import torch

from distributed_lm.export.classes import OWN_POSITIONS
from distributed_lm.export.modeling_distributed_lm import (
    DistributedLMConfig,
    DistributedLMForCausalLM,
)


@pytest.fixture(params=OWN_POSITIONS)
def model(request: pytest.FixtureRequest) -> DistributedLMForCausalLM:
    torch.manual_seed(4)
    shape = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 97}
    config = DistributedLMConfig(
        **shape, num_key_value_heads=2, position=request.param, max_position_embeddings=64
    )
    model = DistributedLMForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def test_generation_with_and_without_a_cache_agrees(model: DistributedLMForCausalLM) -> None:
    prompt = torch.randint(97, (2, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert cached.shape == (2, 21)
    # And the cache is one: a step on its own sees all that came before.
    with torch.no_grad():
        first = model(prompt[:, :5], use_cache=True)
        second = model(prompt[:, 5:], past_key_values=first.past_key_values, use_cache=True)
        whole = model(prompt).logits
    torch.testing.assert_close(second.logits, whole[:, 5:], atol=1e-4, rtol=1e-4)
    assert second.past_key_values.get_seq_length() == 9


def test_padding_changes_nothing(model: DistributedLMForCausalLM) -> None:
    short = torch.randint(97, (1, 6))
    left = torch.cat([torch.full((1, 4), 3), short], dim=1)
    right = left.roll(6, dims=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    with torch.no_grad():
        alone = model(short).logits
        padded_left = model(left, attention_mask=mask).logits[:, 4:]
        padded_right = model(right, attention_mask=mask.roll(6, dims=1)).logits[:, :6]
        unmasked = model(left).logits[:, 4:]
    torch.testing.assert_close(padded_left, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded_right, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unmasked, alone, atol=1e-2)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    generated = model.generate(left, attention_mask=mask, **options)[:, 10:]
    assert torch.equal(generated, model.generate(short, **options)[:, 6:])


def test_loss_is_of_the_next_token(model: DistributedLMForCausalLM) -> None:
    tokens = torch.randint(97, (2, 8))
    labels = tokens.clone()
    labels[:, 2] = -100
    with torch.no_grad():
        outputs = model(tokens, labels=labels)
        log_probabilities = outputs.logits.log_softmax(-1)
    scored = [
        -log_probabilities[row, place - 1, tokens[row, place]]
        for row in range(2)
        for place in (1, 3, 4, 5, 6, 7)
    ]
    assert outputs.loss.item() == pytest.approx(torch.stack(scored).mean().item(), rel=1e-5)


def test_tied_output_is_the_embedding() -> None:
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6, "vocab_size": 97}
    tied = DistributedLMForCausalLM(DistributedLMConfig(**shape))
    assert not any("output_layer" in name for name in tied.state_dict())
    untied = DistributedLMForCausalLM(DistributedLMConfig(**shape, tie_word_embeddings=False))
    assert untied.get_output_embeddings() is untied.output_layer
