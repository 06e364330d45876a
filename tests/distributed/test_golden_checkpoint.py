"""A checkpoint that an earlier version wrote keeps loading, and its run goes on as before."""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed_lm.checkpoint.manifest import MANIFEST, write_manifest
from distributed_lm.config import load_config
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, train_run

GOLDEN = Path("tests/golden/checkpoint")
CONTINUED = Path("tests/golden/checkpoint_losses.json")


def continue_run(demo_data: Path, output_dir: Path) -> list[dict[str, Any]]:
    overrides = [f"data.path={demo_data}", f"output_dir={output_dir}", "train.steps=6"]
    config = load_config(output_dir / "golden", overrides)
    run_distributed(train_run, 1, config)
    return Runs.records(config)["train"]


def assert_as_before(lines: list[dict[str, Any]]) -> None:
    golden = json.loads(CONTINUED.read_text())
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    # Started over, the loss would be that of a fresh model: half a nat higher.
    np.testing.assert_allclose([line["loss"] for line in lines], golden["losses"], rtol=2e-4)
    assert lines[-1]["data_digest"] == golden["data_digest"]


def test_committed_checkpoint_continues_the_run(demo_data: Path, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    assert_as_before(continue_run(demo_data, tmp_path))


def zero_tensors(folder: Path, kind: str) -> None:
    """Overwrite the stored tensors of that kind, and have the manifest vouch for it."""
    stored = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    for index, place in stored.items():
        if index.fqn.startswith(f"{kind}."):
            with (folder / place.relative_path).open("r+b") as stream:
                stream.seek(place.offset)
                values = torch.load(io.BytesIO(stream.read(place.length)))
                assert values.any()
                stream.seek(place.offset)
                torch.save(torch.zeros_like(values), stream)
                assert stream.tell() == place.offset + place.length
    (folder / MANIFEST).unlink()
    write_manifest(folder, 2, {})


@pytest.mark.parametrize("kind", ["optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.master"])
def test_comparison_sees_the_optimizers_state(kind: str, demo_data: Path, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    zero_tensors(tmp_path / "golden" / "checkpoints" / "step_00000002", kind)
    lines = continue_run(demo_data, tmp_path)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_as_before(lines)
