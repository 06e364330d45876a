"""The GPU kernels against the fp32 reference, forward and backward, at the sizes of real models."""

import pytest
import torch
from torch import Tensor

from distributed_lm.model.attention_backends import BACKENDS
from distributed_lm.model.backend_choice import unavailable_reason
from distributed_lm.model.positions import METHODS, HeadSlice, PositionMethod, build_position
from tests.support.gpu import requires_gpu
from tests.support.training import tiny_config

pytestmark = [
    pytest.mark.gpu,
    requires_gpu,
    pytest.mark.timeout(900),  # each shape is compiled once
    pytest.mark.filterwarnings("default"),  # Inductor's advice is no error of ours
]

DEVICE = torch.device("cuda")
HEADS = 16
KERNELS = ["flex", "flash", "sdpa"]
# Of the norm of output and gradients. bf16 rounds inputs, weights and output once each (2^-9); a
# wrong slope, sign or offset is off by a tenth or more.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-3}


def position_method(name: str, heads: HeadSlice) -> PositionMethod:
    position = build_position(tiny_config(model={"position": name}).model, heads).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(heads.first)
    for weight in position.parameters():  # as built, it is zero
        weight.data.normal_(generator=generator)
    return position


def draw(
    length: int, head_dim: int, groups: int, dtype: torch.dtype, queries: int | None = None
) -> list[Tensor]:
    """Query, key, value laid out as Megatron hands them over: [S, B, N, H] underneath."""
    generator = torch.Generator(DEVICE).manual_seed(length + head_dim)
    batch = 2 if length <= 1024 else 1
    shapes = [(queries or length, HEADS), (length, groups), (length, groups)]
    return [
        torch.randn(size, batch, count, head_dim, device=DEVICE, generator=generator)
        .to(dtype)
        .permute(1, 2, 0, 3)
        for size, count in shapes
    ]


def forward_backward(backend: str, inputs: list[Tensor], position: PositionMethod) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    weights = list(position.parameters()) if position.has_bias else []
    position.zero_grad()
    output = BACKENDS[backend](*leaves, position)
    assert output.dtype == inputs[0].dtype
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = torch.randn(output.shape, device=DEVICE, generator=generator)
    output.backward(upstream.to(output.dtype))
    gradients = [leaf.grad.float() for leaf in (*leaves, *weights)]
    return [output.detach().float(), *gradients]


def assert_equals_reference(backend: str, inputs: list[Tensor], position: PositionMethod) -> None:
    reason = unavailable_reason(backend, position, DEVICE, inputs[0].dtype)
    if reason:
        pytest.skip(reason)
    expected = forward_backward("reference", inputs, position)
    live = forward_backward(backend, inputs, position)
    names = ("output", "dq", "dk", "dv", "dtable")[: len(expected)]
    for what, one, other in zip(names, live, expected, strict=True):
        error = float((one - other).norm() / other.norm())
        assert error < TOLERANCES[inputs[0].dtype], f"{what}: relative error {error:.3g}"


# 1000 and 4095 do not fill FlexAttention's blocks of 128.
@pytest.mark.parametrize("length", [128, 1000, 1024, 2048, 4095, 4096])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_bf16_equals_reference(name: str, backend: str, head_dim: int, length: int) -> None:
    position = position_method(name, HeadSlice(0, HEADS, HEADS))
    assert_equals_reference(backend, draw(length, head_dim, HEADS, torch.bfloat16), position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_other_dtypes_equal_reference(name: str, backend: str, dtype: torch.dtype) -> None:
    position = position_method(name, HeadSlice(0, HEADS, HEADS))
    assert_equals_reference(backend, draw(512, 64, HEADS, dtype), position)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_grouped_queries_equal_reference(name: str, backend: str) -> None:
    position = position_method(name, HeadSlice(0, HEADS, HEADS))
    assert_equals_reference(backend, draw(1024, 64, HEADS // 4, torch.bfloat16), position)


@pytest.mark.parametrize("queries", [1, 100, 300])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_continuation_equals_reference(name: str, backend: str, queries: int) -> None:
    """Fewer queries than keys; below 128, FlexAttention has a kernel of its own."""
    position = position_method(name, HeadSlice(0, HEADS, HEADS))
    inputs = draw(1024, 64, HEADS, torch.bfloat16, queries)
    with torch.no_grad():
        reason = unavailable_reason(backend, position, DEVICE, torch.bfloat16)
        if reason:
            pytest.skip(reason)
        expected = BACKENDS["reference"](*inputs, position).float()
        error = (BACKENDS[backend](*inputs, position).float() - expected).norm() / expected.norm()
    assert error < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("backend", KERNELS)
def test_a_later_tensor_parallel_rank_uses_its_own_slopes(backend: str) -> None:
    """The second half of 32 heads. Another slice on the same shapes must not reuse the first's."""
    inputs = draw(512, 64, HEADS, torch.bfloat16)
    for rank in (0, 1):
        position = position_method("alibi", HeadSlice.of(2 * HEADS, rank, 2))
        assert_equals_reference(backend, inputs, position)


def test_flex_stays_fused_over_many_lengths() -> None:
    """More shapes than torch compiles by default. Unfused, 8,192 keys cost 4 GiB of scores."""
    position = position_method("alibi", HeadSlice(0, HEADS, HEADS))
    with torch.no_grad():
        for length in (*range(256, 2817, 256), 8192):
            inputs = draw(length, 64, HEADS, torch.bfloat16)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            BACKENDS["flex"](*inputs, position)
            taken = torch.cuda.max_memory_allocated() - before
            # The block mask of 8,192 takes some 200 MB while it is made.
            assert taken < 2**30, f"length {length}: {taken:,} bytes"
