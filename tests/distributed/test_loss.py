"""The fused loss is the unfused one, on one rank and with the vocabulary split over two."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from distributed_lm.model import loss as module
from distributed_lm.model.loss import linear_cross_entropy, losses_and_gradient
from tests.support.ranks import run_distributed

TOKENS, HIDDEN, VOCAB = 300, 24, 96


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, labels and mask; scores wide enough for wrong maxima to overflow."""
    generator = torch.Generator().manual_seed(5)
    hidden = 8.0 * torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) < 0.8
    return hidden.to(dtype), weight.to(dtype), labels, mask


def unfused(dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    hidden, weight, labels, mask = inputs(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")
    summed = (losses * mask).sum()
    (summed / 7.0).backward()
    return as_arrays(summed, losses, hidden.grad, weight.grad)


def fused(
    rows: int, dtype: torch.dtype = torch.float32, of_chunk: Any = None
) -> dict[str, np.ndarray]:
    """On this rank's part of the vocabulary, ``rows`` tokens at a time."""
    module.MIN_ROWS, module.MAX_LOGITS = rows, {"cpu": 1}
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    group = dist.group.WORLD if ranks > 1 else None
    hidden, weight, labels, mask = inputs(dtype)
    hidden.requires_grad_()
    shard = weight.chunk(ranks)[rank].clone().requires_grad_()
    summed, losses = linear_cross_entropy(hidden, shard, labels, mask, group, of_chunk)
    assert not losses.requires_grad
    (summed / 7.0).backward()
    return as_arrays(summed, losses, hidden.grad, shard.grad)


def fused_on_ranks(rows: int) -> dict[str, np.ndarray]:
    dist.init_process_group("gloo")
    return fused(rows)


def as_arrays(*tensors: torch.Tensor | None) -> dict[str, np.ndarray]:
    names = ("summed", "losses", "grad_hidden", "grad_weight")
    arrays = (tensor.detach().float().numpy() for tensor in tensors if tensor is not None)
    return dict(zip(names, arrays, strict=True))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, Any], tolerance: float) -> None:
    """Relative to the largest entry: gradients have entries that cancel."""
    for name, values in expected.items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(found[name] / scale, values / scale, atol=tolerance, rtol=0.0)


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_ROWS", module.MIN_ROWS)
    monkeypatch.setattr(module, "MAX_LOGITS", module.MAX_LOGITS)


@pytest.mark.parametrize("rows", [TOKENS, 150, 64, 16])
def test_fused_equals_unfused(rows: int) -> None:
    assert_equal(fused(rows), unfused(), 1e-6)


@pytest.mark.slow
def test_compiled_equals_unfused() -> None:
    compiled = torch.compile(losses_and_gradient, fullgraph=True, dynamic=False)
    assert_equal(fused(150, of_chunk=compiled), unfused(), 1e-6)


def test_vocabulary_parallel_equals_unfused() -> None:
    parts = run_distributed(fused_on_ranks, 2, 64)
    expected = unfused()
    joined = {
        **parts[0],
        # Each rank has its own columns' share of the one, its own rows of the other.
        "grad_hidden": parts[0]["grad_hidden"] + parts[1]["grad_hidden"],
        "grad_weight": np.concatenate([part["grad_weight"] for part in parts]),
    }
    assert_equal(joined, expected, 1e-6)
    np.testing.assert_array_equal(parts[1]["losses"], parts[0]["losses"])


def test_chunks_are_summed_in_fp32() -> None:
    """The gradient of a bf16 weight is as exact in many chunks as in one."""
    exact = unfused()["grad_weight"]
    errors = [
        np.abs(fused(rows, torch.bfloat16)["grad_weight"] - exact).max() / np.abs(exact).max()
        for rows in (TOKENS, 2)
    ]
    assert errors[1] < 1.5 * errors[0]


def test_sum_too_large_for_fp16_is_a_mean_that_fits() -> None:
    """Every token has one label and hidden states of 20: the sum of the gradients is above 65504
    over all chunks, and the mean is 20."""
    module.MIN_ROWS, module.MAX_LOGITS = 2048, {"cpu": 1}
    hidden = torch.full((8192, 2), 20.0, dtype=torch.float16)
    weight = torch.zeros(64, 2, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(8192, dtype=torch.int64)
    summed, _ = linear_cross_entropy(hidden, weight, labels, None, None)
    (summed / 8192).backward()
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad[0].numpy(), -20.0 * 63 / 64, rtol=2e-3)


def test_without_gradients_there_are_only_losses() -> None:
    hidden, weight, labels, mask = inputs()
    weight.requires_grad_()
    with torch.no_grad():
        summed, losses = linear_cross_entropy(hidden, weight, labels, mask, None)
    assert not summed.requires_grad
    assert_equal({"losses": losses.numpy()}, {"losses": unfused()["losses"]}, 1e-6)


def test_whole_logits_are_never_in_memory() -> None:
    """Of all tensors that a step makes none has more entries than a chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    module.MIN_ROWS, module.MAX_LOGITS = 64, {"cpu": 1}
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            made = function(*arguments, **(options or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return made

    hidden, weight, labels, mask = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    with Watch():
        summed, _ = linear_cross_entropy(hidden, weight, labels, mask, None)
        summed.backward()
    assert largest <= max(64 * VOCAB, TOKENS * HIDDEN)
