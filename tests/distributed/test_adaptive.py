"""Adaptive embedding and softmax: against torch's own, and parallel against serial."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import GPTStage, build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.training.gradients import sum_partial_gradients
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
from tests.support.wikitext import ADAPTIVE, NAG

CUTOFFS, WIDTHS = (64, 128), (64, 32, 16)
TENSOR2 = {"tensor": 2}
SEQUENCE2 = {"tensor": 2, "sequence": True}
LENGTH, SEQUENCES = 12, 3


def config_of(**sections: Any) -> RunConfig:
    model = {**ADAPTIVE, "vocab_size": VOCAB, **sections.pop("model", {})}
    return tiny_config(model=model, **sections)


def start(config: RunConfig) -> tuple[GPTStage, ProcessGroups]:
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    [stage] = build_stages(config, VOCAB, groups)
    initialize_weights(parameter_shards([stage], groups), config.model, config.seed)
    return stage, groups


def inputs(labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S, B, D], and labels [B, S] of every band or of the first alone."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(LENGTH, SEQUENCES, 64, generator=generator)
    most = VOCAB if labels == "all bands" else CUTOFFS[0]
    return hidden, torch.randint(0, most, (SEQUENCES, LENGTH), generator=generator)


def run_ends(config: RunConfig, labels_of: str) -> dict[str, Any]:
    """The embedding's and the softmax's outputs, and the softmax's gradients."""
    stage, groups = start(config)
    sum_partial_gradients(parameter_shards([stage], groups), groups)
    whole, labels = inputs(labels_of)
    rank, size = groups.coordinates.tensor, groups.layout.tensor
    is_split = groups.layout.sequence
    hidden = (whole.chunk(size)[rank] if is_split else whole).clone().requires_grad_()
    summed, losses = stage.output_layer(hidden, labels)
    (summed / labels.numel()).backward()
    blocks, gradients = [], []
    for shard in parameter_shards([stage], groups):
        if "decoder" in shard.pieces[0].name:
            continue
        [piece] = shard.pieces
        place = (piece.name, piece.global_shape, piece.global_offset)
        blocks.append((*place, shard.parameter.detach().numpy()))
        if shard.parameter.grad is not None:
            gradients.append((*place, shard.parameter.grad.numpy()))
    with torch.no_grad():
        embedded = stage.embedding(labels)
        log_probabilities = stage.output_layer(hidden)
    return {
        "losses": losses.detach().numpy(),
        "hidden": hidden.grad.numpy(),
        "embedded": embedded.numpy(),
        "log_probabilities": log_probabilities.numpy(),
        "weights": blocks,
        "gradients": {"weights": gradients},
    }


def torchs(weights: dict[str, np.ndarray]) -> torch.nn.AdaptiveLogSoftmaxWithLoss:
    """torch's module with our weights. Its head is one matrix, its first projections transposed."""
    softmax = torch.nn.AdaptiveLogSoftmaxWithLoss(64, VOCAB, list(CUTOFFS), div_value=2.0)
    names = {
        "head.weight": [weights["embedding.bands.0.weight"], weights["output_layer.classes.weight"]]
    }
    for band in (1, 2):
        names[f"tail.{band - 1}.0.weight"] = [weights[f"embedding.projections.{band}.weight"].T]
        names[f"tail.{band - 1}.1.weight"] = [weights[f"embedding.bands.{band}.weight"]]
    state = {name: torch.from_numpy(np.concatenate(parts)) for name, parts in names.items()}
    softmax.load_state_dict(state)
    return softmax


ENDS = {"serial": (1, {}), "tp2": (2, TENSOR2), "tp2-sequence": (2, SEQUENCE2)}


@pytest.mark.parametrize("labels_of", ["all bands", "the first band"])
@pytest.mark.parametrize("layout", ENDS)
def test_softmax_is_torchs(layout: str, labels_of: str) -> None:
    world_size, parallel = ENDS[layout]
    config = config_of(parallel=parallel, data={"sequence_length": LENGTH})
    results = run_distributed(run_ends, world_size, config, labels_of)
    weights = assemble_weights(results)
    softmax = torchs(weights)
    whole, labels = inputs(labels_of)
    whole.requires_grad_()
    found = softmax(whole.flatten(0, 1), labels.T.flatten())
    expected = -found.output.view(LENGTH, SEQUENCES).T
    expected.mean().backward()

    is_split = parallel.get("sequence", False)
    hidden = [result["hidden"] for result in results]
    gradient = np.concatenate(hidden) if is_split else hidden[0]
    np.testing.assert_allclose(gradient, whole.grad, rtol=1e-5, atol=1e-8)
    log_probabilities = softmax.log_prob(whole.flatten(0, 1)).detach()
    for result in results:
        np.testing.assert_allclose(result["losses"], expected.detach(), rtol=1e-5)
        np.testing.assert_allclose(
            result["log_probabilities"].reshape(-1, VOCAB), log_probabilities, rtol=1e-4, atol=1e-5
        )
    gradients = assemble_weights([result["gradients"] for result in results])
    # Of a tied weight, the input's share is not in it here; band 0's projection has no other.
    assert gradients.keys() == weights.keys() - {"embedding.projections.0.weight"}
    by_torch = dict(softmax.named_parameters())
    head = by_torch["head.weight"].grad
    pairs = [("embedding.bands.0.weight", head[:64]), ("output_layer.classes.weight", head[64:])]
    for band in (1, 2):
        projection = by_torch[f"tail.{band - 1}.0.weight"].grad
        rows = by_torch[f"tail.{band - 1}.1.weight"].grad
        # Where no target is in the band, torch leaves it out; ours has zeros.
        pairs.append(
            (f"embedding.projections.{band}.weight", projection.T if projection is not None else 0)
        )
        pairs.append((f"embedding.bands.{band}.weight", rows if rows is not None else 0))
    for name, expected_gradient in pairs:
        np.testing.assert_allclose(
            gradients[name], expected_gradient, rtol=1e-4, atol=1e-7, err_msg=name
        )


@pytest.mark.parametrize("layout", ENDS)
def test_embedding_is_a_row_times_its_bands_projection(layout: str) -> None:
    world_size, parallel = ENDS[layout]
    config = config_of(parallel=parallel, data={"sequence_length": LENGTH})
    results = run_distributed(run_ends, world_size, config, "all bands")
    weights = assemble_weights(results)
    _, tokens = inputs("all bands")
    edges = (0, *CUTOFFS, VOCAB)
    expected = np.zeros((SEQUENCES, LENGTH, 64), np.float32)
    for place, token in np.ndenumerate(tokens.numpy()):
        band = int(np.searchsorted(CUTOFFS, token, side="right"))
        row = weights[f"embedding.bands.{band}.weight"][token - edges[band]]
        assert row.shape == (WIDTHS[band],)
        expected[place] = weights[f"embedding.projections.{band}.weight"] @ row
    if layout == "tp2-sequence":
        embedded = np.concatenate([result["embedded"] for result in results]).swapaxes(0, 1)
        np.testing.assert_allclose(embedded, expected, atol=1e-6)
    else:
        for result in results:
            np.testing.assert_allclose(result["embedded"], expected, atol=1e-6)


STEPS = 12
DECAYED = {"optimizer": {**NAG, "weight_decay": 0.5}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": TENSOR2}),
    "tp2-sequence-zero2": (2, {"parallel": SEQUENCE2, "zero": {"stage": 2}}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "tp2-pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "dp2-zero1": (2, {"zero": {"stage": 1}}),
    "dp2-zero3": (2, {"zero": {"stage": 3}}),
    "pp2-full-recompute": (2, {"parallel": {"pipeline": 2}, "train": {"recompute": "full"}}),
}


@functools.cache
def serial() -> dict[str, Any]:
    """One process, ZeRO 0, the sinusoidal arm."""
    config = config_of(model={"position": "sinusoidal"}, zero={"stage": 0}, **DECAYED)
    return run_distributed(train_tiny, 1, config, STEPS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    config = config_of(model={"position": "sinusoidal"}, **sections, **DECAYED)
    results = run_distributed(train_tiny, world_size, config, STEPS)
    for result in results:
        np.testing.assert_allclose(result["losses"], serial()["losses"], rtol=5e-6)
        np.testing.assert_allclose(result["grad_norms"], serial()["grad_norms"], rtol=1e-4)
    weights, expected = assemble_weights(results), assemble_weights([serial()])
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name], tensor, atol=2e-6, rtol=0, err_msg=name)


def test_training_reduces_the_loss() -> None:
    losses = serial()["losses"]
    assert losses[-1] < losses[0] - 0.3


def save_and_score(config: RunConfig, run_dir: Path) -> tuple[float, float]:
    engine, groups = build_engine(config)
    for step in range(3):
        engine.train_step(random_microbatches(config, groups, step), 0.05)
    begin_snapshot(engine, run_dir, 3, {}).finish()
    return engine.evaluate(random_microbatches(config, groups, 9))


def load_and_score(config: RunConfig, run_dir: Path) -> tuple[float, float]:
    engine, groups = build_engine(config)
    load_snapshot(engine, run_dir, 3)
    return engine.evaluate(random_microbatches(config, groups, 9))


def test_checkpoint_of_two_stages_loads_on_one_and_on_split_ones(tmp_path: Path) -> None:
    two = config_of(parallel={"pipeline": 2}, optimizer=NAG)
    expected = run_distributed(save_and_score, 2, two, tmp_path)[0]
    for world_size, sections in ((1, {}), (2, {"parallel": SEQUENCE2})):
        config = config_of(optimizer=NAG, **sections)
        [found, *_] = run_distributed(load_and_score, world_size, config, tmp_path)
        assert found == pytest.approx(expected, rel=1e-6)
