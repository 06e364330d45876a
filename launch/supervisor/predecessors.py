"""What a job waits for: other jobs' work, which must be finished before its own can begin.

Slurm starts it when those jobs have ended, however they ended (``--dependency=afterany``). Whether
their work is finished, goes on in other jobs or has come to nothing, their journals say, and the
queue: a run outlives its jobs.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.queue import queued
from launch.supervisor.comeback import ComeBack, resubmit
from launch.supervisor.job import Job
from launch.supervisor.journal import CANCELLED, is_finished, job_ids, read_journal

# What a journal written on another node gets to be seen here.
LATE_SECONDS, LOOK_SECONDS = 6.0, 2.0


@dataclass(frozen=True)
class Unfinished:
    """Work that this job needs and that is not finished."""

    message: str
    jobs: tuple[str, ...] = ()
    """In which it goes on; none = it does not go on."""


def find_unfinished(folders: Sequence[str]) -> Unfinished | None:
    """Look at the journals in ``folders`` (``RUN/slurm`` or ``RUN/slurm/PART``).

    Returns:
        None if all is finished. What does not go on comes before what does.
    """
    going: list[Unfinished] = []
    for folder in map(Path, folders):
        found = _look(folder)
        if found is None:
            continue
        if not found.jobs:
            return found
        going.append(found)
    if not going:
        return None
    jobs = tuple(sorted({job for one in going for job in one.jobs}))
    more = f" (and {len(going) - 1} more)" if len(going) > 1 else ""
    return Unfinished(f"{going[0].message}{more}", jobs)


def _look(folder: Path) -> Unfinished | None:
    until = time.monotonic() + LATE_SECONDS
    while True:
        events = read_journal(folder)
        if is_finished(events):
            return None
        jobs = _jobs_that_go_on(folder, events)
        if jobs:
            return Unfinished(f"{title(folder)} goes on in job {', '.join(jobs)}", jobs)
        if _has_ended(folder, events) or time.monotonic() > until:
            return Unfinished(
                f"{title(folder)} ended without being finished ({_last_word(folder, events)}), and "
                "this needs it; launch both again when that is mended"
            )
        time.sleep(LOOK_SECONDS)


def _jobs_that_go_on(folder: Path, events: list[dict[str, Any]]) -> tuple[str, ...]:
    if (folder / CANCELLED).exists():
        return ()
    found = queued(job_ids(events))
    if found is not None:
        return tuple(job.id for job in found)
    # Where nobody can be asked: what the work's last supervisor has said.
    last = _last_leave(events)
    if last is None or not last.get("goes_on"):
        return ()
    return tuple(last.get("jobs") or [last["job"]])


def _has_ended(folder: Path, events: list[dict[str, Any]]) -> bool:
    """Whether the journal itself says so, and not the queue alone."""
    last = _last_leave(events)
    return (folder / CANCELLED).exists() or (last is not None and not last.get("goes_on"))


def _last_leave(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest event with which a supervisor gave the work up or out of its hands, if no other
    has begun since."""
    for event in reversed(events):
        if event["event"] in ("leave", "mistake", "loop"):
            return event
        if event["event"] in ("life", "launch"):
            return None
    return None


def _last_word(folder: Path, events: list[dict[str, Any]]) -> str:
    if (folder / CANCELLED).exists():
        return "it was cancelled"
    last = _last_leave(events) or (events[-1] if events else None)
    if last is None:
        return "it has no journal"
    return f"{last['event']}: {last['message']}".splitlines()[0]


def title(folder: Path) -> str:
    """``RUN``, or ``RUN's PART``, from where its journal is."""
    if folder.name == "slurm":
        return str(folder.parent)
    return f"{folder.parent.parent}'s {folder.name}"


def come_back_after(job: Job, jobs: Sequence[str]) -> ComeBack:
    """Have this job run again when ``jobs`` have ended."""
    dependency = f"--dependency=afterany:{':'.join(jobs)}"
    if shutil.which("sbatch"):
        return resubmit(job, dependency)
    command = shlex.join(["sbatch", dependency, *job.sbatch])
    return ComeBack(False, f"this node has no sbatch; type on a login node: {command}")
