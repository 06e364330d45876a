"""``python -m launch.supervisor RUN/slurm/job.json``: all that a batch script does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from launch.hostlist import expand
from launch.supervisor.comeback import Allocation
from launch.supervisor.job import Job
from launch.supervisor.supervisor import Supervisor


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    job_id = os.environ["SLURM_JOB_ID"]
    allocation = Allocation(
        job_id=job_id,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(expand(os.environ["SLURM_JOB_NODELIST"])),
        log_start=_size(job.log_dir / f"slurm-{job_id}.log"),
        times=_times(),
    )
    sys.exit(asyncio.run(Supervisor(job, allocation).run()))


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
