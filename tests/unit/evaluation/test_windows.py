"""Protocols as windows, against their definitions spelt out token by token."""

import numpy as np
import pytest

from distributed_lm.evaluation.windows import (
    Windows,
    context_windows,
    document_windows,
    geometric_contexts,
    only_targets,
    position_edges,
    sample_targets,
    sliding_windows,
)


def contexts_of(windows: Windows) -> dict[int, int]:
    """Tokens of context of every scored target; a target scored twice fails."""
    found: dict[int, int] = {}
    for window in range(len(windows)):
        for position in np.flatnonzero(windows.mask(window)):
            target = int(windows.starts[window] + 1 + position)
            assert target not in found, f"{target} is scored twice"
            found[target] = int(position) + 1
    assert len(found) == windows.num_scored
    return found


def sliding_contexts(num_targets: int, length: int, stride: int) -> dict[int, int]:
    """By the definition: window after window, the last ``stride`` targets of each."""
    found, first = {}, 0
    while True:
        targets = range(first + 1, first + length + 1)
        scored = targets if first == 0 else targets[-stride:]
        found.update({target: target - first for target in scored if target <= num_targets})
        if first + length >= num_targets:
            return found
        first += stride


@pytest.mark.parametrize(
    ("num_targets", "length", "stride"),
    [(40, 8, 8), (41, 8, 8), (47, 8, 3), (40, 8, 1), (5, 8, 8), (5, 8, 2), (8, 8, 4), (9, 8, 7)],
)
def test_sliding_is_its_definition(num_targets: int, length: int, stride: int) -> None:
    windows = sliding_windows(num_targets, length, stride)
    contexts = contexts_of(windows)
    assert contexts == sliding_contexts(num_targets, length, stride)
    assert sorted(contexts) == list(range(1, num_targets + 1))
    assert (windows.starts + windows.counts).max() == num_targets
    # No target has less context than the stride leaves it, once there is that much before it.
    least = length - stride + 1
    assert all(context >= min(target, least) for target, context in contexts.items())


def test_stride_beyond_the_length_would_skip_tokens() -> None:
    with pytest.raises(ValueError, match="stride 9"):
        sliding_windows(40, 8, 9)


@pytest.mark.parametrize("stride", [8, 3])
def test_no_window_crosses_a_document_and_short_ones_are_left_out(stride: int) -> None:
    ends = np.array([10, 13, 22, 39, 40])  # 10, 3, 9, 17 and 1 tokens
    windows = document_windows(ends, 8, stride, longer_than=9)
    contexts = contexts_of(windows)
    assert sorted(contexts) == [*range(1, 10), *range(23, 39)]
    for start, size in ((0, 10), (22, 17)):
        expected = sliding_contexts(size - 1, 8, stride)
        assert {t - start: c for t, c in contexts.items() if start < t < start + size} == expected
    assert contexts_of(document_windows(ends, 8, stride, longer_than=40)) == {}


def test_a_sample_keeps_each_target_s_context() -> None:
    windows = sliding_windows(47, 8, 3)
    whole = contexts_of(windows)
    targets = np.array([1, 8, 9, 20, 47])
    kept = only_targets(windows, targets)
    assert contexts_of(kept) == {int(target): whole[int(target)] for target in targets}
    assert len(kept) == 4  # 1 and 8 are both the first window's


def test_stride_1_and_exact_context_are_the_same_once_there_is_enough() -> None:
    targets = np.array([8, 9, 31, 47])
    sliding = only_targets(sliding_windows(47, 8, 1), targets)
    assert contexts_of(sliding) == contexts_of(context_windows(targets, 8))
    assert set(contexts_of(context_windows(targets, 3)).values()) == {3}


def test_samples_are_spread_seeded_and_within_bounds() -> None:
    targets = sample_targets(17, 10_016, 100, seed=5)
    assert len(np.unique(targets)) == 100
    assert [(target - 17) // 100 for target in targets] == list(range(100))
    np.testing.assert_array_equal(targets, sample_targets(17, 10_016, 100, seed=5))
    assert not np.array_equal(targets, sample_targets(17, 10_016, 100, seed=6))
    assert sample_targets(3, 6, 10, seed=0).tolist() == [3, 4, 5, 6]


def test_contexts_are_powers_of_two_and_what_was_asked_for() -> None:
    assert geometric_contexts((6, 12)) == (1, 2, 4, 6, 8, 12)
    assert geometric_contexts((8,)) == (1, 2, 4, 8)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100, 2048])
def test_position_bins_end_at_powers_of_two_and_fit_those_of_other_lengths(length: int) -> None:
    edges = position_edges(length)
    assert edges[0] == 1
    assert edges[-1] == length + 1
    assert list(edges) == sorted(set(edges))
    assert {2**k + 1 for k in range(12) if 2**k <= length} <= set(edges)
    assert set(edges[:-1]) <= set(position_edges(2 * length))
