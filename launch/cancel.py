"""``python -m launch cancel``: a run with all its parts, or all stages of a graph."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from distributed_lm.errors import ConfigError, UserError
from launch.environment import environment_without_slurm
from launch.queue import queued
from launch.supervisor.job import write_whole
from launch.supervisor.journal import CANCELLED, JOURNAL, is_finished, job_ids, read_journal

SCANCEL_SECONDS = 60
# The list of a stage's jobs, in the folder of its array.
JOB_LIST = "jobs.json"


class CancelError(UserError):
    """Slurm did not cancel what it was asked to."""

    exit_code = 1


def cancel(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|FOLDER", help="Run folder, or folder of the stages.")
    ],
) -> None:
    """Cancel all jobs of a run, its evaluations included, or of a study; none comes back."""
    journals = {path: read_journal(path) for path in _journal_folders(folder)}
    known = {path: job_ids(events) for path, events in journals.items()}
    if not any(known.values()):
        raise ConfigError(
            f"{folder}: no job was submitted for this run; give the folder of a run, or of stages"
        )
    if shutil.which("scancel") is None:
        raise ConfigError("scancel is not here; run this on a login node of the cluster")
    # First: whatever of it still runs must not have itself queued again.
    unfinished = {path: known[path] for path in known if not is_finished(journals[path])}
    for path in unfinished:
        write_whole(path / CANCELLED, "by python -m launch cancel\n")
    jobs = _in_queue(known.values())
    if not jobs:
        typer.echo(f"{folder}: no job of it is in the queue")
        return
    problem = scancel(jobs)
    if problem is not None:
        raise CancelError(f"scancel said: {problem}; {_take_back(unfinished)}")
    typer.echo(f"cancelled job {', '.join(jobs)}; to go on later, launch again")


def _journal_folders(folder: Path) -> list[Path]:
    """Of a run or a plain command: its own and its parts'. Of stages: those of all their jobs."""
    found = {path.parent for path in folder.glob(f"slurm/{JOURNAL}")}
    found |= {path.parent for path in folder.glob(f"slurm/*/{JOURNAL}")}
    for path in folder.glob(f"*/{JOB_LIST}"):
        found |= {Path(job).parent for job in json.loads(path.read_text(encoding="utf-8"))}
    return sorted(found)


def _in_queue(known: Iterable[Sequence[str]]) -> list[str]:
    """Jobs to cancel; all, where nobody can be asked which of them still wait or run."""
    jobs = sorted({job for ids in known for job in ids})
    active = queued(jobs)
    return jobs if active is None else [job.id for job in active]


def scancel(jobs: Sequence[str]) -> str | None:
    """Returns what it had to say if it failed."""
    if not jobs:
        return None
    try:
        asked = subprocess.run(
            ["scancel", *jobs], capture_output=True, text=True, check=False,
            timeout=SCANCEL_SECONDS, env=environment_without_slurm(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"nothing within {SCANCEL_SECONDS} s"
    if asked.returncode == 0:
        return None
    said = " ".join((asked.stderr or asked.stdout).split())
    return said or f"nothing, with exit code {asked.returncode}"


def _take_back(unfinished: Mapping[Path, Sequence[str]]) -> str:
    """What is still in the queue was not cancelled, and must not be found to be at its next stop.

    Returns:
        What the user should know.
    """
    jobs = {job for ids in unfinished.values() for job in ids}
    active = queued(jobs)
    going = [job for job in active or [] if job.state != "COMPLETING"]
    for path, ids in unfinished.items():
        if active is None or any(job.is_one_of(ids) for job in going):
            (path / CANCELLED).unlink(missing_ok=True)
    if active is None:
        return "and squeue does not say what is left; try again"
    if not going:
        return "but no job of it is in the queue any more"
    return f"job {', '.join(job.id for job in going)} goes on; try again"
