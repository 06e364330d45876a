"""How long the allocation lasts, and how long before its end a run has to stop to save."""

from __future__ import annotations

import json
import time
from pathlib import Path

from launch.supervisor.job import Job

# More than this does not pass between the start of a job and that of its script's program.
START_SECONDS = 1800.0


class Clock:
    """Of one life of a job; Slurm's own warning is as it was when the job was submitted, and comes
    up to half a minute late."""

    def __init__(self, job: Job, began: float | None) -> None:
        """
        Args:
            began: when Slurm started the job, in seconds since the epoch; None = just now.
        """
        self._job = job
        # Prologue and environment modules are on the job's time, too; a wrong clock is not.
        passed = 0.0 if began is None else time.time() - began
        self._started = time.monotonic() - (passed if 0.0 < passed < START_SECONDS else 0.0)
        self._slowest_save = 0.0

    def saved(self, seconds: float) -> None:
        """A save has taken so long."""
        self._slowest_save = max(self._slowest_save, seconds)

    def suspended(self, seconds: float) -> None:
        """The job stood still for so long, by which Slurm has put off its end."""
        self._started += seconds

    @property
    def lead_seconds(self) -> float:
        return max(self._job.lead_seconds, 3.0 * self._slowest_save + 30.0)

    def last_call(self) -> float | None:
        """Seconds that are left, once they are no more than saving may take; None before."""
        if self._job.time_seconds is None:
            return None
        left = self._job.time_seconds - (time.monotonic() - self._started)
        return left if left < self.lead_seconds else None


def slowest_save(run_dir: Path) -> float:
    """Seconds, of all saves of the run so far; 0 = none is known."""
    slowest = 0.0
    try:
        with (run_dir / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if '"save_seconds"' in line:
                    slowest = max(slowest, _save_seconds(line))
    except OSError:
        pass
    return slowest


def _save_seconds(line: str) -> float:
    try:
        record = json.loads(line)
        return float(record["save_seconds"] or 0.0) if record.get("event") == "save" else 0.0
    except (ValueError, KeyError, TypeError):  # torn by a kill
        return 0.0
