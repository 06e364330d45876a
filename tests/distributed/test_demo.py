"""The demo from end to end, far too short to show anything, and it must say so."""

from pathlib import Path

import pytest

from distributed_lm.demo import demo
from distributed_lm.errors import TrainingError

SHORT = (
    "train.steps=2", "model.num_layers=1", "evaluation.max_tokens=4096", "tracking.wandb=disabled",
    "batch.global_batch_size=4", "batch.micro_batch_size=4",
)  # fmt: skip


def test_short_demo_reports_and_says_that_nothing_shows(demo_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    with pytest.raises(TrainingError, match="did not show the paper's effect"):
        demo(output, overrides=(*SHORT, f"data.path={demo_data}"))
    report = (output / "report.md").read_text()
    assert "for 2 steps of 256 tokens" in report
    assert "| sinusoidal |" in report
    assert (output / "plots" / "extrapolation.png").is_file()
    assert (output / "demo-alibi" / "checkpoints" / "step_00000002").is_dir()
