"""``distributed-lm check RUN``: the newest whole checkpoint is verified and loaded."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import pytest

from distributed_lm.check import check
from distributed_lm.checkpoint.folders import checkpoint_path, read_state
from distributed_lm.checkpoint.manifest import MANIFEST, write_manifest
from distributed_lm.config import load_config
from distributed_lm.errors import CheckpointError
from tests.support.ranks import run_distributed
from tests.support.runs import Runs

SHORT = (
    "model.num_layers=2", "train.steps=4", "checkpoint.save_every=2", "evaluation.lengths=[64]",
    "evaluation.max_tokens=512",
)  # fmt: skip


@pytest.fixture
def run_dir(demo_data: Path, tmp_path: Path) -> Path:
    """Of a run with checkpoints of steps 2 and 4."""
    runs = Runs(demo_data, tmp_path)
    runs.train("run", *SHORT)
    return tmp_path / "run"


def check_run(run_dir: Path, *overrides: str) -> str:
    """What the command prints on this rank, or why it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            check(load_config(run_dir, list(overrides)))
        except CheckpointError as error:
            return str(error)
    return printed.getvalue()


def report(run_dir: Path, world_size: int = 1, *overrides: str) -> str:
    return run_distributed(check_run, world_size, run_dir, *overrides)[0]


WHOLE = "saved on data=1 tensor=1 pipeline=1: hashes as in its manifest, its weights load here"


def test_newest_checkpoint_is_verified_and_loaded(run_dir: Path) -> None:
    for printed in (report(run_dir), report(run_dir, 2, "parallel.tensor=2")):
        assert re.search(f"^checkpoint +step 4, {WHOLE}$", printed, re.MULTILINE)
        assert printed.endswith("ready\n")


def test_damaged_checkpoint_is_named_and_the_one_before_is_loaded(run_dir: Path) -> None:
    shard = checkpoint_path(run_dir, 4) / "__0_0.distcp"
    os.truncate(shard, 1000)
    printed = report(run_dir)
    assert f"{shard}: damaged: expected " in printed
    assert f"step 2, {WHOLE}" in printed


def test_weights_are_really_loaded(run_dir: Path, demo_data: Path, tmp_path: Path) -> None:
    """Every file is as its manifest says, but the tensors are another model's."""
    wide = (*SHORT, "model.hidden_size=128", "checkpoint.save_every=0")
    Runs(demo_data, tmp_path).train("wide", *wide)
    folder = checkpoint_path(run_dir, 4)
    for name in (".metadata", "__0_0.distcp"):
        shutil.copy(checkpoint_path(tmp_path / "wide", 4) / name, folder / name)
    (folder / MANIFEST).unlink()
    write_manifest(folder, 4, {}, read_state(run_dir, 4)["save"])
    message = report(run_dir)
    assert "128), the config asks for (" in message
    assert "ready" not in message
