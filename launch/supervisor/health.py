"""Before training: does every node of the allocation work, and do they work together?

One task per node (``launch.health``) reports to the coordinator; those that are well then reduce a
tensor together. If that fails they do it in pairs, with new partners each time: a node that fails
with every partner, while others do not, is the one at fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.supervisor.coordinator import Coordinator
from launch.supervisor.job import Job
from launch.supervisor.step import Step, srun_command, task_environment, whole_node_options

REPORT_SECONDS = 120.0
"""For a node to come up, import torch and compute."""
REDUCE_SECONDS, PAIR_SECONDS = 30.0, 15.0
"""For all nodes together, and for two of them, to reduce a tensor."""
ANSWER_SECONDS = 10.0
"""Beyond that, for the answer."""
MAX_ROUNDS = 3
"""Of pairs."""
CLOCK_SKEW_SECONDS = 5.0
WAITING = -1.0
SAME_EVERYWHERE = ("code", "python", "torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class Verdict:
    """What came out of an examination."""

    problems: dict[str, str | None]
    """By node; None for a node that is well."""
    summary: str
    gigabytes_per_second: float | None = None
    """Of an all-reduce between the nodes; None if there was none, or it failed."""


@dataclass(frozen=True)
class Round:
    """What came out of one examination, with one all-reduce per group of nodes."""

    problems: dict[str, str | None]
    """Of each node by itself."""
    speeds: dict[tuple[str, ...], float | None]
    """Gigabytes per second by group, without the nodes that have a problem; None if it failed."""
    complaints: dict[str, str]
    """By node, what it said of an all-reduce that failed."""


async def examine(job: Job, coordinator: Coordinator, port: int, nodes: list[str]) -> Verdict:
    """Examine ``nodes``, each with an srun of its own: a dead one must not fail the others."""
    first = await _round(job, coordinator, port, nodes, [tuple(nodes)], REDUCE_SECONDS)
    problems = dict(first.problems)
    together, speed = "", next(iter(first.speeds.values()), None)
    if speed is not None:
        together = f", all-reduce {speed:.2f} GB/s"
    elif first.speeds:
        well = [node for node in nodes if problems[node] is None]
        problems.update(await _culprits(job, coordinator, port, well, first.complaints))
        together = "; the all-reduce between them failed"
        if all(problems[node] is None for node in well):
            together += ", though each can do one with another"
    healthy = sum(problem is None for problem in problems.values())
    return Verdict(problems, f"{healthy} of {len(nodes)} nodes are well{together}", speed)


async def _culprits(
    job: Job, coordinator: Coordinator, port: int, nodes: list[str], complaints: dict[str, str]
) -> dict[str, str]:
    """Nodes that can reduce a tensor with no other, each with what is wrong."""
    complaints = dict(complaints)
    suspects = list(nodes)
    for number in range(min(MAX_ROUNDS, len(nodes) - 1 + len(nodes) % 2)):
        done = await _round(job, coordinator, port, nodes, pairs(nodes, number), PAIR_SECONDS)
        complaints.update(done.complaints)
        worked = {node for pair, speed in done.speeds.items() if speed is not None for node in pair}
        suspects = [node for node in suspects if node not in worked]
        if len(suspects) <= 1:
            break
    return {
        node: f"no all-reduce with another node works ({complaints.get(node, 'no answer')})"
        for node in suspects
    }


def pairs(nodes: Sequence[str], number: int) -> list[tuple[str, ...]]:
    """Of round ``number`` in which each node meets another partner: the circle method."""
    ring = [*nodes, *([""] if len(nodes) % 2 else [])]
    turn = number % (len(ring) - 1)
    ring = [ring[0], *ring[1 + turn :], *ring[1 : 1 + turn]]
    both = [(ring[seat], ring[-1 - seat]) for seat in range(len(ring) // 2)]
    return [(one, other) for one, other in both if one and other]


async def _round(
    job: Job,
    coordinator: Coordinator,
    port: int,
    nodes: list[str],
    groups: list[tuple[str, ...]],
    seconds: float,
) -> Round:
    token = coordinator.open(len(nodes), 0)
    steps = []
    options = whole_node_options(job.srun_options)
    for rank, node in enumerate(nodes):
        environment = task_environment(job, port, token, nodes)
        environment["DISTRIBUTED_LM_HEALTH_RANK"] = str(rank)
        command = srun_command(
            dataclasses.replace(job, srun_options=options), [node], 1,
            str(job.log_dir / f"health_{node}.log"), "launch.health", job.run_dir,
            str(job.devices_per_node), str(job.minimum_disk_bytes),
        )  # fmt: skip
        steps.append(await Step.start(command, environment, job.log_dir, 0))
    problems = await _local_problems(job, coordinator, nodes, steps)
    well = [tuple(node for node in group if problems[node] is None) for group in groups]
    speeds = await _meet(coordinator, nodes, [group for group in well if len(group) > 1], seconds)
    complaints = {
        node: report["meeting"]
        for rank, node in enumerate(nodes)
        if "meeting" in (report := _report(coordinator, rank) or {})
    }
    await asyncio.gather(*(_dismiss(step) for step in steps))
    return Round(problems, speeds, complaints)


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
    coordinator: Coordinator, nodes: list[str], groups: list[tuple[str, ...]], seconds: float
) -> dict[tuple[str, ...], float | None]:
    """Have each group of nodes reduce a tensor; the bandwidths in gigabytes per second."""
    ranks = {group: [nodes.index(node) for node in group] for group in groups}
    for members in ranks.values():
        await coordinator.introduce(members, seconds)
    until = time.monotonic() + seconds + ANSWER_SECONDS
    speeds: dict[tuple[str, ...], float | None] = {}
    while len(speeds) < len(groups) and time.monotonic() < until:
        await asyncio.sleep(0.05)
        for group in groups:
            told = [_told(coordinator, rank) for rank in ranks[group]]
            if not all(told):  # one has failed: the others wait for it
                speeds[group] = None
            elif WAITING not in told:
                speeds[group] = statistics.median(told)
    return {group: speeds.get(group) for group in groups}


def _told(coordinator: Coordinator, rank: int) -> float:
    """The bandwidth that a node has measured, ``WAITING`` or 0 if its all-reduce failed."""
    report = _report(coordinator, rank) or {}
    if "meeting" in report:
        return 0.0
    if "gigabytes_per_second" in report:
        return float(report["gigabytes_per_second"])
    return 0.0 if coordinator.members[rank].gone else WAITING


async def _dismiss(step: Step) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(step.wait(), 2.0)
        return
    await step.end()
