"""Every protocol against a model called token by token, at every layout; memory at 16 times the
trained length; and losses of an independent implementation."""

import resource
from typing import Any

import numpy as np
import pytest
import torch

from distributed_lm.config import RunConfig
from distributed_lm.evaluation.protocols import Request
from distributed_lm.evaluation.scoring import score_windows
from distributed_lm.evaluation.windows import sliding_windows
from tests.support.ranks import run_distributed
from tests.support.scoring import (
    join_with_model,
    random_data,
    score_requests,
    scorer,
    whole_model_losses,
)
from tests.support.training import VOCAB, tiny_config

MODEL = {"num_layers": 2, "hidden_size": 32, "init_std": 0.3}
EVALUATION = {"tokens_per_batch": 48, "sample_tokens": 0}
# Documents shorter than, as long as and longer than the windows; 75 targets are no multiple of 8.
DATA = random_data(VOCAB, [5, 30, 1, 9, 8, 23])
REQUESTS = [
    Request((8, 16), "nonoverlapping"),
    Request((8, 16), "sliding", stride=4),
    Request((8, 16), "documents", longer_than=8),
    Request((8,), "documents", stride=4),
]
WHOLE = 1 << 24


def config_of(**sections: Any) -> RunConfig:
    return tiny_config(model=MODEL, evaluation=EVALUATION, **sections)


@pytest.fixture(scope="module")
def serial() -> list[dict[str, Any]]:
    sampled = config_of()
    sampled = sampled.model_copy(
        update={"evaluation": sampled.evaluation.model_copy(update={"sample_tokens": 20})}
    )
    [results] = run_distributed(score_requests, 1, config_of(), VOCAB, DATA, REQUESTS, WHOLE)
    [context] = run_distributed(
        score_requests, 1, sampled, VOCAB, DATA,
        [Request((16,), "context"), Request((8,), "sliding", stride=1)], WHOLE,
    )  # fmt: skip
    return results + context


def reference_cases(result: dict[str, Any], stride: int, stretches: list[tuple[int, int]]) -> Any:
    """(target, context) by the protocol's definition, over stretches [first token, last token]."""
    cases, length = [], result["length"]
    for first, last in stretches:
        start = first
        while True:
            fresh = 1 if start == first else length - stride + 1
            for context in range(fresh, length + 1):
                if start + context <= last:
                    cases.append((start + context, context))
            if start + length >= last:
                break
            start += stride
    return cases


WHOLE_STREAM = [(0, 75)]
LONGER_THAN_8 = [(5, 34), (36, 44), (53, 75)]


@pytest.mark.parametrize(
    ("index", "stride", "stretches"),
    [
        (0, 8, WHOLE_STREAM), (1, 16, WHOLE_STREAM), (2, 4, WHOLE_STREAM), (3, 4, WHOLE_STREAM),
        (4, 8, LONGER_THAN_8), (5, 16, LONGER_THAN_8), (6, 4, LONGER_THAN_8),
    ],
)  # fmt: skip
def test_sums_are_those_of_one_token_at_a_time(
    serial: list[dict[str, Any]], index: int, stride: int, stretches: list[tuple[int, int]]
) -> None:
    result = serial[index]
    cases = reference_cases(result, stride, stretches)
    assert sorted(target for target, _ in cases) == [
        target for first, last in stretches for target in range(first + 1, last + 1)
    ]
    [losses] = run_distributed(whole_model_losses, 1, config_of(), VOCAB, DATA, cases)
    positions, documents = np.zeros(result["length"]), np.zeros(len(DATA.document_ends))
    for (target, context), loss in zip(cases, losses, strict=True):
        positions[context - 1] += loss
        documents[np.searchsorted(DATA.document_ends, target, side="right")] += loss
    np.testing.assert_allclose(result["position_nats"], positions, rtol=1e-5)
    np.testing.assert_allclose(result["document_nats"], documents, rtol=1e-5)
    assert result["position_tokens"].sum() == len(cases)


def test_protocols_and_lengths_score_the_same_targets(serial: list[dict[str, Any]]) -> None:
    for index in range(1, 4):
        np.testing.assert_array_equal(
            serial[index]["document_tokens"], serial[0]["document_tokens"]
        )
    assert serial[0]["document_tokens"].tolist() == [4, 30, 1, 9, 8, 23]
    np.testing.assert_array_equal(serial[4]["document_tokens"], serial[5]["document_tokens"])
    assert serial[4]["document_tokens"].tolist() == [0, 29, 0, 8, 0, 22]
    contexts = serial[7:12]
    assert [result["length"] for result in contexts] == [1, 2, 4, 8, 16]
    for result in contexts:
        assert result["position_tokens"].tolist() == [0] * (result["length"] - 1) + [20]
        np.testing.assert_array_equal(result["document_tokens"], contexts[0]["document_tokens"])


LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2-sequence": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "dp2": {},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_gives_the_same_sums(
    serial: list[dict[str, Any]], layout: dict[str, Any]
) -> None:
    """With logits in chunks of one or two positions, where the serial one has them whole."""
    config = config_of(parallel=layout)
    chunk = VOCAB * 12
    ranks = run_distributed(score_requests, 2, config, VOCAB, DATA, REQUESTS, chunk)
    for results in ranks:
        for result, expected in zip(results, serial, strict=False):
            for name in ("position_nats", "document_nats"):
                np.testing.assert_allclose(result[name], expected[name], rtol=2e-5, atol=1e-5)
            for name in ("position_tokens", "document_tokens"):
                np.testing.assert_array_equal(result[name], expected[name])


def peak_of_a_long_window(length: int, trained: int) -> tuple[float, float]:
    """Bytes that this process grew by while it scored one window of ``length`` tokens, and the
    loss, of a model with so many words that its logits are as large as its scores."""
    vocab = 16_384
    config = tiny_config(
        model={"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": vocab},
        data={"sequence_length": trained},
    )
    stages, groups = join_with_model(config, vocab)
    data = random_data(vocab, [length + 1])
    score = scorer(stages, groups)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    windows = sliding_windows(length, length, length)
    sums = score_windows(data.stream, data.document_ends, windows, trained, groups, score)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * 1024.0, sums.nats / sums.tokens


def test_16_times_the_trained_length_takes_bounded_memory() -> None:
    [(grown, loss)] = run_distributed(peak_of_a_long_window, 1, 16_384, 1024)
    # Whole, the scores of one layer are 2 GiB and the logits 1 GiB.
    assert grown < 900 * 2**20, f"{grown / 2**20:.0f} MiB"
    assert loss == pytest.approx(np.log(16_384), abs=0.1)


def mpt_of(stage: torch.nn.Module, config: RunConfig, vocab: int) -> Any:
    """The same weights in ``transformers``' MPT: ALiBi, erf-GELU, no biases anywhere."""
    from transformers import MptConfig, MptForCausalLM

    model = config.model
    heads, width, hidden = model.num_attention_heads, model.head_dim, model.hidden_size
    theirs = MptForCausalLM(
        MptConfig(
            d_model=hidden, n_heads=heads, n_layers=model.num_layers, vocab_size=vocab,
            expansion_ratio=4, max_seq_len=4 * config.data.sequence_length, no_bias=True,
            layer_norm_epsilon=model.norm_epsilon, attn_config={"alibi": True},
        )
    ).eval()  # fmt: skip
    ours = dict(stage.named_parameters())
    renamed = {
        "transformer.wte.weight": ours["embedding.weight"],
        "transformer.norm_f.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["embedding.weight"],
    }
    for layer in range(model.num_layers):
        there, here = f"transformer.blocks.{layer}.", f"decoder.layers.{layer}."
        # Ours has q, k and v of one head after another; theirs all q, then all k, then all v.
        qkv = ours[here + "self_attention.linear_qkv.weight"].view(heads, 3, width, hidden)
        renamed |= {
            there + "attn.Wqkv.weight": qkv.transpose(0, 1).reshape(3 * hidden, hidden),
            there + "attn.out_proj.weight": ours[here + "self_attention.linear_proj.weight"],
            there + "ffn.up_proj.weight": ours[here + "mlp.linear_fc1.weight"],
            there + "ffn.down_proj.weight": ours[here + "mlp.linear_fc2.weight"],
            there + "norm_1.weight": ours[here + "input_layernorm.weight"],
            there + "norm_2.weight": ours[here + "pre_mlp_layernorm.weight"],
        }
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert not [name for name in missing if "weight" in name]
    return theirs


def ours_and_theirs(config: RunConfig, lengths: tuple[int, ...]) -> list[tuple[float, float]]:
    """Nonoverlapping losses, ours and of ``transformers``, whose loss and windows are its own."""
    stages, groups = join_with_model(config, VOCAB)
    theirs = mpt_of(stages[0], config, VOCAB)
    data = random_data(VOCAB, [333])
    pairs = []
    for length in lengths:
        windows = sliding_windows(data.num_targets, length, length)
        sums = score_windows(
            data.stream, data.document_ends, windows, 4 * length, groups, scorer(stages, groups)
        )
        nats = 0.0
        for start in range(0, data.num_targets, length):
            ids = torch.from_numpy(data.stream[start : start + length + 1])[None]
            with torch.no_grad():
                logits = theirs(input_ids=ids[:, :-1]).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        pairs.append((sums.nats / sums.tokens, nats / data.num_targets))
    return pairs


def test_transformers_gives_the_same_loss_at_1_and_2_times_the_trained_length() -> None:
    config = tiny_config(model={"num_layers": 2, "bias": False, "init_std": 0.2})
    trained = config.data.sequence_length
    [pairs] = run_distributed(ours_and_theirs, 1, config, (trained, 2 * trained))
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert abs(pairs[0][0] - pairs[1][0]) > 1e-3  # lengths that this model tells apart
