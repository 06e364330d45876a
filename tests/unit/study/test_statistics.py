"""From paired differences to verdicts, against textbook values and simulation."""

import math

import numpy as np
import pytest

from distributed_lm.study.statistics import TextError, judge, paired, text_error


def test_interval_is_students():
    # Mean 2, s = 1, n = 3: t(0.975, 2) = 4.3027 (any table), so 2 ± 4.3027/√3.
    low, high = paired([1.0, 2.0, 3.0]).interval()
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_one_pair_says_nothing():
    estimate = paired([5.0])
    assert estimate.interval() == (-math.inf, math.inf)
    assert math.isinf(estimate.detectable)
    assert judge(estimate, "greater_than", 0.0) == "cannot tell"


def test_the_texts_error_widens_the_interval():
    alone, with_text = paired([1.0, 1.1, 0.9]), paired([1.0, 1.1, 0.9], TextError(0.2, 50))
    assert with_text.standard_error == pytest.approx(math.hypot(alone.standard_error, 0.2))
    assert with_text.detectable > alone.detectable


@pytest.mark.parametrize(
    ("differences", "relation", "margin", "state"),
    [
        ([1.0, 1.01, 0.99], "greater_than", 0.5, "holds"),
        ([1.0, 1.01, 0.99], "greater_than", 1.5, "does not hold"),
        ([1.0, 1.01, 0.99], "greater_than", 1.0, "cannot tell"),
        ([1.0, 1.01, 0.99], "less_than", 0.5, "does not hold"),
        ([-1.0, -1.01, -0.99], "less_than", -0.5, "holds"),
        ([0.001, -0.001, 0.0], "within", 0.01, "holds"),
        ([1.0, 1.01, 0.99], "within", 0.5, "does not hold"),
        ([-1.0, -1.01, -0.99], "within", 0.5, "does not hold"),
        # The mean is 0, but so noisy that sameness is not shown.
        ([0.1, -0.1, 0.0], "within", 0.05, "cannot tell"),
        # Below what three such pairs can detect.
        ([0.3, -0.2, 0.1], "greater_than", 0.0, "cannot tell"),
    ],
)
def test_verdicts(differences, relation, margin, state):
    assert judge(paired(differences), relation, margin) == state


def test_a_detectable_difference_is_found_four_times_in_five():
    """The minimum detectable effect is what it says, by simulation with the true spread."""
    rng = np.random.default_rng(0)
    pairs, spread = 3, 1.0
    known = paired(list(rng.normal(size=pairs)))
    effect = known.detectable / known.standard_error * spread / math.sqrt(pairs)
    found = [
        judge(paired(list(rng.normal(effect, spread, pairs))), "greater_than", 0.0) == "holds"
        for _ in range(2000)
    ]
    assert 0.77 < np.mean(found) < 0.83


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        low, high = paired(list(rng.normal(0.3, 1.0, 4))).interval()
        covered += low < 0.3 < high
    assert 0.935 < covered / 2000 < 0.965


def test_texts_error_is_that_of_resampled_documents():
    rng = np.random.default_rng(2)
    tokens = rng.integers(50, 500, size=200).astype(float)
    nats = tokens * rng.normal(3.0, 0.4, size=200)
    resampled = [
        nats[index].sum() / tokens[index].sum() for index in rng.integers(0, 200, size=(3000, 200))
    ]
    error = text_error(nats, tokens)
    assert error.size == pytest.approx(np.std(resampled), rel=0.06)
    # Documents that were not scored change nothing.
    padded = [np.append(values, np.zeros(50)) for values in (nats, tokens)]
    assert text_error(*padded).size == pytest.approx(error.size)
    assert text_error(*padded).documents == error.documents == 200


def test_few_documents_are_few_degrees_of_freedom() -> None:
    alike = [1.0, 1.0 + 1e-9, 1.0 - 1e-9]
    many, two = (paired(alike, TextError(0.1, documents)) for documents in (1000, 2))
    assert many.interval()[1] == pytest.approx(1.0 + 1.962 * 0.1, rel=1e-3)
    assert two.interval()[1] == pytest.approx(1.0 + 12.706 * 0.1, rel=1e-3)
