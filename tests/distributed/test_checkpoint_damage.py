"""Damaged and foreign checkpoints: what is said, what is used instead, what stays."""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distributed_lm.checkpoint.folders import checkpoint_path, saved_steps, superseded
from distributed_lm.checkpoint.foreign import check_executes_nothing
from distributed_lm.checkpoint.manifest import MANIFEST, write_manifest
from distributed_lm.config import CheckpointConfig, RunConfig
from distributed_lm.errors import CheckpointError, UserError
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, messages, train_run

SHORT = (
    "model.num_layers=1", "train.steps=4", "checkpoint.save_every=2", "evaluation.lengths=[64]",
    "evaluation.max_tokens=512",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4, and its twin."""
    output = tmp_path_factory.mktemp("finished")
    runs = Runs(demo_data, output)
    runs.train("run", *SHORT)
    runs.train("twin", *SHORT)
    return output


@pytest.fixture
def runs(finished: Path, demo_data: Path, tmp_path: Path) -> Runs:
    """A copy of it that a test may damage."""
    shutil.copytree(finished, tmp_path / "runs")
    return Runs(demo_data, tmp_path / "runs")


def failing_run(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        train_run(config)
    return str(caught.value)


def shard(folder: Path) -> Path:
    return folder / "__0_0.distcp"


def vouch_for(folder: Path, step: int) -> None:
    """Make the manifest say that the files are as they should be."""
    (folder / MANIFEST).unlink()
    save = json.loads((folder / "state.json").read_text())["save"]
    write_manifest(folder, step, {}, save)


def flip_a_bit(folder: Path) -> None:
    content = bytearray(shard(folder).read_bytes())
    content[len(content) // 2] ^= 1
    shard(folder).write_bytes(content)


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), 1000)


def lose_a_shard(folder: Path) -> None:
    shard(folder).unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def take_another_manifest(folder: Path) -> None:
    shutil.copy(folder.with_name("step_00000002") / MANIFEST, folder / MANIFEST)


def take_another_runs_manifest(folder: Path) -> None:
    twin = folder.parents[1].with_name("twin")
    shutil.copy(checkpoint_path(twin, 4) / MANIFEST, folder / MANIFEST)


def list_nothing(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "files": {}}))


def list_no_metadata(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    del content["files"][".metadata"]
    (folder / MANIFEST).write_text(json.dumps(content))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_bit, "__0_0.distcp: damaged: expected SHA-256 "),
    (truncate, "bytes, found 1000"),
    (lose_a_shard, "__0_0.distcp: cannot be read (No such file or directory)"),
    (lose_the_manifest, "manifest.json: missing"),
    (take_another_manifest, "is the manifest of step 2, not of step_00000004"),
    (take_another_runs_manifest, "manifest.json: is the manifest of another save ("),
    (list_nothing, "manifest.json: damaged: does not list state.json"),
    (list_no_metadata, "manifest.json: damaged: does not list .metadata"),
]


@pytest.mark.parametrize(
    ("damage", "expected"), DAMAGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], None], expected: str, runs: Runs
) -> None:
    config = runs.config("run", *SHORT, "train.steps=5")
    damage(checkpoint_path(config.run_dir, 4))
    run_distributed(train_run, 1, config)
    records = runs.records(config)
    notes = messages(records, "note")
    assert any(expected in note and "using the one before" in note for note in notes)
    assert [line["step"] for line in records["train"]][-3:] == [3, 4, 5]


def test_checkpoint_that_was_being_replaced_is_restored(runs: Runs) -> None:
    """By a rewound run, which was killed between the two renames."""
    config = runs.config("run", *SHORT, "train.steps=5")
    final = checkpoint_path(config.run_dir, 4)
    final.rename(final.with_name(f".{final.name}.replaced.tmp"))
    run_distributed(train_run, 1, config)
    records = runs.records(config)
    notes = messages(records, "note")
    assert f"{final}: restored; the run was killed while replacing it" in notes
    assert not any("unfinished save" in note for note in notes)
    assert [line["step"] for line in records["train"]] == [1, 2, 3, 4, 5]


def test_run_without_any_whole_checkpoint_does_not_start_over(runs: Runs) -> None:
    config = runs.config("run", *SHORT, "train.steps=5")
    for step in (2, 4):
        flip_a_bit(checkpoint_path(config.run_dir, step))
    [message] = run_distributed(failing_run, 1, config)
    assert "no checkpoint is whole" in message
    assert message.count("expected SHA-256") == 2


def test_future_format_is_refused_by_name(runs: Runs) -> None:
    config = runs.config("run", *SHORT, "train.steps=5")
    for step in (2, 4):
        folder = checkpoint_path(config.run_dir, step)
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**state, "format_version": 99}))
        vouch_for(folder, step)
    [message] = run_distributed(failing_run, 1, config)
    assert "checkpoint format 99, this version reads 1" in message


class Payload:
    """Unpickling an instance writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("victim", [".metadata", "common.pt"])
def test_foreign_pickle_is_refused_and_executes_nothing(
    victim: str, runs: Runs, tmp_path: Path
) -> None:
    """With a manifest that vouches for it: whoever can plant a file can plant its hash."""
    config = runs.config("run", *SHORT, "train.steps=5")
    folder = checkpoint_path(config.run_dir, 4)
    trace = tmp_path / "executed"
    payload = pickle.dumps(Payload(trace))
    if victim == ".metadata":
        (folder / victim).write_bytes(payload)
    else:
        with zipfile.ZipFile(folder / victim, "w") as archive:
            archive.writestr("common/data.pkl", payload)
    vouch_for(folder, 4)
    [message] = run_distributed(failing_run, 1, config)
    assert f"{victim}: would import posix.mkdir" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # GLOBAL, protocol 0
        # "os", "system", "torch", "Size", POP, POP, STACK_GLOBAL: the last two strings are a decoy
        b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x05torch\x8c\x04Size00\x93.",
        b"\x80\x02\x82\x01.",  # EXT1: the extension registry
        b"not a pickle",
    ],
)
def test_disguised_imports_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError):
        check_executes_nothing(tmp_path)


def test_retention_keeps_the_newest_and_every_nth() -> None:
    steps = [1, 2, 3, 4, 5, 6]
    assert superseded(steps, CheckpointConfig(), 6) == []
    assert superseded(steps, CheckpointConfig(keep_last=2), 6) == [1, 2, 3, 4]
    assert superseded(steps, CheckpointConfig(keep_last=1, keep_every=3), 6) == [1, 2, 4, 5]


def test_retention_never_counts_what_is_newer_than_the_newest_whole_one() -> None:
    """After falling back from a damaged 25 to 20, and on to 22."""
    keep_one = CheckpointConfig(keep_last=1)
    assert superseded([20, 22, 25], keep_one, 22) == [20]
    assert superseded([10, 20, 30], keep_one, 20) == [10]
    assert superseded([10, 20, 30], keep_one, 10) == []


@pytest.mark.parametrize("names", [("common/data.pkl", "common/data.pkl"), ("common/DATA.PKL",)])
def test_archive_entries_cannot_hide(names: tuple[str, ...], tmp_path: Path) -> None:
    """torch ignores case and takes the first of two entries, Python's zipfile takes the last."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    contents = [pickle.dumps(Payload(tmp_path / "executed")), pickle.dumps({})]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about the duplicate
        with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
            for name, content in zip(names, contents, strict=False):
                archive.writestr(name, content)
    with pytest.raises(CheckpointError):
        check_executes_nothing(tmp_path)


def test_old_checkpoints_go_when_a_newer_one_is_published(demo_data: Path, tmp_path: Path) -> None:
    runs = Runs(demo_data, tmp_path)
    runs.train("kept", *SHORT, "train.steps=6", "checkpoint.save_every=1",
               "checkpoint.keep_last=2", "checkpoint.keep_every=3")  # fmt: skip
    assert saved_steps(tmp_path / "kept") == [3, 5, 6]
