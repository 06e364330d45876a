"""The decomposition on curves whose answer is known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from distributed_lm.errors import DataError
from distributed_lm.evaluation.early_tokens import (
    ContextCurve,
    context_curve,
    decompose,
    mean_weights,
)
from distributed_lm.evaluation.results import Result, write_result
from tests.support.results import make_result

EVERY = tuple(range(1, 17))


def curve(losses: list[float], contexts: tuple[int, ...] = EVERY) -> ContextCurve:
    """Two documents of 3 and 1 tokens that scatter around ``losses``."""
    values = np.array(losses)
    nats = np.stack([3 * (values - 0.1), values + 0.3])
    return ContextCurve(contexts, nats, np.array([3.0, 1.0]))


def test_a_model_that_ignores_more_than_8_tokens_gains_by_fewer_early_tokens_only() -> None:
    losses = [5.0 - 0.25 * min(context, 8) for context in EVERY]
    split = decompose(curve(losses), 8, 16)
    # N(8) = 5 − 0.25·4.5, N(16) = (8·N(8) + 8·3) / 16.
    assert split.gain.nats == pytest.approx((3.875 - 3.0) / 2)
    assert split.fewer_early_tokens.nats == pytest.approx((3.875 - 3.0) / 2)
    assert split.longer_context.nats == pytest.approx(0.0, abs=1e-12)


def test_a_model_equally_bad_at_every_position_gains_by_longer_context_only() -> None:
    losses = [4.0 if context <= 8 else 3.0 for context in EVERY]
    split = decompose(curve(losses), 8, 16)
    assert split.fewer_early_tokens.nats == pytest.approx(0.0, abs=1e-12)
    assert split.longer_context.nats == pytest.approx(0.5)
    assert split.gain.nats == pytest.approx(0.5)


def test_parts_sum_to_the_gain_of_segments_also_where_lengths_are_not_doubled() -> None:
    losses = np.random.default_rng(2).normal(3.0, 0.5, len(EVERY)).tolist()
    split = decompose(curve(losses), 5, 16)
    assert split.gain.nats == pytest.approx(np.mean(losses[:5]) - np.mean(losses))
    assert split.fewer_early_tokens.nats + split.longer_context.nats == pytest.approx(
        split.gain.nats
    )
    beyond = [losses[4] - loss for loss in losses[5:]]
    assert split.longer_context.nats == pytest.approx(sum(beyond) / 16)


def test_a_loss_that_falls_with_log_context_is_exact_from_powers_of_two() -> None:
    falling = 4.0 - 0.3 * np.log2(np.array(EVERY))
    powers = (1, 2, 4, 8, 16)
    measured = curve([float(falling[power - 1]) for power in powers], powers)
    for length in (8, 16):
        implied = measured.losses @ mean_weights(powers, length)
        assert implied == pytest.approx(falling[:length].mean())
    assert mean_weights(powers, 8).sum() == pytest.approx(1.0)


def test_intervals_are_of_documents_drawn_in_pairs() -> None:
    """Documents that differ by a constant say the same about every gain."""
    losses = [5.0 - 0.25 * min(context, 8) for context in EVERY]
    split = decompose(curve(losses), 8, 16)
    assert split.gain.interval == pytest.approx((split.gain.nats, split.gain.nats))


def context_result(length: int, **changes: object) -> Result:
    return make_result(protocol="context", targets="sample_4", stride=1, length=length, **changes)


def test_curve_comes_from_results_and_refuses_a_mixture(tmp_path: Path) -> None:
    tokens = np.array([3, 1])
    results = [
        write_result(tmp_path, context_result(length), (tokens * 4.0 / length, tokens))
        for length in (2, 1, 4)
    ]
    results.append(context_result(8, gap="no further"))
    found = context_curve(results)
    assert found.contexts == (1, 2, 4)
    assert found.losses.tolist() == [4.0, 2.0, 1.0]
    other = dataclasses.replace(results[0], checkpoint="another")
    with pytest.raises(DataError, match="one checkpoint"):
        context_curve([*results, other])
