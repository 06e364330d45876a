"""Tokens per second and MFU by a stubbed clock, and their FLOPs against what torch counts."""

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distributed_lm import platform, process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.process_groups import Process
from distributed_lm.training.throughput import Throughput
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, build_engine, random_microbatches, tiny_config

TOKENS_PER_STEP = 8 * 32  # global batch × sequence length
PEAK = 1e9

# The tiny model by hand: 5 layers, hidden 64, feed-forward 256, 192 words, tied.
LAYER = (64 * 192 + 192) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 2 * 128
PARAMETERS = 5 * LAYER + 192 * 64 + 128
# Forward, and twice that backward; 2 per multiplication and addition; scores and weighted sum.
ATTENTION = 3 * 2 * 2 * 5 * 64 * 32
FULL = 6 * PARAMETERS + ATTENTION
CAUSAL = 6 * PARAMETERS + ATTENTION / 2


class Clock:
    """Stands in for ``time.perf_counter``: moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def step(self, throughput: Throughput, seconds: float) -> None:
        self.now += seconds
        throughput.step_done()


def read_figures(config: RunConfig) -> list[dict[str, Any]]:
    """Three readings: steps of half a second; the same with time stopped; the same again."""
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    clock = Clock()
    with (
        patch.object(time, "perf_counter", clock),
        patch.object(platform, "peak_flops", lambda *_: (PEAK, "stub")),
    ):
        throughput = Throughput(config, VOCAB, groups)
        clock.now += 77.0  # building, loading: before the loop starts the clock
        throughput.restart()
        readings = []
        for stopped_seconds in (0.0, 30.0, 0.0):
            for _ in range(4):
                clock.step(throughput, 0.5)
                with throughput.stopped():
                    clock.now += stopped_seconds
            readings.append(throughput.read())
    return readings


@pytest.mark.parametrize("world_size", [1, 2])
def test_figures_are_those_of_the_clock(world_size: int) -> None:
    config = tiny_config(parallel={"tensor": world_size})
    for readings in run_distributed(read_figures, world_size, config):
        for figures in readings:
            assert figures["step_seconds"] == pytest.approx(0.5)
            assert figures["tokens_per_second"] == pytest.approx(TOKENS_PER_STEP / 0.5)
            per_device = TOKENS_PER_STEP / 0.5 / world_size
            assert figures["tokens_per_second_per_device"] == pytest.approx(per_device)
            assert figures["mfu"] == pytest.approx(per_device * FULL / PEAK)
            assert figures["mfu_causal"] == pytest.approx(per_device * CAUSAL / PEAK)
            # A process with torch in it: more than 100 MB, less than this machine could hold.
            assert 1e8 < figures["peak_memory_bytes"] < 1e11


def count_flops(config: RunConfig) -> float:
    """Per token, of one whole step as it runs."""
    engine, groups = build_engine(config)
    batch = random_microbatches(config, groups, 0)
    with FlopCounterMode(display=False) as counter:
        engine.train_step(batch, 1e-3)
    return counter.get_total_flops() / TOKENS_PER_STEP


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_flops_per_token_are_what_torch_counts(activation: str, tied: bool) -> None:
    """The materialised reference kernel multiplies the whole square: the full convention."""
    model = {"activation": activation, "tie_embeddings": tied, "bias": False}
    config = tiny_config(model=model, attention={"backend": "reference"})
    [counted] = run_distributed(count_flops, 1, config)
    flops = training_flops_per_token(config.model, VOCAB, 32)
    norms = (2 * 5 + 1) * 64  # parameters as any to the planner, but no matrix product
    assert flops.full == counted + 6 * norms
    assert flops.causal == flops.full - ATTENTION / 2


def test_hand_count_is_the_planners() -> None:
    flops = training_flops_per_token(tiny_config().model, VOCAB, 32)
    assert (flops.full, flops.causal) == (FULL, CAUSAL)


def test_measured_peak_counts_multiplications_and_additions() -> None:
    """A multiplication and an addition for each of n³: with every product one tick of the clock."""
    clock = Clock()

    def tick() -> float:
        clock.now += 0.125
        return clock.now

    with patch.object(time, "perf_counter", tick):
        peak, source = platform.peak_flops(torch.device("cpu"), torch.float32)
    assert peak == 2 * 1024**3 / 0.125
    assert source == "measured matrix product"
