"""A disk that does not answer: training goes on, and what it does later tears nothing."""

import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distributed_lm.checkpoint import agreement
from distributed_lm.checkpoint.folders import checkpoint_path, leftovers, saved_steps
from distributed_lm.checkpoint.manifest import verify
from distributed_lm.config import RunConfig
from tests.support.killing import on_disk
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, messages, train_run

SHORT = (
    "model.num_layers=1", "train.steps=12", "checkpoint.save_every=1", "parallel.tensor=2",
    "evaluation.lengths=[64]", "evaluation.max_tokens=512",
)  # fmt: skip
ANSWER_SECONDS = 1.0


class Silence(NamedTuple):
    """The operation, as Python's audit event and the end of its path, that does not return."""

    event: str
    path: str
    is_all: bool = False
    """And none of that save that comes later does, its removal included."""
    saves: int = 1
    """It returns when so many later saves are published."""


# By the step whose save it hits. Every other save is in peace.
SILENCES = {
    1: Silence("os.mkdir", ""),
    3: Silence("open", "/.metadata.tmp"),
    5: Silence("open", "/manifest.json"),
    7: Silence("fsync", "/manifest.json"),  # it lies there, half written
    9: Silence("os.rename", "/step_00000009"),
    11: Silence("open", "/manifest.json", is_all=True),
}


class SilentDisk:
    """Holds operations of some saves until a later one is published."""

    def __init__(self, silences: dict[int, Silence]) -> None:
        self.silences = silences
        self.open = {step: threading.Event() for step in silences}
        self.held: list[threading.Thread] = []
        self.fsync, os.fsync = os.fsync, self.slow_fsync
        on_disk(self.hold)

    def hold(self, event: str, path: str) -> None:
        for step, silence in self.silences.items():
            if f"step_{step:08d}" not in path or self.open[step].is_set():
                continue
            is_first = event == silence.event and path.endswith(silence.path)
            if is_first or (silence.is_all and self.is_holding(step)):
                thread = threading.current_thread()
                thread.name = f"held {step}"
                self.held.append(thread)
                assert self.open[step].wait(10.0)

    def is_holding(self, step: int) -> bool:
        return any(thread.name == f"held {step}" for thread in self.held)

    def slow_fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self.hold("fsync", os.readlink(f"/proc/self/fd/{number}"))
        self.fsync(descriptor)

    def release(self, name: str, message: str) -> None:
        for step, silence in self.silences.items():
            if name == "save" and message == f"checkpoint of step {step + silence.saves}":
                self.open[step].set()


def train_on_silent_disk(config: RunConfig, silences: dict[int, Silence]) -> tuple[int, list[str]]:
    """How many threads were held, and which of them still are at the end."""
    from distributed_lm.training.loop import TrainingLoop

    agreement.ANSWER_SECONDS = ANSWER_SECONDS
    if os.environ["RANK"] != "0":
        train_run(config)
        return 0, []
    disk, log = SilentDisk(silences), TrainingLoop._event

    def log_and_release(self: TrainingLoop, name: str, message: str, **extra: Any) -> None:
        log(self, name, message, **extra)
        disk.release(name, message)

    TrainingLoop._event = log_and_release
    train_run(config)
    for thread in disk.held:
        thread.join(5.0)
    return len(disk.held), [thread.name for thread in disk.held if thread.is_alive()]


@pytest.fixture(scope="module")
def runs(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(demo_data, tmp_path_factory.mktemp("silent"))


@pytest.fixture(scope="module")
def expected(runs: Runs) -> list[float]:
    return losses(runs.train("peaceful", *SHORT, world_size=2))


def test_silence_is_a_failed_save_and_what_comes_late_tears_nothing(
    runs: Runs, expected: list[float]
) -> None:
    config = runs.config("silent", *SHORT)
    [(held, left), _] = run_distributed(train_on_silent_disk, 2, config, SILENCES)
    assert held > len(SILENCES)
    assert not left
    records = runs.records(config)
    failures = messages(records, "save_failed")
    assert len(failures) == len(SILENCES)
    for step, message in zip(SILENCES, failures, strict=True):
        assert f"step {step} not saved in " in message
        assert "the file system did not answer within 1 s (failure 1 of 3 in a row)" in message
    assert losses(records) == expected
    assert saved_steps(config.run_dir) == [2, 4, 6, 8, 10, 12]
    for step in saved_steps(config.run_dir):
        verify(checkpoint_path(config.run_dir, step))
    # What could not be removed then has no name, and goes at the next start.
    assert {folder.name[:14] for folder in leftovers(config.run_dir)} <= {
        ".step_00000001", ".step_00000011",
    }  # fmt: skip


def test_silence_while_an_older_checkpoint_is_deleted(runs: Runs, expected: list[float]) -> None:
    config = runs.config("undeleted", *SHORT, "checkpoint.keep_last=1")
    silence = {1: Silence("os.rename", ".tmp", saves=3)}
    [(held, left), _] = run_distributed(train_on_silent_disk, 2, config, silence)
    assert held > 0
    assert not left
    records = runs.records(config)
    problems = messages(records, "prune_failed")
    assert problems
    assert all("the file system did not answer" in problem for problem in problems)
    assert losses(records) == expected
    assert saved_steps(config.run_dir) == [12]
