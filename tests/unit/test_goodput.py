"""Where a run's time went, on a made-up history that can be added up by hand."""

from typing import Any

import pytest

from launch.goodput import goodput


def event(time: float, name: str) -> dict[str, Any]:
    return {"time": time, "event": name, "message": ""}


def step(time: float, number: int, seconds: float) -> dict[str, Any]:
    return {"kind": "train", "time": time, "step": number, "step_seconds": seconds}


JOURNAL = [
    event(0, "launch"), event(100, "life"), event(160, "leave"), event(200, "life"),
    event(300, "finished"),
]  # fmt: skip
METRICS = [
    step(120, 1, 10.0), step(130, 2, 10.0), step(140, 3, 10.0),
    {"kind": "event", "time": 145, "event": "save", "save_stall_seconds": 2.0},
    # Step 3 again, by the second life, and faster.
    step(220, 3, 5.0), step(230, 4, 5.0),
    {"kind": "evaluation", "time": 250, "evaluation_seconds": 20.0},
]  # fmt: skip


def test_every_second_is_accounted_for() -> None:
    spent = goodput(METRICS, JOURNAL)
    assert spent.total == 300.0
    assert spent.training == 10.0 + 10.0 + 5.0 + 5.0
    assert spent.repeated == 10.0
    assert spent.saving == 2.0
    assert spent.evaluating == 20.0
    assert spent.queueing == 100.0 + 40.0
    assert spent.starting == 300.0 - 30.0 - 10.0 - 2.0 - 20.0 - 140.0
    assert spent.share == pytest.approx(0.1)


def test_lines_further_apart_than_a_step_count_all_their_steps() -> None:
    spent = goodput([step(10, 5, 1.0), step(20, 10, 1.0)], [event(0, "launch"), event(1, "life")])
    assert spent.training == 5.0 + 5.0


def test_a_run_in_the_queue_is_queueing_until_now() -> None:
    spent = goodput([], [event(0, "launch")], now=50.0)
    assert (spent.total, spent.queueing, spent.share) == (50.0, 50.0, 0.0)
