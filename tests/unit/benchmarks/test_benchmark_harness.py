"""What the benchmarks share: timing in turns, ratios, peak memory, JSON."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Ratio, Result, Samples

CPU = torch.device("cpu")


def test_a_ratio_compares_within_rounds() -> None:
    """One round on which the machine was ten times slower changes nothing."""
    ours, other = Samples((2.0, 20.0, 2.2)), Samples((1.0, 10.0, 1.1))
    ratio = ours.ratio_to(other)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert Ratio.of([1.0, 2.0, 4.0]) == Ratio(value=2.0, low=1.5, high=3.0)
    assert Ratio.of([3.0]) == Ratio(3.0, 3.0, 3.0)


def test_cases_take_turns_after_the_warm_up() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    samples = harness.alternate(cases, rounds=3, device=CPU, warmup=2)
    assert "".join(calls) == "ab" * 5
    assert {name: len(sample.seconds) for name, sample in samples.items()} == {"a": 3, "b": 3}


def test_a_short_case_is_repeated_and_its_seconds_are_of_one_call() -> None:
    calls: list[float] = []

    def case() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.002)

    samples = harness.alternate({"short": case}, 2, CPU, seconds_each=0.02)["short"]
    assert 6 <= len(calls) <= 2 + 2 * 10  # fewer where the machine is busy
    assert 0.002 <= min(samples.seconds) < 0.02


def test_peak_memory_is_what_a_call_takes() -> None:
    size = 64 * 2**20

    def takes_twice() -> None:
        first = torch.ones(size // 4)
        first + 1.0

    assert harness.peak_memory_bytes(lambda: None, CPU) < size // 4
    assert 1.9 * size < harness.peak_memory_bytes(takes_twice, CPU) < 2.5 * size


def test_a_result_says_where_and_how_it_was_measured(tmp_path: Path) -> None:
    result = Result("example", CPU, rows=[{"case": "one", "s": 0.5, "note": None}])
    result.ratios["ours / theirs"] = Ratio(1.5, 1.25, 2.0)
    result.absent["flash"] = "no GPU"
    path = result.write(tmp_path)
    assert path == tmp_path / "cpu" / "example.json"
    content = json.loads(path.read_text())
    assert content["rows"] == [{"case": "one", "s": 0.5, "note": None}]
    assert content["ratios"]["ours / theirs"] == {"value": 1.5, "low": 1.25, "high": 2.0}
    assert content["absent"] == {"flash": "no GPU"}
    assert content["command"].startswith("python -m benchmarks.example")
    assert content["machine"]["torch"] == torch.__version__
    assert "host" not in content["machine"]


def test_cells() -> None:
    values = (None, 1234.5, 0.123456, 1024, "text")
    assert [harness.shown(value) for value in values] == ["–", "1,234", "0.1235", "1024", "text"]
