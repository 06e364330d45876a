"""``ledger A B``: the first step where two runs saw other tokens."""

import json
from pathlib import Path

import pytest

from distributed_lm.errors import DataError
from distributed_lm.ledger import ledger, read_digests


def write(run_dir: Path, digests: dict[int, str], extra: str = "") -> Path:
    run_dir.mkdir()
    lines = [
        json.dumps({"kind": "train", "step": step, "data_digest": digest})
        for step, digest in digests.items()
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n" + extra)
    return run_dir


def test_equal_runs_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", {1: "x" * 64, 2: "y" * 64, 3: "z" * 64})
    second = write(tmp_path / "b", {1: "x" * 64, 2: "y" * 64})
    assert ledger(first, second)
    assert "same tokens in every update up to step 2 (2 recorded steps" in capsys.readouterr().out


def test_first_different_step_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a", {1: "x" * 64, 2: "y" * 64, 3: "z" * 64})
    second = write(tmp_path / "b", {1: "x" * 64, 2: "q" * 64, 3: "r" * 64})
    assert not ledger(first, second)
    assert "the same up to step 1, different from step 2" in capsys.readouterr().out


def test_steps_done_again_count_as_done_last_and_torn_lines_do_not(tmp_path: Path) -> None:
    run = write(tmp_path / "a", {1: "x" * 64}, extra='{"kind": "train", "step": 1, "data_dig')
    assert read_digests(run) == {1: "x" * 64}
    again = {"kind": "train", "step": 1, "data_digest": "new"}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write("\n" + json.dumps(again) + "\n")
    assert read_digests(run) == {1: "new"}


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {1: "x" * 64})
    second = write(tmp_path / "b", {2: "x" * 64})
    with pytest.raises(DataError, match="no common step"):
        ledger(first, second)
    with pytest.raises(DataError, match="give a run folder"):
        ledger(first, tmp_path / "nowhere")
