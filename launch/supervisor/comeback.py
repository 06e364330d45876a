"""How a job that must end before its run is finished comes back, and when it must not."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field

from launch.environment import environment_without_slurm
from launch.queue import queued
from launch.supervisor.job import Job, write_whole
from launch.supervisor.journal import CANCELLED, read_journal, waiting_jobs

COMMAND_SECONDS = 60.0
# sbatch, when what is left of the partition cannot hold the job.
TOO_FEW_NODES = "node configuration is not available"
ENDING = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+( DUE TO [A-Z ]+)? \*\*\*")


@dataclass(frozen=True)
class Allocation:
    """This job, as Slurm's environment says."""

    job_id: str
    """As Slurm's commands take it; in an array ``ARRAY_INDEX``. The plain number of its last task
    means the whole array, all of which ``scontrol requeue`` would start again."""
    number: int
    """As in the name of its log."""
    restart: int
    nodes: tuple[str, ...]
    log_start: int = 0
    """Where this life's part of the job's log begins, in bytes."""
    times: dict[str, float] = field(default_factory=dict)
    """When it was submitted and when it began, in seconds since the epoch, as far as known."""


def was_cancelled(job: Job, allocation: Allocation) -> bool:
    """Whether a user has cancelled the job: with ``launch cancel``, or with ``scancel``."""
    marker = job.slurm_dir / CANCELLED
    if not marker.exists() and slurms_reason(job, allocation) == "scancel":
        write_whole(marker, "by scancel\n")  # the chain's next job must see it, too
    return marker.exists()


def slurms_reason(job: Job, allocation: Allocation) -> str | None:
    """Why Slurm ends the job, if it does: ``preemption``, ``time limit`` …, or ``scancel``.

    Its state is only COMPLETING until the end, whatever the reason, but slurmstepd writes into
    the job's own log: ``*** JOB 13 ON node1 CANCELLED AT 2026-11-22T16:52:00 DUE TO PREEMPTION``.
    """
    try:
        content = job.batch_log(allocation.number).read_bytes()[allocation.log_start :]
    except OSError:
        return None
    said = ENDING.findall(content.decode(errors="replace"))
    if not said:
        return None
    return said[-1].strip().lower().removeprefix("due to ") or "scancel"


def requeues_by_itself(job: Job, allocation: Allocation) -> bool:
    """Whether Slurm has put the job, which it preempts, back into the queue.

    Of a job that it has killed instead it notes when; where it cannot be asked the cluster file
    says.
    """
    record = _job_record(allocation)
    if record is None:
        return job.preemption_requeues
    return record.get("PreemptTime", "None") == "None"


def _job_record(allocation: Allocation) -> dict[str, str] | None:
    """What ``scontrol show job`` says; None where it does not answer."""
    if shutil.which("scontrol") is None:
        return None
    shown = _run(["scontrol", "--oneliner", "show", "job", allocation.job_id])
    if shown is None or shown.returncode != 0:
        return None
    return dict(word.partition("=")[::2] for word in shown.stdout.split())


@dataclass(frozen=True)
class ComeBack:
    """How the run goes on in another job, or that it does not."""

    works: bool
    message: str
    job: str | None = None
    """Id of a job that was submitted for it."""
    is_requeued: bool = False
    """Whether Slurm is about to end this very job."""
    may_work_later: bool = False
    """Whether it is worth asking again: the controller may be away."""


def come_back(job: Job, allocation: Allocation, excluded: list[str]) -> ComeBack:
    """Have Slurm run this job again, on other nodes than ``excluded``."""
    chain = chains_next(job, allocation)
    # The links of a chain of arrays wait for one another by number, not for a job that is submitted
    # now: two would work on the run at once. The next link examines its nodes itself.
    is_array = any(option.startswith("--array=") for option in job.sbatch)
    if chain is not None and (not excluded or is_array):
        return chain
    if not excluded and shutil.which("scontrol"):
        asked = _run(["scontrol", "requeue", allocation.job_id])
        if asked is not None and asked.returncode == 0:
            return ComeBack(True, f"requeued job {allocation.job_id}", is_requeued=True)
    if shutil.which("sbatch"):
        options = [f"--exclude={','.join(excluded)}"] if excluded else []
        way = resubmit(job, *options)
        if excluded and not way.works and TOO_FEW_NODES in way.message:
            return resubmit(job)  # with the sick nodes, which may be well by then
        return way
    if chain is not None:
        return chain
    last = ", this was the last job of its chain," if job.is_chained else ""
    return ComeBack(
        False,
        f"cannot come back:{last} this node has neither scontrol nor sbatch; launch the run again, "
        "with --chain",
    )


def chains_next(job: Job, allocation: Allocation) -> ComeBack | None:
    """The job of a chain that goes on after this one; None if there is none."""
    if not job.is_chained:
        return None
    waiting = waiting_jobs(read_journal(job.slurm_dir), allocation.job_id)
    if waiting is None:
        return ComeBack(True, "the next job of the chain goes on, if there is one left")
    found = queued(waiting)
    if found is not None:  # a user may have cancelled some
        waiting = [job_id for job_id in waiting if any(one.is_one_of([job_id]) for one in found)]
    return ComeBack(True, f"job {waiting[0]} of the chain goes on") if waiting else None


def succeed(job: Job, allocation: Allocation) -> ComeBack:
    """Submit the job that goes on when this one has ended, however it ends."""
    return resubmit(job, f"--dependency=afterany:{allocation.job_id}")


def resubmit(job: Job, *options: str) -> ComeBack:
    """Submit this job once more."""
    if shutil.which("sbatch") is None:
        return ComeBack(False, "cannot come back: this node has no sbatch")
    submitted = _run(["sbatch", "--parsable", *options, *job.sbatch])
    if submitted is None or submitted.returncode != 0:
        reason = "no answer" if submitted is None else submitted.stderr.strip()
        return ComeBack(False, f"cannot come back: sbatch said: {reason}", may_work_later=True)
    job_id = submitted.stdout.strip().split(";")[0]
    index = [option[len("--array=") :] for option in job.sbatch if option.startswith("--array=")]
    job_id = "_".join([job_id, *index])
    return ComeBack(True, " ".join([f"submitted job {job_id}", *options]), job=job_id)


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """None if the command does not answer: a controller that restarts."""
    try:
        return subprocess.run(
            command,
            env=environment_without_slurm(),
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
