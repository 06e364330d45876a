"""Slopes and bias against the paper's formula written out again and against other people's code."""

import math

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from distributed_lm.model.alibi import alibi_bias, alibi_slopes
from distributed_lm.model.positions import HeadSlice, build_position
from tests.support.training import tiny_config

HEAD_COUNTS = range(1, 113)

# Slopes as −log2: the paper's two examples (§3), and what its code gives for twelve heads.
EXPONENTS = {
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    16: [0.5 * head for head in range(1, 17)],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
}


def papers_slopes(num_heads: int) -> list[float]:
    """``get_slopes`` as the authors wrote it: start and ratio, multiplied up term by term."""
    start = 2.0 ** -(2.0 ** -(math.log2(num_heads) - 3))
    if math.log2(num_heads).is_integer():
        slopes = [start]
        while len(slopes) < num_heads:
            slopes.append(slopes[-1] * start)
        return slopes
    closest = 1
    while 2 * closest < num_heads:
        closest *= 2
    return papers_slopes(closest) + papers_slopes(2 * closest)[::2][: num_heads - closest]


def bloom_slopes(num_heads: int) -> list[float]:
    bias = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), num_heads, torch.float32)
    return bias[:, 0, 1].tolist()  # row-constant form: key 1 of each head


def mpt_slopes(num_heads: int) -> list[float]:
    bias = build_mpt_alibi_tensor(num_heads, 2)  # distances −1, 0
    return (-bias[:, 0, 0]).tolist()


@pytest.mark.parametrize("num_heads", sorted(EXPONENTS))
def test_slopes_are_the_papers_examples(num_heads: int) -> None:
    assert alibi_slopes(num_heads) == [2.0**-exponent for exponent in EXPONENTS[num_heads]]


@pytest.mark.parametrize(
    "independent", [papers_slopes, bloom_slopes, mpt_slopes], ids=lambda function: function.__name__
)
def test_slopes_agree_with_independent_code_head_by_head(independent) -> None:
    for num_heads in HEAD_COUNTS:
        slopes = alibi_slopes(num_heads)
        assert len(slopes) == num_heads
        assert slopes == pytest.approx(independent(num_heads), rel=1e-6), num_heads


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tensor_parallel_slices_join_to_the_whole_list(size: int) -> None:
    for total in HEAD_COUNTS:
        if total % size:
            continue
        slices = [HeadSlice.of(total, rank, size) for rank in range(size)]
        whole = alibi_slopes(total)
        assert [slope for part in slices for slope in part.take(whole)] == whole
        positions = [build_position(tiny_config().model, part) for part in slices]
        live = torch.cat([position.slopes(torch.device("cpu")) for position in positions])
        assert torch.equal(live, torch.tensor(whole, dtype=torch.float32))


def test_bias_is_minus_slope_times_distance_exactly_at_any_length() -> None:
    """Steep and power-of-two slopes: every product is exact in fp32, so nothing may be off."""
    num_keys = 5000
    bias = alibi_bias(torch.tensor([1.0, 0.5, 2.0**-8]), range(num_keys - 1, num_keys), num_keys)
    assert bias.dtype == torch.float32
    assert bias.shape == (3, 1, num_keys)
    for head, slope in enumerate([1.0, 0.5, 2.0**-8]):
        expected = [-slope * (num_keys - 1 - key) for key in range(num_keys)]
        assert bias[head, 0].tolist() == expected


def test_bias_of_later_queries_is_the_end_of_the_whole() -> None:
    slopes = torch.tensor(alibi_slopes(12))
    whole = alibi_bias(slopes, range(700), 700)
    torch.testing.assert_close(
        alibi_bias(slopes, range(690, 700), 700), whole[:, 690:], rtol=0, atol=0
    )
    assert (whole.diagonal(dim1=1, dim2=2) == 0).all()
    assert (whole[:, 5, :5] < 0).all()
    assert (whole[:, 5, 6:] > 0).all()  # the future: for the mask to remove


def test_bias_is_fp32_whatever_the_dtype_of_the_slopes() -> None:
    bias = alibi_bias(torch.tensor([0.5], dtype=torch.bfloat16), range(1000, 1001), 1001)
    assert bias[0, 0, 0].item() == -500.0
    assert bias[0, 0, 1].item() == -499.5  # bf16 has no such number
    assert bias.dtype == torch.float32


def test_no_heads_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        alibi_slopes(0)
