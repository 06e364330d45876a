"""Where a run's time went: what trained, and what was lost to queue, start-up, saves, evaluation
and steps done twice. From ``metrics.jsonl`` and the journal alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Goodput:
    """Seconds since the run was first submitted, by what they were spent on."""

    total: float
    training: float
    """On steps that count."""
    repeated: float
    """On steps that a later life did again."""
    saving: float
    """Training stood still for a save."""
    evaluating: float
    queueing: float
    """No job of the run was at work."""

    @property
    def starting(self) -> float:
        """Everything else: health checks, start-up, noticing failures."""
        parts = (self.training, self.repeated, self.saving, self.evaluating, self.queueing)
        return max(0.0, self.total - sum(parts))

    @property
    def share(self) -> float:
        """Of the time since submission that went into steps that count."""
        return self.training / self.total if self.total > 0 else 0.0


def goodput(
    metrics: Sequence[Record], journal: Sequence[Record], now: float | None = None
) -> Goodput:
    """Account for a run's time up to its end, or until ``now``."""
    launches = [event["time"] for event in journal if event["event"] == "launch"]
    began = launches[0] if launches else min((m["time"] for m in metrics), default=0.0)
    ended = journal[-1]["time"] if _is_at_rest(journal) else (now or time.time())
    last: dict[int, float] = {}
    trained, before = 0.0, 0
    for record in metrics:
        if record.get("event") == "resume":
            before = record["step"]
        if record["kind"] == "train" and "step_seconds" in record:
            # Lines may be further apart than a step (``train.log_every``).
            seconds = record["step_seconds"] * max(1, record["step"] - before)
            before = record["step"]
            trained += seconds
            last[record["step"]] = seconds
    counted = sum(last.values())
    return Goodput(
        total=ended - began,
        training=counted,
        repeated=trained - counted,
        saving=sum(m.get("save_stall_seconds", 0.0) for m in metrics),
        evaluating=sum(m.get("evaluation_seconds", 0.0) for m in metrics),
        queueing=_queued(journal, ended),
    )


def _is_at_rest(journal: Sequence[Record]) -> bool:
    return bool(journal) and journal[-1]["event"] in ("finished", "mistake", "loop")


def _queued(journal: Sequence[Record], ended: float) -> float:
    """Time in which no life was on: from a launch or the last word of a life to the next life."""
    total, idle_since = 0.0, None
    for event in journal:
        if event["event"] == "life" and idle_since is not None:
            total += event["time"] - idle_since
            idle_since = None
        elif event["event"] in ("launch", "leave"):
            idle_since = event["time"] if idle_since is None else idle_since
    if idle_since is not None and not _is_at_rest(journal):
        total += max(0.0, ended - idle_since)
    return total
