"""``distributed-lm rehearse``: build every rank of a run on this machine, and compare them."""

import multiprocessing
import os
import random
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from rich.console import Console
from rich.progress import track

from distributed_lm.config import RunConfig
from distributed_lm.errors import UserError
from distributed_lm.layout import Layout
from distributed_lm.planner.devices import load_node_shape
from distributed_lm.planner.memory import rank_memory
from distributed_lm.rehearsal import checks, ownership, worker
from distributed_lm.rehearsal.checks import Check, Expected
from distributed_lm.rehearsal.report import Rehearsal, print_report
from distributed_lm.rehearsal.views import RankView, Script

# Ranks of a sample: seconds of work, unless a single replica of the model is larger.
SAMPLE = 48

CHECKS: dict[str, Check] = {
    "process groups": checks.check_groups,
    "layers": checks.check_layers,
    "parameters": checks.check_parameters,
    "weights": ownership.check_weights,
    "slopes": checks.check_slopes,
    "sequences": checks.check_samples,
    "checkpoint": ownership.check_checkpoint,
    "memory": checks.check_memory,
}
"""Shown in this order."""


class RehearsalError(UserError):
    """The ranks of the run do not fit together, or could not be built here."""

    exit_code = 1


def rehearse(config: RunConfig, world_size: int, whole: bool, cluster: str | None) -> None:
    """Build ranks of a run as training would, compare them, and print what came out.

    Args:
        whole: every rank, instead of a sample.
        cluster: file in ``configs/clusters`` that says what memory a device has.

    Raises:
        RehearsalError: if something does not fit together; the problems have been printed.
        ConfigError: if the config does not fit the world size, or the cluster file is wrong.
    """
    memory_gb = load_node_shape(cluster).device_memory_gb if cluster is not None else None
    layout = Layout.of(config, world_size)  # before the engines are loaded
    ranks = list(range(world_size)) if whole else sample_ranks(layout, config.seed)
    try:
        conclude(_run(config, ranks, memory_gb))
    except BrokenProcessPool:
        raise RehearsalError(
            "a process of the rehearsal died, perhaps for lack of memory; try --ranks sample"
        ) from None


def conclude(rehearsal: Rehearsal) -> None:
    """Print what was found.

    Raises:
        RehearsalError: if that is a problem.
    """
    print_report(rehearsal)
    found, script = sum(map(len, rehearsal.problems.values())), rehearsal.script
    if found:
        raise RehearsalError(
            f"{script.config.name} on {script.layout.describe()} does not fit together "
            f"({found:,} problem{'s' * (found > 1)}, above): training would be wrong"
        )


def sample_ranks(layout: Layout, seed: int) -> list[int]:
    """Whole replicas of the model: the first and last data-parallel one and some drawn between, as
    many as make ``SAMPLE`` ranks, but at least one."""
    replicas: dict[int, list[int]] = defaultdict(list)
    for rank in range(layout.world_size):
        replicas[layout.coordinates(rank).data].append(rank)
    between = list(replicas)[1:-1]
    random.Random(seed).shuffle(between)
    order = list(dict.fromkeys([0, layout.data - 1, *between]))
    count = max(1, SAMPLE // (layout.tensor * layout.pipeline))
    return sorted(rank for data in order[:count] for rank in replicas[data])


def find_problems(views: list[RankView], expected: Expected) -> dict[str, list[str]]:
    """What each of ``CHECKS`` says of these ranks."""
    return {name: list(check(views, expected)) for name, check in CHECKS.items()}


def expectations(script: Script, device_memory_gb: float | None = None) -> Expected:
    config = script.config
    return Expected(
        layout=script.layout,
        model=config.model,
        vocab_size=script.vocab_size,
        global_batch_size=config.batch.global_batch_size,
        sequences_per_block=config.data.block_size // config.data.sequence_length,
        moments=script.moments,
        memory=tuple(
            rank_memory(config, script.layout, script.vocab_size, stage)
            for stage in range(script.layout.pipeline)
        ),
        device_memory_gb=device_memory_gb,
    )


def _run(config: RunConfig, ranks: list[int], device_memory_gb: float | None) -> Rehearsal:
    started = time.perf_counter()
    world_size = ranks[-1] + 1
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distributed_lm.rehearsal.preload"])
    processes = min(len(os.sched_getaffinity(0)), len(ranks))
    with ProcessPoolExecutor(processes, context, worker.begin) as pool:
        script = pool.submit(worker.prepare, config, world_size).result()
        built = pool.map(partial(worker.build, script), ranks, chunksize=4)
        console = Console(stderr=True)
        outcomes = list(
            track(built, "building ranks", len(ranks), console=console, transient=True,
                  disable=not console.is_terminal)
        )  # fmt: skip
    views = [outcome for outcome in outcomes if isinstance(outcome, RankView)]
    unbuilt = [outcome for outcome in outcomes if isinstance(outcome, str)]
    expected = expectations(script, device_memory_gb)
    problems = {"building": unbuilt, **find_problems(views, expected)}
    return Rehearsal(
        script=script,
        views=views,
        problems=problems,
        memory=expected.memory,
        device_memory_gb=device_memory_gb,
        processes=processes,
        seconds=time.perf_counter() - started,
    )
