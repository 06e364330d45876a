"""One life of a job, as Slurm's environment says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

from launch.hostlist import expand
from launch.supervisor.comeback import Allocation
from launch.supervisor.job import Job
from launch.supervisor.supervisor import Supervisor
from launch.task import job_id


def live(job_file: str, early_signals: list[str]) -> int:
    """Returns the exit code of the batch script.

    Args:
        early_signals: names of those that have come already; more may be added until the supervisor
            listens itself.
    """
    job = _job(Path(job_file))
    number = int(os.environ["SLURM_JOB_ID"])
    size = _size(job.batch_log(number))
    allocation = Allocation(
        job_id=job_id(),
        number=number,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(expand(os.environ["SLURM_JOB_NODELIST"])),
        # Slurm says why it sends SIGTERM before it does.
        log_start=0 if "SIGTERM" in early_signals else size,
        times=_times(),
    )
    return asyncio.run(_supervise(job, allocation, early_signals))


async def _supervise(job: Job, allocation: Allocation, early_signals: list[str]) -> int:
    """Made inside the loop, to which Python 3.9 binds queues and events when they are made."""
    return await Supervisor(job, allocation, early_signals).run()


def _job(path: Path) -> Job:
    """From a job file, or the one that a list of them has for this task of a job array."""
    paths = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(paths, list):
        path = Path(paths[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    return Job.read(path)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _times() -> dict[str, float]:
    known = {}
    for name, variable in (
        ("submitted", "SLURM_JOB_SUBMIT_TIME"),
        ("began", "SLURM_JOB_START_TIME"),
    ):
        with contextlib.suppress(KeyError, ValueError):
            known[name] = float(os.environ[variable])
    return known
