"""``RUN/slurm/journal.jsonl``: what happened to the run's jobs, one JSON object per line.

Kept apart from ``metrics.jsonl``, which only a rank may write. ``launch status`` reads both.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

JOURNAL = "journal.jsonl"
CANCELLED = "cancelled"
Event = dict[str, Any]
T = TypeVar("T")


class Journal:
    """Appends events."""

    def __init__(self, slurm_dir: Path, **always: Any) -> None:
        self._path = slurm_dir / JOURNAL
        self._always = always
        self.unwritten: list[Event] = []
        """What no disk took; a restart loop must be seen all the same."""

    def write(self, event: str, message: str = "", **values: Any) -> None:
        """Record and print one event."""
        said = f"{event}: {message}" if message else event
        at = values.get("time", time.time())
        print(f"{time.strftime('%H:%M:%S', time.localtime(at))} supervisor: {said}", flush=True)
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
            self.unwritten.append(record)


class SupervisorsJournal:
    """A journal whose file system may stand still for minutes without its writer's waiting.

    One thread does what is asked of the files, in order; so what is read has all that was written.
    """

    def __init__(self, slurm_dir: Path, **always: Any) -> None:
        self._journal = Journal(slurm_dir, **always)
        self._slurm_dir = slurm_dir
        self._thread = ThreadPoolExecutor(1, "journal")

    def write(self, event: str, message: str = "", **values: Any) -> None:
        """Record and print one event, some time."""
        write, at = self._journal.write, time.time()
        self._thread.submit(lambda: write(event, message, **{"time": at, **values}))

    async def read(self) -> list[Event]:
        """All events, those just written included."""
        return await self.after(lambda: [*read_journal(self._slurm_dir), *self._journal.unwritten])

    async def after(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, once everything is written."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def read_journal(slurm_dir: Path) -> list[Event]:
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


def since_launch(events: Sequence[Event]) -> list[Event]:
    """What has happened since the run was last launched, that launch included."""
    launches = [number for number, event in enumerate(events) if event["event"] == "launch"]
    return list(events[launches[-1] :] if launches else events)


def is_finished(events: Sequence[Event]) -> bool:
    """Whether the run has been finished since it was last launched."""
    return any(event["event"] == "finished" for event in since_launch(events))


def best_step(events: Sequence[Event]) -> int:
    """Of the newest checkpoint that a failure was followed by since the last launch, or that there
    was when the run was launched."""
    recent = [event for event in since_launch(events) if event["event"] in ("progress", "launch")]
    return max((event.get("progress") or event.get("step") or 0 for event in recent), default=0)


def step_at_launch(events: Sequence[Event]) -> int:
    """Of the newest checkpoint when the run was last launched."""
    steps = [event.get("step", 0) for event in events if event["event"] == "launch"]
    return int(steps[-1]) if steps else 0


def waiting_jobs(events: Sequence[Event], job_id: str) -> list[str] | None:
    """Jobs that were submitted to go on with the run and have not begun yet, beside ``job_id``.

    None if the journal does not tell: the launcher was killed before it could.
    """
    recent = since_launch(events)
    if not any(event["event"] == "submitted" for event in recent):
        return None
    begun = {str(event["job"]) for event in recent if event["event"] == "life"}
    named = [str(job) for event in recent for job in event.get("jobs", [])]
    return [job for job in named if job not in begun and job != job_id]


def job_ids(events: Sequence[Event]) -> list[str]:
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
