"""Ratios of measured step times against the planner's model of a CPU.

Wide, since other work shares the cores; benchmarks/bubble.py measures them closely.
"""

import time
from typing import Any

import pytest

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.pipeline import Microbatch
from distributed_lm.planner.devices import measured_cpu
from distributed_lm.planner.step_time import Machine, step_time
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.training.engine import TrainingEngine
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, random_microbatches, tiny_config

ROUNDS = 12


def timed_config(length: int, batch: int, micro: int, **sections: Any) -> RunConfig:
    return tiny_config(
        model={"num_layers": 4, "hidden_size": 256},
        data={"sequence_length": length},
        batch={"global_batch_size": batch, "micro_batch_size": micro},
        **sections,
    )


def build_engine_in(
    config: RunConfig, groups: ProcessGroups
) -> tuple[TrainingEngine, list[Microbatch]]:
    stages = build_stages(config, VOCAB, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    return TrainingEngine(config, stages, groups), random_microbatches(config, groups, 0)


def fastest_steps(configs: list[RunConfig], clock: str) -> list[float]:
    """Seconds of each config's fastest step. They take turns, so that what else the machine does
    slows them alike."""
    process = Process.from_environment()
    groups = process_groups.start(configs[0], process, Layout.of(configs[0], process.world_size))
    trainers = [build_engine_in(config, groups) for config in configs]
    read = getattr(time, clock)
    seconds: list[list[float]] = [[] for _ in configs]
    for step in range(ROUNDS):
        for one, (engine, batch) in zip(seconds, trainers, strict=True):
            start = read()
            engine.train_step(batch, 1e-4)
            if step:  # the first warms up
                one.append(read() - start)
    return [min(one) for one in seconds]


def ratio(first: RunConfig, second: RunConfig, world_size: int, clock: str) -> tuple[float, float]:
    """Of the second's time to the first's: measured, and predicted."""
    machine = Machine(measured_cpu(world_size), world_size)
    ranks = run_distributed(fastest_steps, world_size, [first, second], clock)
    measured = [max(times) for times in zip(*ranks, strict=True)]
    predicted = [
        step_time(config, Layout.of(config, world_size), VOCAB, machine).total
        for config in (first, second)
    ]
    return measured[1] / measured[0], predicted[1] / predicted[0]


def test_more_microbatches_fill_the_pipeline() -> None:
    """Four times the work in three times the time: (8 + 1) / (2 + 1). Without a bubble it
    would be four."""
    pipeline = {"pipeline": 2}
    few = timed_config(128, 4, 2, parallel=pipeline)
    many = timed_config(128, 16, 2, parallel=pipeline)
    measured, predicted = ratio(few, many, 2, "perf_counter")
    assert 2.6 < predicted < 3.2
    assert measured == pytest.approx(predicted, rel=0.3)


def test_twice_the_length_at_as_many_tokens() -> None:
    """Little slower: only attention grows."""
    short, long = timed_config(128, 8, 4), timed_config(256, 4, 2)
    measured, predicted = ratio(short, long, 1, "process_time")
    assert 1.0 < predicted < 1.3
    assert measured == pytest.approx(predicted, rel=0.15)
