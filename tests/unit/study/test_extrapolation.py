"""Curves from evaluation files, their table and picture, and the demo's verdict."""

import math
from pathlib import Path

import pytest

from distributed_lm.config import RunConfig, load_config
from distributed_lm.demo import check_effect, summary
from distributed_lm.errors import DataError, TrainingError
from distributed_lm.evaluation.results import write_result
from distributed_lm.study.extrapolation import Curve, draw, markdown_table, read_curve
from tests.support.results import NO_DOCUMENTS, make_result

LENGTHS = (64, 128, 256, 512)


def curve(label: str, *perplexities: float) -> Curve:
    return Curve(label, 64, dict(zip(LENGTHS, perplexities, strict=True)), 1000)


GOOD = [curve("ALiBi", 4.0, 3.9, 3.9, 4.0), curve("sinusoidal", 5.0, 8.0, 12.0, 20.0)]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    overrides = [f"output_dir={tmp_path}", "evaluation.lengths=[64,128]", "train.steps=20"]
    return load_config("configs/runs/smoke.yaml", overrides)


def write(config: RunConfig, length: int, tokens: int = 1000, step: int = 20) -> None:
    result = make_result(length=length, loss=math.log(length), tokens_scored=tokens, step=step)
    write_result(config.run_dir, result, NO_DOCUMENTS)


def test_curve_takes_the_last_step_at_the_configured_lengths(config: RunConfig) -> None:
    for length in (64, 128, 4096):
        write(config, length)
        write(config, length, step=10)
    assert read_curve(config, "ALiBi").perplexities == pytest.approx({64: 64.0, 128: 128.0})


def test_results_of_other_tokens_neither_overwrite_nor_mix(config: RunConfig) -> None:
    write(config, 64)
    write(config, 128)
    write(config, 64, tokens=500)
    assert len(list((config.run_dir / "evaluation").glob("*.json"))) == 3
    with pytest.raises(DataError, match="expected one result at step 20 for each"):
        read_curve(config, "ALiBi")


def test_lengths_scored_on_different_tokens_are_no_curve(config: RunConfig) -> None:
    write(config, 64)
    write(config, 128, tokens=500)
    with pytest.raises(DataError, match="scored on different tokens"):
        read_curve(config, "ALiBi")


def test_table_has_a_row_per_run_and_a_column_per_length() -> None:
    lines = markdown_table(GOOD).splitlines()
    assert lines[0] == "| position | 64 (1L) | 128 (2L) | 256 (4L) | 512 (8L) |"
    assert lines[2] == "| ALiBi | 4.000 | 3.900 | 3.900 | 4.000 |"
    assert lines[3] == "| sinusoidal | 5.000 | 8.000 | 12.000 | 20.000 |"


def test_picture_is_a_png(tmp_path: Path) -> None:
    draw(GOOD, tmp_path / "plots" / "curve.png")
    assert (tmp_path / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_summary_gives_ratios_and_the_gap_at_the_trained_length() -> None:
    first, second, third = summary(GOOD)
    assert "0.975 times its perplexity at L, and at most 1.000 times up to 8L" in first
    assert "1.600 times" in second
    assert "+25.0% from ALiBi (5.000 against 4.000)" in third


@pytest.mark.parametrize(
    "curves",
    [
        [curve("ALiBi", 4.0, 4.01, 3.9, 3.9), GOOD[1]],
        [curve("ALiBi", 4.0, 3.9, 3.9, 4.3), GOOD[1]],
        [GOOD[0], curve("sinusoidal", 5.0, 6.0, 12.0, 20.0)],
    ],
    ids=["alibi at 2L", "alibi at 8L", "sinusoidal at 2L"],
)
def test_demo_fails_without_the_effect(curves: list[Curve]) -> None:
    check_effect(GOOD)
    with pytest.raises(TrainingError, match="did not show"):
        check_effect(curves)
