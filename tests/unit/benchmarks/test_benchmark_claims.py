"""The benchmark of the paper's claims at its smallest: real engines in processes of their own."""

import pytest
import torch

from benchmarks import claims, harness
from distributed_lm.config import RunConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plan(base: RunConfig, device: torch.device) -> list[tuple[str, int, str]]:
    cases = claims.plan_cases(base, device)
    micro = {(case.config.batch.micro_batch_size * case.length) for case in cases}
    assert len({case.config.tokens_per_step for case in cases}) == len(micro) == 1
    return [(case.position, case.length, case.kernel) for case in cases]


def test_both_methods_have_every_kernel_at_equal_tokens() -> None:
    cases = plan(claims.base_config("small"), CPU)
    for position in ("alibi", "sinusoidal"):
        assert {(position, 1024, "sdpa"), (position, 1024, "reference")} < set(cases)
        assert (position, 2048, "sdpa") in cases
    assert ("alibi", 2048, "reference") in cases


def test_on_a_gpu_the_papers_model_with_each_methods_own_fused_kernel() -> None:
    base = claims.base_config("paper")
    assert (base.model.num_layers, base.precision) == (25, "bf16")
    cases = plan(base, CUDA)
    assert {kernel for method, _, kernel in cases if method == "sinusoidal"} >= {"sdpa", "flex"}
    longer = {(method, kernel) for method, length, kernel in cases if length == 2048}
    assert longer == {("alibi", "flex"), ("alibi", "reference"), ("sinusoidal", "sdpa")}


def test_the_smallest_size_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "device", lambda: CPU)
    options = harness.arguments(claims.parser(), ["--model=tiny", "--rounds=2"])
    result = claims.measure(options)
    assert len(result.rows) == 9
    for row in result.rows:
        assert row["tokens/s"] == pytest.approx(128 / row["s/step"])
        assert 100 < row["peak MiB, resident"] < 4000
    assert len(result.summary) == len(result.ratios) == 6
    rows = {(row["position"], row["L"], row["kernel"]): row for row in result.rows}
    short = next(row for row in result.summary if row["claim"].endswith("128, materialised"))
    left, right = rows["alibi", 64, "reference"], rows["alibi", 128, "reference"]
    difference = left["peak MiB, resident"] - right["peak MiB, resident"]
    assert short["memory, MiB"] == pytest.approx(difference)
    inverse = result.ratios["inverse time, ALiBi L / ALiBi 2L, materialised"]
    assert inverse.value == pytest.approx(1 / short["time"])
    assert inverse.low <= inverse.value <= inverse.high
