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


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_layout_that_does_not_divide_is_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "best.yaml"
    assert run(PAPER, "--cluster", H100, "--nodes", "3", "--write", str(path)) == 0
    said = capsys.readouterr().out
    assert "as configured: not possible: batch.global_batch_size=2048 is not a mul" in said
    assert "Memory of a rank" not in said
    assert "legal layouts" in said
    assert load_config(path).parallel.pipeline == 3
    assert run(PAPER, "--cluster", H100, "--nodes", "3", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["devices"] == 24
    assert made["layout"] is None
    assert made["best"]["parallel.pipeline"] == 3


def cluster_of(path: Path, gigabytes: float) -> str:
    path.write_text(f"devices_per_node: 8\ndevice_memory_gb: {gigabytes}\n")
    return str(path)


def test_says_whether_the_configured_layout_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster = tmp_path / "cluster.yaml"
    assert run(PAPER, "--cluster", cluster_of(cluster, 80)) == 0
    [said] = [line for line in capsys.readouterr().out.splitlines() if "it fits" in line]
    left = float(said.split("it fits, ")[1].split(" GB are left")[0])
    assert run(PAPER, "--cluster", cluster_of(cluster, 79 - left)) == 0
    assert "as configured: it does not fit, 1.0 GB are missing" in capsys.readouterr().out


def test_nothing_fits_is_an_error_after_the_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(PAPER, "--cluster", cluster_of(tmp_path / "cluster.yaml", 1)) == 2
    said = capsys.readouterr()
    assert "too large" in said.out
    assert "no layout fits: the smallest (data=" in said.err
    assert "raise the number of nodes" in said.err


def test_refuses_to_write_before_the_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "best.yaml"
    path.touch()
    assert run(PAPER, "--cluster", H100, "--write", str(path)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "exists; give another name" in said.err
