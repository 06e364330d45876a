"""Dropout: which ranks drop alike, what recomputing and resuming must draw again."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.core_attention import core_attentions
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.proof import prove_positions
from distributed_lm.process_groups import Process
from distributed_lm.training.snapshot import begin_snapshot, load_snapshot
from tests.support.ranks import run_distributed
from tests.support.training import (
    VOCAB,
    assemble_weights,
    build_engine,
    random_microbatches,
    tiny_config,
    train_tiny,
)
from tests.support.wikitext import DROPOUT, NAG

HIDDEN, ATTENTION, ACTIVATION = 0.3, 0.1, 0.1
TENSOR2 = {"tensor": 2}
SEQUENCE2 = {"tensor": 2, "sequence": True}


def config_of(**sections: Any) -> RunConfig:
    model = {**DROPOUT, "vocab_size": VOCAB, **sections.pop("model", {})}
    return tiny_config(model=model, optimizer=NAG, **sections)


def dropped(config: RunConfig) -> dict[str, Any]:
    """Which values are gone: of embeddings, of attention weights, of activations; and whether
    anything is without training."""
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    stages = build_stages(config, VOCAB, groups)
    [stage] = stages
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    proof = prove_positions(stages, groups)
    tokens = torch.arange(256 * 8).view(8, 256) % VOCAB
    embedded = stage._embed(tokens).detach()
    [attention, _] = core_attentions(stages)
    [layer, _] = stage.decoder.layers

    # Values that single out each key: what comes out are the attention weights.
    heads = 4 // groups.layout.tensor
    zeros = torch.zeros(16, 256, heads, 16)
    keys = torch.eye(16)[:, None, None, :].expand(16, 256, heads, 16)
    # No gradient reaches an input that was dropped.
    inner = torch.ones(64, 8, 256 // groups.layout.tensor, requires_grad=True)
    # As Megatron's block runs its layers.
    with get_cuda_rng_tracker().fork() if groups.layout.sequence else nullcontext():
        weights = attention(zeros, zeros, keys).view(16, 256, heads, 16)
        output, _ = layer.mlp.linear_fc2(inner)
    causal = torch.ones(16, 16).tril().bool()[:, None, None, :].expand_as(weights)
    output.square().sum().backward()

    stage.eval()
    whole = stage._embed(tokens).detach()
    kept = embedded != 0.0
    torch.testing.assert_close(embedded[kept], whole[kept] / (1.0 - HIDDEN))
    still = attention(zeros, zeros, keys).view(16, 256, heads, 16)
    return {
        "embedding": (embedded == 0.0).numpy(),
        "attention": (weights[causal] == 0.0).numpy(),
        "activation": (inner.grad == 0.0).numpy(),
        "in evaluation": bool((whole == 0.0).any() | (still[causal] == 0.0).any()),
        "proof": proof.largest_error,
    }


@pytest.mark.parametrize("parallel", [TENSOR2, SEQUENCE2], ids=["tp2", "tp2-sequence"])
def test_ranks_drop_alike_what_they_share_and_apart_what_is_split(parallel: Any) -> None:
    config = config_of(parallel=parallel, data={"sequence_length": 256})
    first, second = run_distributed(dropped, 2, config)
    rates = {"embedding": HIDDEN, "attention": ATTENTION, "activation": ACTIVATION}
    for part, rate in rates.items():
        for rank in (first, second):
            assert rank[part].mean() == pytest.approx(rate, abs=0.01), part
        agreement = (first[part] == second[part]).mean()
        if part == "embedding" and not parallel.get("sequence"):
            assert agreement == 1.0
        else:  # two masks that know nothing of each other
            assert agreement == pytest.approx(rate**2 + (1 - rate) ** 2, abs=0.02), part
    assert not first["in evaluation"]
    assert not second["in evaluation"]


def losses(config: RunConfig, world_size: int = 1) -> list[float]:
    results = run_distributed(train_tiny, world_size, config, 4)
    assemble_weights(results)  # what ranks hold alike must have stayed alike
    assert all(result["losses"] == results[0]["losses"] for result in results)
    return results[0]["losses"]


@pytest.mark.parametrize("parallel", [{}, TENSOR2, SEQUENCE2], ids=["one", "tp2", "tp2-sequence"])
def test_recomputing_drops_the_same(parallel: Any) -> None:
    world_size = parallel.get("tensor", 1)
    plain = losses(config_of(parallel=parallel), world_size)
    for recompute in ("selective", "full"):
        again = losses(config_of(parallel=parallel, train={"recompute": recompute}), world_size)
        np.testing.assert_allclose(again, plain, rtol=1e-6)
    # Or equal would be no news.
    without = losses(
        config_of(parallel=parallel, model={"dropout": {}, "adaptive": {"cutoffs": [64, 128]}}),
        world_size,
    )
    assert abs(without[-1] - plain[-1]) > 1e-3


SAVED, LAST = 3, 6


def step_and_save(config: RunConfig, run_dir: Path, is_resumed: bool) -> list[Any]:
    engine, groups = build_engine(config)
    if is_resumed:
        load_snapshot(engine, run_dir, SAVED)
    results = []
    for step in range(SAVED if is_resumed else 0, LAST):
        if step == SAVED and not is_resumed:
            begin_snapshot(engine, run_dir, SAVED, {}).finish()
        batch = random_microbatches(config, groups, step)
        results.append(engine.train_step(batch, 0.02 * (step + 1)))
    return results


RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-zero1": (2, {"parallel": TENSOR2}),
    "tp2-sequence-zero2": (2, {"parallel": SEQUENCE2, "zero": {"stage": 2}}),
    "pp2-bf16": (2, {"parallel": {"pipeline": 2}, "precision": "bf16"}),
    "zero0": (1, {"zero": {"stage": 0}}),
}


@pytest.mark.parametrize("layout", RESUMED)
def test_resume_is_exact(layout: str, tmp_path: Path) -> None:
    """With dropout, momentum, and a learning rate that has moved on."""
    world_size, sections = RESUMED[layout]
    config = config_of(**sections)
    whole = run_distributed(step_and_save, world_size, config, tmp_path, False)
    resumed = run_distributed(step_and_save, world_size, config, tmp_path, True)
    for uninterrupted, after in zip(whole, resumed, strict=True):
        assert after == uninterrupted[SAVED:]
