"""What of some jobs is in Slurm's queue. Standard library only: supervisors ask, too."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from launch.environment import environment_without_slurm

SQUEUE_SECONDS = 60
ACTIVE_STATES = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED",
                 "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SIGNALING", "STAGE_OUT",
                 "RESIZING", "STOPPED")  # fmt: skip


@dataclass(frozen=True)
class Queued:
    """A job, or one task of a job array, that waits or runs."""

    id: str
    """As Slurm's commands take it: ``13``, or ``13_2`` for a task of an array."""
    array: str
    """``13`` in both cases."""
    state: str

    def is_one_of(self, jobs: Iterable[str]) -> bool:
        return not {self.id, self.array}.isdisjoint(jobs)


def queued(jobs: Iterable[str]) -> list[Queued] | None:
    """Those of the jobs that wait or run; None where squeue is not here, or does not answer."""
    asked_for = sorted(set(jobs))
    if not asked_for:
        return []
    command = ["squeue", "--noheader", "--array", "--format=%i %F %T"]
    try:
        asked = subprocess.run(
            [*command, f"--jobs={','.join(asked_for)}"], capture_output=True, text=True,
            check=False, timeout=SQUEUE_SECONDS, env=environment_without_slurm(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    # So it says of a single job that Slurm has forgotten; of several it leaves those out.
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:
        return None
    found = [Queued(*line.split(maxsplit=2)) for line in asked.stdout.splitlines() if line.strip()]
    return [job for job in found if job.state in ACTIVE_STATES]
