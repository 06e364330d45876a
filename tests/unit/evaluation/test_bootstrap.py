"""Intervals against the standard error that theory gives."""

import math

import numpy as np
import pytest

from distributed_lm.evaluation import bootstrap
from distributed_lm.evaluation.bootstrap import difference_interval, loss_interval


def documents(number: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of documents of very different sizes whose losses differ from one another."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(10, 2000, number)
    return tokens * generator.normal(3.0, 0.4, number), tokens


def standard_error(nats: np.ndarray, tokens: np.ndarray) -> float:
    """Of a ratio of sums, by the delta method (Cochran, Sampling Techniques, §6)."""
    residuals = nats - nats.sum() / tokens.sum() * tokens
    return math.sqrt((residuals**2).sum()) / tokens.sum()


@pytest.mark.parametrize("number", [400, 3 * bootstrap.MAX_UNITS + 7])
def test_interval_is_the_analytic_one(number: int) -> None:
    nats, tokens = documents(number)
    loss, error = nats.sum() / tokens.sum(), standard_error(nats, tokens)
    low, high = loss_interval(nats, tokens)
    assert (low + high) / 2 == pytest.approx(loss, abs=0.25 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.12)
    assert loss_interval(nats, tokens) == (low, high)


def test_documents_not_scored_change_nothing_and_one_document_says_nothing() -> None:
    nats, tokens = documents(50)
    padded = [np.concatenate([values, np.zeros(30)]) for values in (nats, tokens)]
    assert loss_interval(*padded) == loss_interval(nats, tokens)
    assert all(map(math.isnan, loss_interval(nats[:1], tokens[:1])))


def test_pairs_see_a_difference_that_two_intervals_do_not() -> None:
    nats, tokens = documents(200)
    worse = nats + 0.01 * tokens * np.random.default_rng(1).normal(1.0, 0.3, 200)
    low, high = difference_interval(worse, nats, tokens)
    assert 0.0 < low < 0.01 < high < 0.02
    ours, theirs = loss_interval(nats, tokens), loss_interval(worse, tokens)
    assert ours[1] > theirs[0]  # they overlap
