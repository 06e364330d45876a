"""Saves that fail, or hang, on one of two ranks: training goes on, and the next save is good."""

import errno
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from distributed_lm.checkpoint import dcp
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


class Fault(NamedTuple):
    """A disk operation, as Python's audit event and the end of its path, and what it answers."""

    event: str
    path: str
    code: int = errno.EIO
    rank: int = 0


@pytest.fixture(scope="module")
def expected(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run without trouble."""
    runs = Runs(demo_data, tmp_path_factory.mktemp("expected"))
    return losses(runs.train("peaceful", *SHORT, world_size=2))


# By the step whose save it hits. Every other save is in peace.
FAULTS = {
    1: Fault("os.mkdir", "", errno.EACCES),
    3: Fault("open", "/__1_0.distcp", errno.ENOSPC, rank=1),
    5: Fault("open", "/.metadata.tmp", errno.ENOSPC),
    7: Fault("open", "/metadata.json"),
    9: Fault("open", "/manifest.json", errno.EDQUOT),
    11: Fault("os.rename", "/step_00000011"),
}


def train_with_faults(config: RunConfig, faults: dict[int, Fault]) -> None:
    def fail(event: str, path: str) -> None:
        for step, fault in faults.items():
            if (
                int(os.environ["RANK"]) == fault.rank
                and event == fault.event
                and f"step_{step:08d}" in path
                and path.endswith(fault.path)
            ):
                raise OSError(fault.code, os.strerror(fault.code))

    on_disk(fail)
    train_run(config)


@pytest.fixture(scope="module")
def faulty(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    runs = Runs(demo_data, tmp_path_factory.mktemp("faulty"))
    config = runs.config("faulty", *SHORT)
    run_distributed(train_with_faults, 2, config, FAULTS)
    return config


def test_training_goes_on_as_without_failed_saves(faulty: RunConfig, expected: list[float]) -> None:
    assert losses(Runs.records(faulty)) == expected
    assert saved_steps(faulty.run_dir) == [2, 4, 6, 8, 10, 12]
    for step in saved_steps(faulty.run_dir):
        verify(checkpoint_path(faulty.run_dir, step))
    assert not leftovers(faulty.run_dir)


@pytest.mark.parametrize("step", FAULTS)
def test_failed_save_is_an_event_and_the_next_is_good(step: int, faulty: RunConfig) -> None:
    records = Runs.records(faulty)
    [message] = [text for text in messages(records, "save_failed") if f"step {step} not" in text]
    assert os.strerror(FAULTS[step].code) in message
    assert "(failure 1 of 3 in a row)" in message
    assert f"checkpoint of step {step}" not in messages(records, "save")
    assert f"checkpoint of step {step + 1}" in messages(records, "save")


def train_without_common_file(config: RunConfig) -> None:
    """What torch says on a full disk is no OSError."""
    save, failed = torch.save, []

    def fail_once(content: Any, file: Any, *arguments: Any, **keywords: Any) -> None:
        if str(file).endswith("common.pt") and not failed:
            failed.append(file)
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(content, file, *arguments, **keywords)

    torch.save = fail_once
    train_run(config)


def test_disk_that_fills_before_the_fork(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    config = Runs(demo_data, tmp_path).config("common", *SHORT, "parallel.timeout_seconds=5")
    run_distributed(train_without_common_file, 2, config, timeout_seconds=60.0)
    [message] = messages(Runs.records(config), "save_failed")
    assert "failed writing file" in message
    assert losses(Runs.records(config)) == expected
    assert saved_steps(config.run_dir) == list(range(2, 13))


def train_without_last_sync(config: RunConfig) -> None:
    """The first checkpoint has its name, but whether that is on disk cannot be said."""
    failed: list[str] = []

    def fail_once(event: str, path: str) -> None:
        if event == "open" and path == str(config.run_dir / "checkpoints") and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    on_disk(fail_once)
    train_run(config)


def test_failed_save_has_no_name(demo_data: Path, tmp_path: Path) -> None:
    config = Runs(demo_data, tmp_path).config("unsynced", *SHORT, "train.steps=3")
    run_distributed(train_without_last_sync, 2, config)
    [message] = messages(Runs.records(config), "save_failed")
    assert "step 1 not saved in " in message
    assert saved_steps(config.run_dir) == [2, 3]


def test_checkpoint_that_cannot_be_deleted(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    """The first at the rename; the second when it has no name any more."""
    config = Runs(demo_data, tmp_path).config("kept", *SHORT, "checkpoint.keep_last=1")
    run_distributed(train_with_unwilling_disk, 2, config)
    problems = messages(Runs.records(config), "prune_failed")
    assert len(problems) == 2
    for step, problem in zip((1, 3), problems, strict=True):
        path = checkpoint_path(config.run_dir, step)
        assert problem == f"{path}: not deleted (Input/output error)"
    assert losses(Runs.records(config)) == expected
    assert not messages(Runs.records(config), "save_failed")
    assert saved_steps(config.run_dir) == [12]
    assert [folder.name[:23] for folder in leftovers(config.run_dir)] == [".step_00000003.removed-"]


def train_with_unwilling_disk(config: RunConfig) -> None:
    hits = {"os.rename": "/.step_00000001.removed-", "shutil.rmtree": "/.step_00000003.removed-"}

    def fail_once(event: str, path: str) -> None:
        if hits.get(event, " ") in path:
            del hits[event]
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    on_disk(fail_once)
    train_run(config)


def record_events() -> list[tuple[str, str]]:
    """Name and message of each of the loop's events, which only the first rank writes down."""
    from distributed_lm.training.loop import TrainingLoop

    log, seen = TrainingLoop._event, []

    def record(self: TrainingLoop, name: str, message: str, **extra: Any) -> None:
        seen.append((name, message))
        log(self, name, message, **extra)

    TrainingLoop._event = record
    return seen


def stand_still_once(owner: Any, name: str, marker: Path) -> None:
    """The first process that calls that function stops there."""
    function = getattr(owner, name)

    def stop(*arguments: Any, **keywords: Any) -> Any:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments, **keywords)

    setattr(owner, name, stop)


def train_with_stopped_writer(config: RunConfig, rank: int, is_child: bool) -> dict[str, Any]:
    """The first writer of that rank stands still, or the process that it forks."""
    seen, stopped, kill = record_events(), [], dcp.Writing.kill

    def note_and_kill(self: dcp.Writing) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.status() == psutil.STATUS_STOPPED:
                stopped.append(process)
        kill(self)

    dcp.Writing.kill = note_and_kill
    if int(os.environ["RANK"]) == rank:
        place = (FileSystemWriterAsync, "write_preloaded_data") if is_child else (dcp, "_write")
        stand_still_once(*place, config.run_dir / "stopped")
    train_run(config)
    alive = psutil.wait_procs(stopped, timeout=2.0)[1] + psutil.Process().children()
    return {"events": seen, "stopped": len(stopped), "left": list(map(str, alive))}


@pytest.mark.parametrize(("asynchronous", "is_child"), [("true", False), ("false", True)])
def test_writer_that_hangs_is_ended(
    asynchronous: str, is_child: bool, demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    config = Runs(demo_data, tmp_path).config(
        "hung", *SHORT, "checkpoint.save_every=4", "checkpoint.save_timeout_seconds=1",
        f"checkpoint.asynchronous={asynchronous}",
    )  # fmt: skip
    ranks = run_distributed(train_with_stopped_writer, 2, config, 1, is_child)
    for rank in ranks:
        [message] = [message for name, message in rank["events"] if name == "save_failed"]
        assert "step 4 not saved in " in message
        assert "of rank 1 was at it for more than checkpoint.save_timeout_seconds=1;" in message
    assert [rank["stopped"] for rank in ranks] == [0, 1]
    assert not any(rank["left"] for rank in ranks)
    assert losses(Runs.records(config)) == expected
    assert saved_steps(config.run_dir) == [8, 12]
    assert not leftovers(config.run_dir)
