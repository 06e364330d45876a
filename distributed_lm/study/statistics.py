"""From paired differences to a verdict. No torch.

Two sources of error are in every interval of a loss: the runs (another seed gives another model)
and the text (other documents give another loss). Their variances add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
State = Literal["holds", "does not hold", "cannot tell"]


@dataclass(frozen=True)
class Estimate:
    """A mean difference of paired runs."""

    mean: float
    standard_error: float
    """Of runs and text together; infinite with one pair, which says nothing about the runs."""
    pairs: int
    freedom: float
    """Degrees of freedom of the two together."""

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Student's t: wide, and honest, for few pairs or documents."""
        if self.pairs < 2 or math.isinf(self.standard_error):
            return -math.inf, math.inf
        reach = float(stats.t.ppf(0.5 + confidence / 2, self.freedom)) * self.standard_error
        return self.mean - reach, self.mean + reach

    @property
    def detectable(self) -> float:
        """The smallest true difference that would be found different from nothing with a
        probability of ``POWER``, by the noncentral t distribution."""
        if self.pairs < 2 or math.isinf(self.standard_error):
            return math.inf
        threshold = float(stats.t.ppf(0.5 + CONFIDENCE / 2, self.freedom))

        def missing_power(effect: float) -> float:
            return float(stats.nct.sf(threshold, self.freedom, effect)) - POWER

        return float(optimize.brentq(missing_power, 0.0, 10 * threshold)) * self.standard_error


@dataclass(frozen=True)
class TextError:
    """Standard error of a mean over the choice of documents."""

    size: float
    documents: int
    """That it was estimated from; with fewer than two there is nothing to estimate."""


NO_TEXT_ERROR = TextError(0.0, 0)


def paired(differences: Sequence[float], text: TextError = NO_TEXT_ERROR) -> Estimate:
    """The mean of one difference per pair of runs.

    The variances of runs and text add; their degrees of freedom are joined as Welch and
    Satterthwaite do (1947).

    Args:
        text: error of that mean over the choice of documents.

    Raises:
        ValueError: if there is no pair.
    """
    pairs = len(differences)
    if pairs == 0:
        raise ValueError("no pair of runs")
    mean = float(np.mean(differences))
    if not math.isfinite(mean):  # a run has diverged
        return Estimate(mean, math.inf, pairs, 1.0)
    if pairs == 1 or math.isinf(text.size):
        return Estimate(mean, math.inf, pairs, 1.0)
    of_runs, of_text = float(np.var(differences, ddof=1)) / pairs, text.size**2
    parts = of_runs**2 / (pairs - 1)
    if text.documents > 1:
        parts += of_text**2 / (text.documents - 1)
    freedom = (of_runs + of_text) ** 2 / parts if parts > 0 else float(pairs - 1)
    return Estimate(mean, math.sqrt(of_runs + of_text), pairs, freedom)


def text_error(nats: np.ndarray, tokens: np.ndarray) -> TextError:
    """Standard error of Σ nats / Σ tokens over the choice of documents.

    The usual linearisation of a ratio estimator (Cochran, Sampling Techniques, 1977, §6.3).

    Args:
        nats: [documents] sums, of a loss or of a difference of losses.
        tokens: [documents] tokens scored in each; a document without any counts for nothing.
    """
    documents = int((tokens > 0).sum())
    if documents < 2:
        return TextError(0.0, documents)
    if not np.isfinite(nats).all():
        return TextError(math.inf, documents)
    ratio = nats.sum() / tokens.sum()
    residuals = nats - ratio * tokens
    variance = documents / (documents - 1) * float(np.square(residuals).sum())
    return TextError(math.sqrt(variance) / float(tokens.sum()), documents)


def judge(estimate: Estimate, relation: str, margin: float) -> State:
    """Whether the true difference is what a claim says, at 95% confidence.

    ``greater_than`` and ``less_than`` hold if the whole 95% interval lies beyond the margin.
    ``within`` is two one-sided tests at 5% (Schuirmann 1987): it holds if the 90% interval lies
    between −margin and margin. A claim fails if the 95% interval lies wholly where it says the
    difference is not; otherwise these runs cannot tell.
    """
    low, high = estimate.interval()
    if relation == "less_than":
        low, high, margin = -high, -low, -margin
    if relation in ("greater_than", "less_than"):
        if low > margin:
            return "holds"
        return "does not hold" if high < margin else "cannot tell"
    inner_low, inner_high = estimate.interval(0.9)
    if -margin < inner_low and inner_high < margin:
        return "holds"
    return "does not hold" if low > margin or high < -margin else "cannot tell"
