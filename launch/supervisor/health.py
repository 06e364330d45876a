"""Before training: does every node of the allocation work, and do they work together?

One task per node (``launch.health``) reports to the coordinator; those that are well then reduce a
tensor together.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from launch.supervisor.coordinator import Coordinator
from launch.supervisor.job import Job
from launch.supervisor.step import Step, srun_command, task_environment

REPORT_SECONDS = 120.0
"""For a node to come up, import torch and compute."""
MEET_SECONDS = 60.0
CLOCK_SKEW_SECONDS = 5.0
SAME_EVERYWHERE = ("code", "python", "torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class Verdict:
    """What came out of an examination."""

    problems: dict[str, str | None]
    """By node; None for a node that is well."""
    summary: str
    gigabytes_per_second: float | None = None
    """Of an all-reduce between the nodes; None if there was none, or it failed."""


async def examine(job: Job, coordinator: Coordinator, port: int, nodes: list[str]) -> Verdict:
    """Examine ``nodes``, each with an srun of its own: a dead one must not fail the others."""
    token = coordinator.open(len(nodes), 0)
    steps = []
    for rank, node in enumerate(nodes):
        environment = task_environment(job, port, token, nodes)
        environment["DISTRIBUTED_LM_HEALTH_RANK"] = str(rank)
        command = srun_command(
            job, [node], 1, str(job.log_dir / f"health_{node}.log"), "launch.health",
            job.run_dir, str(job.devices_per_node), str(job.minimum_disk_bytes),
        )  # fmt: skip
        steps.append(await Step.start(command, environment, job.log_dir, 0))
    problems = await _local_problems(job, coordinator, nodes, steps)
    together, speed = "", None
    well = [rank for rank, node in enumerate(nodes) if problems[node] is None]
    if len(well) > 1:
        together, speed = await _meet(coordinator, well, nodes, problems)
    await asyncio.gather(*(_dismiss(step) for step in steps))
    healthy = sum(problem is None for problem in problems.values())
    return Verdict(problems, f"{healthy} of {len(nodes)} nodes are well{together}", speed)


async def _local_problems(
    job: Job, coordinator: Coordinator, nodes: list[str], steps: list[Step]
) -> dict[str, str | None]:
    """What is wrong with each node by itself, and with its software beside the others'."""
    ends = [asyncio.ensure_future(step.wait()) for step in steps]
    until = time.monotonic() + REPORT_SECONDS
    while time.monotonic() < until:
        missing = [rank for rank in range(len(nodes)) if _report(coordinator, rank) is None]
        if all(ends[rank].done() for rank in missing):
            break
        await asyncio.sleep(0.05)
    reports = {node: _report(coordinator, rank) for rank, node in enumerate(nodes)}
    heard = [report for report in reports.values() if report]
    common = _most_common(job, heard)
    # The first node's own clock may be the wrong one.
    clock = statistics.median(report["clock_skew_seconds"] for report in heard) if heard else 0.0
    problems: dict[str, str | None] = {}
    for node, report in reports.items():
        if report is None:
            problems[node] = f"no report within {REPORT_SECONDS:.0f} s"
        else:
            problems[node] = report.get("problem") or _difference(report, common, clock)
    return problems


def _report(coordinator: Coordinator, rank: int) -> dict[str, Any] | None:
    member = coordinator.members.get(rank)
    return member.report if member is not None else None


def _most_common(job: Job, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What most nodes have; of the code, what was submitted."""
    common = {
        key: Counter(report[key] for report in reports).most_common(1)[0][0]
        for key in SAME_EVERYWHERE
        if reports and all(key in report for report in reports)
    }
    return {**common, "code": job.code_hash}


def _difference(report: dict[str, Any], common: dict[str, Any], clock: float) -> str | None:
    for key, expected in common.items():
        if report.get(key) != expected:
            return f"{key} is {report.get(key)} here, {expected} on the other nodes"
    skew = report["clock_skew_seconds"] - clock
    if abs(skew) > CLOCK_SKEW_SECONDS:
        return f"its clock is {skew:+.1f} s off that of the other nodes"
    return None


async def _meet(
    coordinator: Coordinator, well: list[int], nodes: list[str], problems: dict[str, str | None]
) -> tuple[str, float | None]:
    """Have the nodes that are well reduce a tensor together. Returns what to say about it, and the
    bandwidth in gigabytes per second."""
    await coordinator.introduce(well)
    until = time.monotonic() + MEET_SECONDS
    waiting = list(well)
    while waiting and time.monotonic() < until:
        waiting = [
            rank for rank in waiting if "gigabytes_per_second" not in _now(coordinator, rank)
        ]
        if any(coordinator.members[rank].gone for rank in waiting):
            break
        await asyncio.sleep(0.05)
    failed = {rank: _now(coordinator, rank).get("meeting") for rank in well}
    for rank in waiting:
        problems[nodes[rank]] = failed[rank] or "did not finish an all-reduce with the other nodes"
    if waiting:
        return f"; the all-reduce between them failed on {len(waiting)}", None
    speed = statistics.median(_now(coordinator, rank)["gigabytes_per_second"] for rank in well)
    return f", all-reduce {speed:.2f} GB/s", speed


def _now(coordinator: Coordinator, rank: int) -> dict[str, Any]:
    return _report(coordinator, rank) or {}


async def _dismiss(step: Step) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(step.wait(), 2.0)
        return
    await step.end()
