"""The benchmark of the attention kernels at its smallest, and what it must not let through."""

import pytest
import torch

from benchmarks import attention, harness
from benchmarks.attention import BASELINE, Shape
from benchmarks.harness import Result
from distributed_lm.model.attention_backends import BACKENDS

CPU = torch.device("cpu")
OPTIONS = ["--rounds=1", "--heads=2", "--tokens=64", "--head-dims=16", "--precisions=fp32"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "device", lambda: CPU)
    attention.check.cache_clear()


def measure(*options: str) -> Result:
    return attention.measure(harness.arguments(attention.parser(), [*OPTIONS, *options]))


def test_flops_count_the_causal_half() -> None:
    shape = Shape(torch.float32, head_dim=8, length=4, heads=2, tokens=12)
    scores = 3 * 2 * 4 * 4 / 2  # sequences, heads, below the diagonal
    assert shape.flops("forward") == scores * 8 * 2 * 2  # two products, multiply and add
    assert shape.flops("forward + backward") == 3.5 * shape.flops("forward")


def test_every_kernel_of_this_device_has_rows_and_the_others_a_reason() -> None:
    result = measure("--lengths=32,64")
    kernels = {(row["L"], row["pass"], row["kernel"]) for row in result.rows}
    assert kernels == {
        (length, which, kernel)
        for length in (32, 64)
        for which in attention.PASSES
        for kernel in (BASELINE, "matmul, no bias", "reference", "sdpa", "matmul")
    }
    assert set(result.absent) == {"flex, fp32", "flash, fp32"}
    for row in result.rows:
        flops = Shape(torch.float32, 16, row["L"], 2, 64).flops(row["pass"])
        assert row["TFLOP/s"] == pytest.approx(flops / row["ms"] / 1e9)
    assert [row["L"] for row in result.summary] == [32, 64]
    assert result.summary[0]["flex, TFLOP/s"] is None
    assert len(result.ratios) == 2


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(*inputs: torch.Tensor, position: object) -> torch.Tensor:
        return BACKENDS["reference"](*inputs, position=position).flip(1)

    monkeypatch.setitem(BACKENDS, "sdpa", backwards)
    with pytest.raises(RuntimeError, match=r"^sdpa is wrong by .* at fp32, head dim 16, L=32$"):
        measure("--lengths=32")


def test_a_reference_that_does_not_fit_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "memory_limit", lambda device: 5 * 4 * 2 * 2 * 32**2)
    result = measure("--lengths=32,64")
    lengths = {row["L"] for row in result.rows if row["kernel"] == "reference"}
    assert lengths == {32}
    assert "would take about" in result.absent["reference, fp32, head dim 16, L=64"]
