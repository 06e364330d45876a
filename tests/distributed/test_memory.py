"""The planner's bytes against the peak of real training, within a tenth.

On a CPU the peak is what the process grew by in resident memory; the baseline is read in the same
process after a step of a tiny model, when all libraries have what they keep for themselves.
"""

import ctypes
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.planner.memory import rank_memory
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.training.engine import TrainingEngine
from tests.support.gpu import requires_gpu, run_on_gpu
from tests.support.ranks import run_distributed
from tests.support.training import random_microbatches, tiny_config

VOCAB = 4096
# Mostly weights and optimizer state.
WIDE: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 512, "vocab_size": VOCAB},
    "data": {"sequence_length": 128},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
}
# Mostly activations.
LONG: dict[str, Any] = {
    "model": {"num_layers": 6, "hidden_size": 192, "vocab_size": VOCAB},
    "data": {"sequence_length": 512},
    "batch": {"global_batch_size": 8, "micro_batch_size": 4},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fp32-zero0": (1, WIDE, {"zero": {"stage": 0}}),
    "fp32-zero1-dp2": (2, WIDE, {}),
    "fp32-zero2": (1, WIDE, {"zero": {"stage": 2}}),
    "fp32-zero3-dp2": (2, WIDE, {"zero": {"stage": 3}}),
    "bf16-zero1": (1, WIDE, {"precision": "bf16"}),
    "bf16-zero2-dp2": (2, WIDE, {"precision": "bf16", "zero": {"stage": 2}}),
    "activations": (1, LONG, {}),
    "activations-bf16": (1, LONG, {"precision": "bf16"}),
    "recompute-selective": (
        1,
        LONG,
        {
            "data": {"sequence_length": 256},
            "attention": {"backend": "reference"},
            "train": {"recompute": "selective"},
        },
    ),
    "recompute-full": (1, LONG, {"train": {"recompute": "full"}}),
    "tp2-sequence": (2, LONG, {"parallel": {"tensor": 2, "sequence": True}}),
    "pp2": (2, LONG, {"parallel": {"pipeline": 2}}),
}  # fmt: skip


def memory_config(shape: dict[str, Any], sections: dict[str, Any]) -> RunConfig:
    both = {key: {**shape.get(key, {})} for key in shape}
    for key, value in sections.items():
        both[key] = {**both.get(key, {}), **value} if isinstance(value, dict) else value
    return tiny_config(**both)


def train_steps(config: RunConfig, groups: ProcessGroups, steps: int) -> None:
    assert config.model.vocab_size is not None
    stages = build_stages(config, config.model.vocab_size, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    engine = TrainingEngine(config, stages, groups)
    for step in range(steps):
        engine.train_step(random_microbatches(config, groups, step), 1e-3)


def resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def measure_growth(config: RunConfig) -> int:
    """Bytes by which this rank's resident memory has grown at its peak."""
    # Every tensor of more than 64 KiB goes back to the system when it is freed (M_MMAP_THRESHOLD):
    # what glibc keeps of others' holes is not the model's.
    assert ctypes.CDLL(None).mallopt(-3, 1 << 16) == 1
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    tiny = {"num_layers": config.model.num_layers, "hidden_size": 64, "vocab_size": 192}
    model = config.model.model_copy(update=tiny)
    train_steps(config.model_copy(update={"model": model}), groups, 2)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    baseline = resident_bytes("VmRSS")
    train_steps(config, groups, 2)
    return resident_bytes("VmHWM") - baseline


def planned(config: RunConfig, world_size: int, rank: int, device: Any) -> float:
    layout = Layout.of(config, world_size)
    pipeline = layout.coordinates(rank).pipeline
    return rank_memory(config, layout, VOCAB, pipeline, device).total


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_predicted_within_a_tenth_of_the_measured_peak(layout: str) -> None:
    world_size, shape, sections = LAYOUTS[layout]
    config = memory_config(shape, sections)
    measured = run_distributed(measure_growth, world_size, config)
    predicted = [planned(config, world_size, rank, "cpu") for rank in range(world_size)]
    assert predicted == pytest.approx(measured, rel=0.1)


# Gigabytes, so that the libraries' workspaces (tens of megabytes) are lost in it.
BIG: dict[str, Any] = {
    "model": {"num_layers": 8, "hidden_size": 1024, "num_attention_heads": 8, "vocab_size": VOCAB},
    "data": {"sequence_length": 1024},
    "batch": {"global_batch_size": 16, "micro_batch_size": 8},
    "precision": "bf16",
}


def measure_allocated(config: RunConfig) -> int:
    """Bytes of the GPU's memory that tensors have at the peak."""
    groups = process_groups.start(config, Process.from_environment(), Layout.of(config, 1))
    torch.cuda.reset_peak_memory_stats()
    train_steps(config, groups, 2)
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@requires_gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_predicted_within_a_tenth_of_what_a_gpu_allocates(stage: int, recompute: str) -> None:
    config = memory_config(BIG, {"zero": {"stage": stage}, "train": {"recompute": recompute}})
    measured = run_on_gpu(measure_allocated, config)
    assert planned(config, 1, 0, "cuda") == pytest.approx(measured, rel=0.1)
