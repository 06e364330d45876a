"""``python -m launch.supervisor JOB_FILE``: all that a batch script does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from launch.hostlist import expand
from launch.supervisor.comeback import Allocation
from launch.supervisor.job import Job
from launch.supervisor.supervisor import Supervisor
from launch.task import job_id


def main() -> None:
    job = _job(Path(sys.argv[1]))
    number = int(os.environ["SLURM_JOB_ID"])
    allocation = Allocation(
        job_id=job_id(),
        number=number,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(expand(os.environ["SLURM_JOB_NODELIST"])),
        log_start=_size(job.batch_log(number)),
        times=_times(),
    )
    sys.exit(asyncio.run(_supervise(job, allocation)))


async def _supervise(job: Job, allocation: Allocation) -> int:
    """Made inside the loop, to which Python 3.9 binds queues and events when they are made."""
    return await Supervisor(job, allocation).run()


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


if __name__ == "__main__":
    main()
