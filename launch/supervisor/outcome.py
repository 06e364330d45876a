"""How a step of ranks ended, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.failure import report
from launch.supervisor.coordinator import Coordinator
from launch.supervisor.job import Job
from launch.supervisor.journal import Event, best_step, newest_step, step_at_launch
from launch.supervisor.step import Step

EXIT_USER_ERROR = 2
# What counts how much towards max_restarts_without_progress. Being stopped is nobody's fault,
# unless the run never gets to a checkpoint in between.
WEIGHTS = {"crash": 1.0, "hang": 1.0, "unfit": 1.0, "stopped": 0.25}


@dataclass(frozen=True)
class Outcome:
    """How a step of ranks ended."""

    kind: str
    """``finished``, ``stopped``, ``mistake``, ``crash`` or ``hang``."""
    code: int
    message: str


def judge(
    job: Job,
    said: Coordinator,
    step: Step,
    code: int,
    seconds: float,
    was_asked_to_stop: bool,
    events: Sequence[Event],
) -> Outcome:
    """Of a step that has ended by itself, or as agreed. Reads logs and checkpoints.

    Args:
        code: srun's.
        events: the journal so far.
    """
    saved = newest_step(Path(job.run_dir))
    if code == 0 and (said.is_finished or not job.tells_end):
        what = "" if job.part else f"step {job.steps} "
        return Outcome("finished", 0, f"{what}after {seconds:.0f} s")
    if said.is_stopped:
        return Outcome("stopped", code, f"saved step {saved}")
    if was_asked_to_stop:
        return Outcome("stopped", code, "without saving: the ranks ended before they agreed")
    if code == 0:  # srun lost its tasks without a word
        return Outcome("crash", 1, "the ranks ended without finishing the run")
    failure = step.why(code, said.ends, seconds)
    message, code = report([failure], said.expected, seconds)
    # Of a run that has worked since its launch, it is a mount that went away or the like.
    has_worked = saved > step_at_launch(events)
    is_mistake = failure.return_code == EXIT_USER_ERROR and not has_worked
    return Outcome("mistake" if is_mistake else "crash", code, message)


def failures_in_a_row(events: Sequence[Event]) -> float:
    """Since the last launch, and since the last new checkpoint."""
    count = 0.0
    for event in reversed(events):
        if event["event"] in ("progress", "launch"):
            break
        count += WEIGHTS.get(event["event"], 0.0)
    return count


def has_progressed(events: Sequence[Event], saved: int) -> bool:
    """Whether a checkpoint of step ``saved`` is more than this launch had when it last failed."""
    return saved > best_step(events)
