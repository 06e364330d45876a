"""Training on one GPU: the kernels inside the engines, fp16, and the paper's 1.3B model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed_lm import platform, process_groups
from distributed_lm.config import RunConfig, load_config
from distributed_lm.layout import Layout
from distributed_lm.model.backend_choice import unavailable_reason
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.positions import METHODS, HeadSlice, build_position
from distributed_lm.model.proof import prove_positions
from distributed_lm.pipeline import Microbatch
from distributed_lm.process_groups import Process
from distributed_lm.training.engine import TrainingEngine
from tests.support.gpu import requires_gpu, run_on_gpu
from tests.support.training import build_engine, random_microbatches, tiny_config

pytestmark = [pytest.mark.gpu, requires_gpu, pytest.mark.timeout(900)]

CUDA = torch.device("cuda")
DTYPES = platform.DTYPES
PAPER = Path(__file__).parents[2] / "configs" / "runs" / "alibi_1p3b_L1024.yaml"
PAPER_OVERRIDES = (
    "batch.global_batch_size=8",
    "batch.micro_batch_size=1",
    "train.steps=20",
    "tracking.wandb=disabled",
)
PAPER_MEMORY = 40 * 2**30


def tiny(position: str, backend: str, precision: str, **sections: Any) -> RunConfig:
    """Four heads of 64 over 256 tokens."""
    model = {"hidden_size": 256, "position": position}
    return tiny_config(
        model=model,
        data={"sequence_length": 256},
        precision=precision,
        attention={"backend": backend},
        **sections,
    )


def skip_if_unavailable(backend: str, position: str, precision: str) -> None:
    method = build_position(tiny(position, backend, precision).model, HeadSlice(0, 4, 4))
    reason = unavailable_reason(backend, method, CUDA, DTYPES[precision])
    if reason:
        pytest.skip(reason)


def train(config: RunConfig, steps: int) -> dict[str, list[float]]:
    engine, groups = build_engine(config)
    results = [
        engine.train_step(random_microbatches(config, groups, step), 1e-3) for step in range(steps)
    ]
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
    }


# (loss, gradient norm), relative. In bf16 every kernel rounds in its own places.
PARITY = {"fp32": (2e-5, 1e-3), "bf16": (5e-3, 5e-2)}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", sorted(PARITY))
@pytest.mark.parametrize("position", sorted(METHODS))
def test_flex_trains_as_reference_does(position: str, precision: str, recompute: str) -> None:
    steps = 10
    settings = {"train": {"recompute": recompute}}
    flex = run_on_gpu(train, tiny(position, "flex", precision, **settings), steps)
    reference = run_on_gpu(train, tiny(position, "reference", precision), steps)
    loss, norm = PARITY[precision]
    np.testing.assert_allclose(flex["losses"], reference["losses"], rtol=loss)
    np.testing.assert_allclose(flex["grad_norms"], reference["grad_norms"], rtol=norm)


def train_and_count_graphs(config: RunConfig, steps: int) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    engine, groups = build_engine(config)
    losses, graphs = [], []
    for step in range(steps):
        losses.append(engine.train_step(random_microbatches(config, groups, step), 1e-3).loss)
        graphs.append(counters["stats"]["unique_graphs"])
    return {"losses": losses, "graphs": graphs, "breaks": dict(counters["graph_break"])}


@pytest.mark.parametrize("backend", ["flex", "flash", "sdpa"])
def test_compiled_layers_are_one_graph_and_compiled_once(backend: str) -> None:
    skip_if_unavailable(backend, "alibi", "bf16")
    plain, compiled = (
        run_on_gpu(
            train_and_count_graphs, tiny("alibi", backend, "bf16", train={"compile": chosen}), 6
        )
        for chosen in (False, True)
    )
    np.testing.assert_allclose(compiled["losses"], plain["losses"], rtol=5e-3)
    assert compiled["breaks"] == {}
    assert compiled["graphs"][2:] == compiled["graphs"][2:3] * 4, "compiled again after warm-up"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree_in_bf16(stage: int) -> None:
    """One rank, but three different optimizers of DeepSpeed's."""
    plain = run_on_gpu(train, tiny("alibi", "flex", "fp32", zero={"stage": 0}), 10)
    zero = run_on_gpu(train, tiny("alibi", "flex", "bf16", zero={"stage": stage}), 10)
    np.testing.assert_allclose(zero["losses"], plain["losses"], rtol=2e-2)


def prove(config: RunConfig) -> dict[str, Any]:
    engine, groups = build_engine(config)
    return vars(prove_positions(engine.stages, groups))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "flex", "flash"])
@pytest.mark.parametrize("position", sorted(METHODS))
def test_every_kernel_passes_the_start_up_proof(
    position: str, backend: str, precision: str
) -> None:
    if backend != "auto":
        skip_if_unavailable(backend, position, precision)
    proof = run_on_gpu(prove, tiny(position, backend, precision))
    assert proof["largest_error"] < proof["tolerance"]
    fastest = "flex" if position in ("alibi", "t5") else "sdpa"
    assert proof["backend"] == (fastest if backend == "auto" else backend)


def train_fp16_from_too_high_a_scale(config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """Every step's result, the loss scale after it, and how far the weights moved in it."""
    engine, groups = build_engine(config)
    scaler = engine.deepspeed.optimizer.loss_scaler
    scaler.cur_scale = 2.0**28
    records = []
    for _ in range(steps):
        before = [parameter.detach().clone() for parameter in engine.deepspeed.module.parameters()]
        result = engine.train_step(random_microbatches(config, groups, 0), 1e-3)
        after = engine.deepspeed.module.parameters()
        moved = sum(
            float((new - old).float().abs().sum()) for new, old in zip(after, before, strict=True)
        )
        records.append({**vars(result), "scale": float(scaler.cur_scale), "moved": moved})
    return records


def test_fp16_finds_its_loss_scale_and_trains() -> None:
    records = run_on_gpu(train_fp16_from_too_high_a_scale, tiny("alibi", "flex", "fp16"), 60)
    skipped = [record for record in records if not record["is_updated"]]
    updated = [record for record in records if record["is_updated"]]
    assert records[0] in skipped
    for record in skipped:
        assert record["moved"] == 0
        assert np.isinf(record["grad_norm"])
        assert np.isfinite(record["loss"])  # an overflow of gradients, not of the model
    assert len(updated) >= 30
    assert updated[-1]["scale"] < 2.0**28
    for record in updated:
        assert record["moved"] > 0
        assert np.isfinite(record["grad_norm"])
    assert updated[-1]["loss"] < updated[0]["loss"] - 0.5  # one batch, learnt by heart


def train_the_papers_model(config: RunConfig, steps: int) -> dict[str, Any]:
    """Steps on random tokens of a small part of the vocabulary, then losses at longer lengths."""
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    stages = build_stages(config, vocab_size, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    engine = TrainingEngine(config, stages, groups)
    proof = prove_positions(stages, groups)
    losses = [
        engine.train_step(
            random_microbatches(config, groups, step), 2e-4 * min(1.0, (step + 1) / 5)
        ).loss
        for step in range(steps)
    ]
    longer = {}
    for length in (1024, 2048, 4096, 8192):
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(0, 192, (1, length + 1), generator=generator)
        total, count = engine.evaluate([Microbatch(tokens[:, :-1], tokens[:, 1:])])
        longer[length] = total / count
    return {"losses": losses, "longer": longer, "backend": proof.backend}


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_papers_model_takes_20_steps_on_one_gpu(micro_batch_size: int) -> None:
    memory = torch.cuda.get_device_properties(0).total_memory
    if memory < PAPER_MEMORY:
        pytest.skip(f"the 1.3B model needs 40 GiB of GPU memory, found {memory / 2**30:.0f} GiB")
    overrides = (*PAPER_OVERRIDES, f"batch.micro_batch_size={micro_batch_size}")
    result = run_on_gpu(train_the_papers_model, load_config(PAPER, overrides), 20)
    assert result["backend"] == "flex"
    losses = result["losses"]
    assert np.isfinite(losses).all()
    assert losses[0] == pytest.approx(np.log(51200), abs=1.0)
    assert losses[-1] < losses[0] - 1.0
    assert max(np.diff(losses)) < 0.5
    for length, loss in result["longer"].items():
        assert loss == pytest.approx(losses[-1], abs=0.5), length
