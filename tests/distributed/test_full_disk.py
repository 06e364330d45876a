"""A disk that is full, or may not be written to, for a while or for good."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distributed_lm.checkpoint.folders import checkpoint_path, saved_steps
from distributed_lm.checkpoint.manifest import verify
from distributed_lm.config import RunConfig
from distributed_lm.errors import UserError
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, messages, train_run

SHORT = (
    "model.num_layers=1", "train.steps=4", "checkpoint.save_every=2", "evaluation.lengths=[64]",
    "evaluation.max_tokens=512",
)  # fmt: skip


def failing_run(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        train_run(config)
    return str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a config but not for a checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_is_an_event_and_only_in_a_row_the_end(small_disk: Path, demo_data: Path) -> None:
    runs = Runs(demo_data, small_disk)
    config = runs.config("full", *SHORT, "train.steps=9", "checkpoint.max_failed_saves=3")
    [message] = run_distributed(failing_run, 1, config)
    assert "bytes needed" in message
    assert "3 failed saves in a row" in message
    records = runs.records(config)
    assert [line["step"] for line in records["train"]] == list(range(1, 7))
    events = [line for line in records["event"] if line["event"] == "save_failed"]
    assert [line["step"] for line in events] == [2, 4, 6]
    assert not saved_steps(config.run_dir)
    assert not list((config.run_dir / "checkpoints").iterdir())


def test_disk_that_fills_while_writing_leaves_nothing_that_looks_whole(
    small_disk: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(demo_data, small_disk)
    config = runs.config("filling", *SHORT, "checkpoint.max_failed_saves=1")
    [message] = run_distributed(failing_run_that_sees_room, 1, config)
    assert "1 failed saves in a row" in message
    assert not saved_steps(config.run_dir)


def failing_run_that_sees_room(config: RunConfig) -> str:
    """The disk says that it has room, and then has not: another job was faster."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _path: usage
    return failing_run(config)


@contextmanager
def mounted_on_itself(folder: Path) -> Iterator[None]:
    """A mount of its own, whose permissions can change: nobody else keeps root from writing."""
    folder.mkdir(parents=True)
    mount = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, access: str) -> None:
    subprocess.run(["mount", "-o", f"remount,bind,{access}", str(folder)], check=True)


def test_read_only_folder_is_an_event_and_the_end_only_at_the_end(
    demo_data: Path, tmp_path: Path
) -> None:
    runs = Runs(demo_data, tmp_path)
    config = runs.config("readonly", *SHORT, "checkpoint.max_failed_saves=9")
    with mounted_on_itself(config.run_dir / "checkpoints"):
        remount(config.run_dir / "checkpoints", "ro")
        [message] = run_distributed(failing_run, 1, config)
    assert "Read-only file system" in message
    records = runs.records(config)
    assert [line["step"] for line in records["train"]] == [1, 2, 3, 4]
    assert len(messages(records, "save_failed")) == 2


def train_while_access_comes_and_goes(config: RunConfig) -> None:
    """Writing is forbidden after the first save, and allowed again after the first that failed."""
    from distributed_lm.training.loop import TrainingLoop

    log, then = TrainingLoop._event, [("save", "ro"), ("save_failed", "rw")]

    def log_and_remount(self: TrainingLoop, name: str, message: str, **extra: Any) -> None:
        log(self, name, message, **extra)
        if then and name == then[0][0] and self.groups.is_first_rank:
            remount(config.run_dir / "checkpoints", then.pop(0)[1])

    TrainingLoop._event = log_and_remount
    train_run(config)


def test_folder_that_is_read_only_for_a_while(demo_data: Path, tmp_path: Path) -> None:
    runs = Runs(demo_data, tmp_path)
    options = (*SHORT, "parallel.tensor=2", "checkpoint.save_every=1")
    expected = losses(runs.train("writable", *options, world_size=2))
    config = runs.config("changing", *options)
    with mounted_on_itself(config.run_dir / "checkpoints"):
        run_distributed(train_while_access_comes_and_goes, 2, config)
    records = runs.records(config)
    [message] = messages(records, "save_failed")
    assert "step 2 not saved in " in message
    assert "Read-only file system (failure 1 of 3 in a row)" in message
    assert losses(records) == expected
    assert saved_steps(config.run_dir) == [1, 3, 4]
    for step in saved_steps(config.run_dir):
        verify(checkpoint_path(config.run_dir, step))
