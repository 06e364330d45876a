"""``docs/benchmarks.md``: from the results that are there, saying which are not."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, harness, report
from distributed_lm import platform

MACHINE = {
    "python": "3.11.7",
    "cpus": 2,
    "threads": 2,
    "devices": "cpu",
    "processor": "a processor",
    "torch": "2.13.0",
    "megatron-core": "0.16.1",
    "deepspeed": "0.19.8",
}


def content(**fields: Any) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.example --rounds 3",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "machine": MACHINE,
        "load": 0.25,
        "ceilings": {},
        "ratios": {},
        "absent": {},
        "summary": [],
        "rows": [],
        **fields,
    }


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_what_is_missing_is_said_with_its_command(tmp_path: Path) -> None:
    page = report.render({}, tmp_path)
    kernels = section(page, "Attention kernels")
    assert "**Not measured.** On such a machine: `python -m benchmarks.gpu`" in kernels
    assert "**Not measured.** On such a machine: `python -m benchmarks.attention`" in kernels
    assert "python -m benchmarks.gpu" not in section(page, "Data")
    assert list(tmp_path.iterdir()) == []


def test_a_result_becomes_a_table_with_its_origin(tmp_path: Path) -> None:
    rows = [
        {"what": "load", "GB/s": 1.25, "note": None},
        {"what": "save", "GB/s": 12345.6, "note": None},
    ]
    found = content(
        rows=rows,
        ceilings={"copy, GB/s": 5.0},
        ratios={"load / copy": {"value": 0.25, "low": 0.2, "high": 0.3}},
        absent={"flash": "no GPU"},
    )
    page = report.render({"checkpoint": {"cpu": found}, "novel": {"cpu": found}}, tmp_path)
    text = section(page, "Checkpoints")
    assert "| what | GB/s |\n| --- | --- |\n| load | 1.25 |\n| save | 12,346 |\n" in text
    assert "| load / copy | 0.25 | 0.2–0.3 |" in text
    assert "`python -m benchmarks.example --rounds 3`" in text
    assert "commit abc1234, 2026-01-02,\nload 0.2" in text
    assert "torch 2.13.0" in text
    assert "Ceilings: copy, GB/s 5." in text
    assert "- flash: no GPU" in text
    assert "Not measured." not in text
    assert "| load | 1.25 |" in section(page, "novel")


def test_a_gpu_has_a_part_of_its_own_and_long_tables_are_folded(tmp_path: Path) -> None:
    row = {
        "precision": "bf16",
        "head dim": 64,
        "L": 1024,
        "pass": "forward + backward",
        "kernel": "flex",
        "TFLOP/s": 321.0,
    }
    machine = {**MACHINE, "devices": "NVIDIA Example", "cuda": "12.9"}
    found = content(rows=[row], summary=[{"L": 1024, "flex": 321.0}], machine=machine)
    page = report.render({"attention": {"nvidia-example": found}}, tmp_path)
    text = section(page, "Attention kernels")
    short, _, folded = text.partition("<details>")
    assert "### Attention kernels: NVIDIA Example" in short
    assert "NVIDIA Example, CUDA 12.9 · a processor" in short
    assert "| 1024 | 321 |" in short
    assert "| bf16 | 64 | 1024 |" in folded
    assert "python -m benchmarks.gpu" not in text
    assert "Attention kernels: CPU\n\n**Not measured.**" in text
    assert "images/benchmark_attention_nvidia-example.png" in short
    plot = tmp_path / "benchmark_attention_nvidia-example.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_page_in_docs_is_of_the_results_in_the_repository(tmp_path: Path) -> None:
    """If not: python -m benchmarks.report"""
    page = report.render(report.load(harness.RESULTS), tmp_path)
    assert (report.DOCS / "benchmarks.md").read_text() == page
    assert {path.name for path in tmp_path.iterdir()} == {
        path.name for path in (report.DOCS / "images").glob("benchmark_*.png")
    }


@pytest.mark.skipif(platform.has_cuda(), reason="there is a GPU")
def test_the_gpu_command_without_one_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main() == 2
    assert "error: torch sees no CUDA device; run this where there is a GPU" in " ".join(
        capsys.readouterr().err.split()
    )
