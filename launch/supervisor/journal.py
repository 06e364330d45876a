"""``RUN/slurm/journal.jsonl``: what happened to the run's jobs, one JSON object per line.

Kept apart from ``metrics.jsonl``, which only a rank may write. ``launch status`` reads both.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
CANCELLED = "cancelled"


class Journal:
    """Appends events; reads those of all lives."""

    def __init__(self, slurm_dir: Path, **always: Any) -> None:
        self._path = slurm_dir / JOURNAL
        self._always = always

    def write(self, event: str, message: str = "", **values: Any) -> None:
        """Record and print one event."""
        said = f"{event}: {message}" if message else event
        print(f"{time.strftime('%H:%M:%S')} supervisor: {said}", flush=True)
        self.record(event, message, **values)

    def record(self, event: str, message: str = "", **values: Any) -> None:
        """Record one event. A disk that does not take it is no reason to stop."""
        record = {"time": time.time(), "event": event, "message": message}
        record.update(self._always)
        record.update(values)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            print(f"supervisor: {self._path}: {error.strerror}", flush=True)

    def read(self) -> list[dict[str, Any]]:
        return read_journal(self._path.parent)


def read_journal(slurm_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; none if there are none."""
    try:
        lines = (slurm_dir / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:  # torn by a power cut
            continue
    return events


def is_finished(events: list[dict[str, Any]]) -> bool:
    """Whether the run has been finished since it was last launched."""
    for event in reversed(events):
        if event["event"] in ("finished", "launch"):
            return bool(event["event"] == "finished")
    return False


def step_at_launch(events: list[dict[str, Any]]) -> int:
    """Of the newest checkpoint when the run was last launched."""
    steps = [event.get("step", 0) for event in events if event["event"] == "launch"]
    return int(steps[-1]) if steps else 0


def job_ids(events: Sequence[dict[str, Any]]) -> list[str]:
    """Of all jobs that have worked or are to work on the run."""
    known = {str(job) for event in events for job in [*event.get("jobs", []), event["job"]] if job}
    return sorted(known)


def newest_step(run_dir: Path) -> int:
    """Of the newest published checkpoint; 0 = none."""
    try:
        names = os.listdir(run_dir / "checkpoints")
    except OSError:
        return 0
    steps = [int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit()]
    return max(steps, default=0)
