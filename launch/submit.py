"""``python -m launch slurm``: from a config to a job in the queue. On a login node: no torch."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from distributed_lm.errors import ConfigError, UserError
from launch.environment import environment_without_slurm
from launch.plan import ROOT, Submission
from launch.queue import queued
from launch.supervisor.job import Job, write_whole
from launch.supervisor.journal import CANCELLED, Journal, job_ids, newest_step, read_journal

PACKAGES = ("distributed_lm", "launch", "slurm")
SBATCH_SECONDS = 60


class SubmitError(UserError):
    """Slurm did not take the job."""

    exit_code = 1


def submit(submission: Submission) -> str:
    """Copy the code and the config, write job and script, and submit.

    Returns:
        The job id.

    Raises:
        SubmitError: with what sbatch said.
    """
    job = submission.job
    check_not_queued([job])
    write_files(job, submission.config.to_yaml())
    write_whole(submission.script_path, submission.script)
    submitted = [sbatch(job.sbatch) for _ in range(1 + submission.chain)]
    record_jobs(job, submitted)
    return submitted[0]


def write_files(job: Job, config: str | None) -> None:
    """What the supervisor and the ranks read: code, config, job.

    Args:
        config: YAML for ``job.slurm_dir``; None = leave what is there.
    """
    _copy_code(Path(job.code))
    job.log_dir.mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_whole(job.slurm_dir / "config.yaml", config)
    job.write()
    (job.slurm_dir / CANCELLED).unlink(missing_ok=True)
    # Before the job can start: from here on the journal counts anew whether the run is finished,
    # and restarts without progress.
    journal = Journal(job.slurm_dir, job=None, restart=0)
    journal.record("launch", f"of {job.code_hash}", step=newest_step(Path(job.run_dir)))


def record_jobs(job: Job, submitted: list[str]) -> None:
    """For ``status`` and ``cancel``: the jobs may still wait in the queue."""
    journal = Journal(job.slurm_dir, job=submitted[0], restart=0)
    journal.record("submitted", f"job {', '.join(submitted)}", jobs=submitted)


def test_only(submission: Submission) -> str | None:
    """What ``sbatch --test-only`` says to the script; None where there is no sbatch."""
    if shutil.which("sbatch") is None:
        return None
    try:
        asked = subprocess.run(
            ["sbatch", "--test-only"], input=submission.script, capture_output=True, text=True,
            check=False, timeout=SBATCH_SECONDS, env=environment_without_slurm(), cwd="/",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {SBATCH_SECONDS} s"
    return "; ".join((asked.stderr.strip() or asked.stdout.strip()).splitlines())


def check_not_queued(jobs: Sequence[Job]) -> None:
    """Raises ConfigError if an earlier launch of one of them is still in the queue."""
    known = {job.slurm_dir: job_ids(read_journal(job.slurm_dir)) for job in jobs}
    active = queued(one for ids in known.values() for one in ids) or []
    for job in jobs:
        for found in active:
            if found.is_one_of(known[job.slurm_dir]):
                raise ConfigError(
                    f"{job.run_dir}: job {found.id} {found.state} already works on this run; wait "
                    f"for it, or cancel it with: python -m launch cancel {job.run_dir}"
                )


def _copy_code(folder: Path) -> None:
    """What is submitted is what runs, whatever is edited meanwhile."""
    if folder.exists():
        return
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.{time.time_ns()}")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, draft / package, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    try:
        draft.rename(folder)
    except OSError:
        shutil.rmtree(draft)
        if not folder.is_dir():
            raise
        # Somebody else was quicker; the folder's name says that it is the same code.


def sbatch(arguments: list[str]) -> str:
    """Submit; returns the job id."""
    try:
        asked = subprocess.run(
            ["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False,
            timeout=SBATCH_SECONDS, env=environment_without_slurm(),
        )  # fmt: skip
    except FileNotFoundError:
        raise SubmitError("sbatch is not here; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SubmitError(f"sbatch did not answer within {SBATCH_SECONDS} s") from None
    if asked.returncode != 0:
        said = (asked.stderr.strip() or asked.stdout.strip()).splitlines()
        raise SubmitError(f"sbatch said: {'; '.join(said)}")
    return asked.stdout.strip().split(";")[0]


def describe(submission: Submission) -> str:
    """The script and what the supervisor is told, for ``--dry-run``."""
    job = "\n".join(f"{k}: {v}" for k, v in dataclasses.asdict(submission.job).items())
    return f"{submission.script}\n# {submission.job.slurm_dir}/job.json\n{job}"
