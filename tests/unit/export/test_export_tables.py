"""Tokenizers and slopes against what ``transformers`` makes of them."""

from pathlib import Path

import pytest
import torch

from distributed_lm.config import ModelConfig
from distributed_lm.data.manifest import read_manifest
from distributed_lm.data.tokenizer import tokenizer_of
from distributed_lm.export.names import FAMILIES, table_of
from distributed_lm.export.tokenizers import SAMPLE, write_tokenizer
from distributed_lm.model.alibi import alibi_slopes
from distributed_lm.prepare_data import prepare_data


@pytest.mark.parametrize("spec", ["bytes", "gpt2", "bpe:400"])
def test_tokenizer_gives_the_same_ids(spec: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text(SAMPLE * 20)
    data, output = tmp_path / "data", tmp_path / "hf"
    prepare_data(data, [str(text)], tokenizer=spec, split="1,0,0")
    output.mkdir()
    manifest = read_manifest(data)
    write_tokenizer(output, data, manifest)
    theirs = AutoTokenizer.from_pretrained(output)
    expected = tokenizer_of(data, manifest).encode(SAMPLE).tolist()
    assert theirs(SAMPLE).input_ids == expected
    assert theirs.decode(expected) == SAMPLE
    assert theirs.eos_token_id == manifest.end_of_document


def test_mpt_has_our_slopes_in_our_order_for_any_number_of_heads() -> None:
    """So its heads need no permuting; if a version of transformers changes that, we hear of it."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads in range(1, 129):
        bias = build_mpt_alibi_tensor(heads, 2)  # [heads, 1, 2]: of distance 1, and of 0
        slopes = torch.tensor(alibi_slopes(heads))
        torch.testing.assert_close(-bias[:, 0, 0], slopes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_transform_is_undone_by_its_inverse(family: str) -> None:
    grouped = family in ("llama", "distributed_lm")
    model = ModelConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2 if grouped else None,
        position="alibi",
        tie_embeddings=False,
    )
    groups = model.key_value_heads
    for rule in table_of(family, model, 8).rules:
        rows = (6 + 2 * groups) * 4 if "linear_qkv" in rule.ours else 24
        ours = torch.randn(rows) if rule.ours.endswith("bias") else torch.randn(rows, 24)
        theirs = rule.transform.to_theirs(ours, model)
        assert len(theirs) == len(rule.theirs)
        assert torch.equal(rule.transform.to_ours(theirs, model), ours), rule.ours


def test_qkv_are_taken_apart_by_heads() -> None:
    """Against the definition: Megatron's row of group g is its queries, then its key and value."""
    shape = {"num_layers": 1, "hidden_size": 12, "num_attention_heads": 6, "bias": False}
    model = ModelConfig(**shape, num_key_value_heads=2)
    rows = [f"{part}{group}" for group in (0, 1) for part in ("q", "q", "q", "k", "v")]
    numbers = {name: index for index, name in enumerate(["q0", "q1", "k0", "k1", "v0", "v1"])}
    fused = torch.tensor([numbers[row] for row in rows]).repeat_interleave(2).float()
    [rule] = [rule for rule in table_of("llama", model, 8).rules if "linear_qkv" in rule.ours]
    query, key, value = rule.transform.to_theirs(fused[:, None], model)
    assert query.flatten().tolist() == [0.0] * 6 + [1.0] * 6
    assert key.flatten().tolist() == [2.0, 2.0, 3.0, 3.0]
    assert value.flatten().tolist() == [4.0, 4.0, 5.0, 5.0]
