"""The gate over the benchmarks' ratios: what it says of made-up ones, and that it passes here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benches
from benchmarks import gate
from benchmarks.bubble import bubbles
from benchmarks.gate import Verdict

ROOT = Path(__file__).parents[3]
RECORDED = {
    "parallel: tensor": {"value": 0.8, "tolerance": 0.25},
    "data: batches": {"value": 2.0, "tolerance": 0.5},
}


def verdicts(measured: dict[str, float]) -> dict[str, Verdict]:
    return {judgement.name: judgement.verdict for judgement in gate.compare(measured, RECORDED)}


def test_ratios_within_their_tolerance_hold() -> None:
    judgements = gate.compare({"parallel: tensor": 0.601, "data: batches": 9.0}, RECORDED)
    assert [judgement.verdict for judgement in judgements] == [Verdict.held, Verdict.held]
    assert not any(judgement.is_bad for judgement in judgements)
    assert judgements[0].limit == pytest.approx(0.6)


@pytest.mark.parametrize("value", [0.599, 0.0, math.nan])
def test_a_worse_ratio_is_found(value: float) -> None:
    [tensor, batches] = gate.compare({"parallel: tensor": value, "data: batches": 2.0}, RECORDED)
    assert tensor.verdict is Verdict.worse
    assert tensor.is_bad
    assert not batches.is_bad


def test_a_missing_ratio_is_named_and_an_unknown_one_is_said() -> None:
    judgements = gate.compare({"data: batches": 2.0, "data: new": 1.0}, RECORDED)
    by_name = {judgement.name: judgement for judgement in judgements}
    assert by_name["parallel: tensor"].verdict is Verdict.missing
    assert by_name["parallel: tensor"].is_bad
    assert by_name["data: new"].verdict is Verdict.unknown
    assert not by_name["data: new"].is_bad


def test_a_new_record_keeps_tolerances_and_forgets_what_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    gate.write_baseline("cpu", "full", RECORDED, path)
    gate.write_baseline("gpu", "full", RECORDED, path)
    values = gate.record({"parallel: tensor": 0.9, "data: new": 1.0}, RECORDED, 0.3)
    gate.write_baseline("cpu", "full", values, path)
    assert gate.read_baseline("cpu", "full", path) == {
        "parallel: tensor": {"value": 0.9, "tolerance": 0.25},
        "data: new": {"value": 1.0, "tolerance": 0.3},
    }
    assert gate.read_baseline("gpu", "full", path) == RECORDED
    assert gate.read_baseline("cpu", "light", path) == {}


def test_bubble_is_what_a_line_leaves_at_no_microbatches() -> None:
    # 3 s for each microbatch, and one more that waits: p − 1 = 1.
    shares = bubbles({count: (3.0 * count + 3.0, 6.0 * count) for count in (2, 4, 8)})
    assert shares[2] == pytest.approx([1 / 2, 0.0])
    assert shares[8] == pytest.approx([1 / 8, 0.0])


def test_every_benchmark_is_a_command_with_the_options_it_is_given() -> None:
    for name, given in {**benches.FULL, **benches.LIGHT}.items():
        source = ROOT / "benchmarks" / f"{name}.py"
        if not source.exists():
            continue
        text = source.read_text()
        assert "harness.main(parser(), measure)" in text, name
        for option in given:
            assert not option.startswith("--") or option == "--rounds" or f'"{option}"' in text


def test_a_regression_is_measured_twice_and_ends_with_exit_code_1(tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    impossible = {"startup: launch slurm --dry-run: speed to importing its libraries": 1000.0}
    values = {name: {"value": value, "tolerance": 0.1} for name, value in impossible.items()}
    gate.write_baseline("cpu", "light", values, baseline)
    done = run_gate("--light", "--only", "startup", "--baseline", str(baseline))
    assert done.returncode == 1
    assert "measured again: startup" in done.stdout
    assert done.stdout.count("python -m benchmarks.startup") == 2
    assert "REGRESSION" in done.stdout
    assert "not on record" in done.stdout  # --help is measured, too


@pytest.mark.slow
def test_light_benchmarks_hold_their_ratios() -> None:
    recorded = json.loads(gate.BASELINE.read_text())["cpu"]["light"]
    assert {name.partition(": ")[0] for name in recorded} == set(benches.LIGHT)
    done = run_gate("--light")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" ok ") >= len(recorded)


def run_gate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As on a machine without a GPU: CI compares the ratios of its processor."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
