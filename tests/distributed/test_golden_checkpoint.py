"""A checkpoint that an earlier version wrote keeps loading, and its run goes on as before."""

import json
import shutil
from pathlib import Path

import numpy as np

from distributed_lm.config import load_config
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, train_run

GOLDEN = Path("tests/golden/checkpoint")
CONTINUED = Path("tests/golden/checkpoint_losses.json")


def test_committed_checkpoint_continues_the_run(demo_data: Path, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    overrides = [f"data.path={demo_data}", f"output_dir={tmp_path}", "train.steps=6"]
    config = load_config(tmp_path / "golden", overrides)
    run_distributed(train_run, 1, config)
    lines = Runs.records(config)["train"]
    golden = json.loads(CONTINUED.read_text())
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    # Started over, the loss would be that of a fresh model: half a nat higher.
    np.testing.assert_allclose([line["loss"] for line in lines], golden["losses"], rtol=2e-4)
    assert lines[-1]["data_digest"] == golden["data_digest"]
