"""``distributed-lm plan`` as it is called: fast, without torch, readable, and as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_lm import cli
from distributed_lm.config import load_config

ROOT = Path(__file__).parents[2]
PAPER = str(ROOT / "configs/runs/alibi_1p3b_L1024.yaml")
H100 = str(ROOT / "configs/clusters/h100_8x16.yaml")

TIMED = """
import sys, time
start = time.perf_counter()
from distributed_lm import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0
print(time.perf_counter() - start, *sys.modules, file=sys.stderr)
"""


def test_plan_of_the_papers_run_imports_no_torch_and_takes_a_second() -> None:
    command = [sys.executable, "-c", TIMED, "plan", PAPER, "--cluster", H100]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *modules = done.stderr.split()
    assert "torch" not in modules
    assert "distributed_lm.planner.search" in modules
    assert float(seconds) < 5  # 0.7 on an idle machine; tests share theirs
    for expected in ("1,363,818,496 parameters", "parallel.tensor=2: at best", "moments", "MFU"):
        assert expected in done.stdout


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", PAPER, "--cluster", H100, "--nodes", "2", "--json", "--write", str(path)])
    assert ended.value.code == 0
    made = json.loads(capsys.readouterr().out)
    assert made["devices"] == 16
    assert made["parameters"] == 1_363_818_496
    assert sum(made["step_seconds"].values()) == pytest.approx(2 * made["step_seconds"]["total"])
    tokens = 2048 * 1024
    assert made["tokens_per_second"] == pytest.approx(tokens / made["step_seconds"]["total"])
    written = load_config(path)
    assert written.batch.micro_batch_size == made["best"]["batch.micro_batch_size"]
    assert written.zero.stage == made["best"]["zero.stage"]


def test_unprepared_data_without_a_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    smoke = str(ROOT / "configs/runs/smoke.yaml")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", smoke, "data.path=nowhere", "--cluster", H100])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "data.path=nowhere is not prepared" in said
    assert "set model.vocab_size" in said
