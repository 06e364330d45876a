"""``checkpoints RUN [list|verify|prune]`` on folders with manifests, without torch."""

import json
from pathlib import Path

import pytest

from distributed_lm import checkpoints as module
from distributed_lm.checkpoint import folders
from distributed_lm.checkpoint.folders import checkpoint_path, prune, saved_steps
from distributed_lm.checkpoint.manifest import write_manifest
from distributed_lm.checkpoints import Action, checkpoints
from distributed_lm.config import load_config
from distributed_lm.errors import CheckpointError, ConfigError
from distributed_lm.run_lock import LOCK_FILE, Life, LockLostError, run_lock


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    config = load_config("configs/runs/smoke.yaml", ["checkpoint.keep_last=2"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for step in (10, 20, 30, 40):
        folder = checkpoint_path(tmp_path, step)
        folder.mkdir(parents=True)
        state = {"format_version": 1, "layout": "data=2 tensor=1 pipeline=1"}
        (folder / "state.json").write_text(json.dumps(state))
        for name in (".metadata", "metadata.json"):
            (folder / name).write_text("{}")
        (folder / "__0_0.distcp").write_bytes(bytes(1000))
        write_manifest(folder, step, {})
    return tmp_path


def damage(run_dir: Path, step: int) -> None:
    (checkpoint_path(run_dir, step) / "__0_0.distcp").write_bytes(b"\1" + bytes(999))


def test_list_shows_every_step_without_reading_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run_dir, 20)
    checkpoints(run_dir, Action.list)
    printed = capsys.readouterr().out
    for step in (10, 20, 30, 40):
        assert f" {step} " in printed
    assert "data=2 tensor=1" in printed
    assert "not read" in printed


def test_verify_names_the_damaged_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints(run_dir, Action.verify)
    damage(run_dir, 20)
    with pytest.raises(CheckpointError, match=r"step_00000020/__0_0\.distcp: damaged"):
        checkpoints(run_dir, Action.verify)
    assert "damaged" in capsys.readouterr().out


def test_prune_obeys_retention(run_dir: Path) -> None:
    checkpoints(run_dir, Action.prune)
    assert saved_steps(run_dir) == [30, 40]


def test_prune_keeps_the_newest_whole_one(run_dir: Path) -> None:
    damage(run_dir, 40)
    checkpoints(run_dir, Action.prune)
    assert saved_steps(run_dir) == [20, 30, 40]


def test_prune_does_not_mind_what_another_deleted_meanwhile(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [5, *saved_steps(run_dir)]  # a removal under way took step 5 after the listing
    monkeypatch.setattr(folders, "saved_steps", lambda _run_dir: listed)
    here = [f"output_dir={run_dir.parent}", f"name={run_dir.name}"]
    assert prune(load_config(str(run_dir / "config.yaml"), here), newest_whole=40) == []
    monkeypatch.undo()
    assert saved_steps(run_dir) == [30, 40]


def test_prune_is_refused_while_the_run_is_at_work(run_dir: Path) -> None:
    with run_lock(run_dir, Life("7")) as lock:
        with pytest.raises(ConfigError, match=r"is in use: process \d+ on .*, job 7, since"):
            checkpoints(run_dir, Action.prune)
        checkpoints(run_dir, Action.list)
        checkpoints(run_dir, Action.verify)
        lock.check()
    assert saved_steps(run_dir) == [10, 20, 30, 40]
    checkpoints(run_dir, Action.prune)
    assert not (run_dir / LOCK_FILE).exists()


def test_prune_stops_when_a_run_took_the_folder_over(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-Z, minutes, and fg."""
    remove = module.remove

    def remove_and_lose(run_dir: Path, step: int) -> None:
        remove(run_dir, step)
        (run_dir / "other").write_text("{}")
        (run_dir / "other").replace(run_dir / LOCK_FILE)

    monkeypatch.setattr(module, "remove", remove_and_lose)
    with pytest.raises(LockLostError):
        checkpoints(run_dir, Action.prune)
    assert saved_steps(run_dir) == [20, 30, 40]


def test_mistyped_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoints in this folder"):
        checkpoints(tmp_path / "mistyped", Action.prune)
    assert not (tmp_path / "mistyped").exists()


def test_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoints in this folder"):
        checkpoints(tmp_path, Action.list)
