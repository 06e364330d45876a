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
from scipy import stats

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

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Student's t with pairs − 1 degrees of freedom: wide, and honest, for few pairs."""
        if self.pairs < 2 or math.isinf(self.standard_error):
            return -math.inf, math.inf
        reach = float(stats.t.ppf(0.5 + confidence / 2, self.pairs - 1)) * self.standard_error
        return self.mean - reach, self.mean + reach

    @property
    def detectable(self) -> float:
        """The smallest true difference that would be found different from nothing with a
        probability of ``POWER``: (t_0.975 + t_0.8) standard errors."""
        if self.pairs < 2:
            return math.inf
        freedom = self.pairs - 1
        quantiles = stats.t.ppf([0.5 + CONFIDENCE / 2, POWER], freedom)
        return float(quantiles.sum()) * self.standard_error


def paired(differences: Sequence[float], text_error: float = 0.0) -> Estimate:
    """The mean of one difference per pair of runs.

    Args:
        text_error: standard error of that mean over the choice of documents.

    Raises:
        ValueError: if there is no pair.
    """
    pairs = len(differences)
    if pairs == 0:
        raise ValueError("no pair of runs")
    mean = float(np.mean(differences))
    if not math.isfinite(mean):  # a run has diverged
        return Estimate(mean, math.inf, pairs)
    spread = float(np.var(differences, ddof=1)) if pairs > 1 else math.inf
    error = math.sqrt(spread / pairs + text_error**2)
    return Estimate(mean, error, pairs)


def text_standard_error(nats: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of Σ nats / Σ tokens over the choice of documents.

    The usual linearisation of a ratio estimator (Cochran, Sampling Techniques, 1977, §6.3).

    Args:
        nats: [documents] sums, of a loss or of a difference of losses.
        tokens: [documents] tokens scored in each; a document without any counts for nothing.
    """
    documents = int((tokens > 0).sum())
    if documents < 2:
        return 0.0
    if not np.isfinite(nats).all():
        return math.inf
    ratio = nats.sum() / tokens.sum()
    residuals = nats - ratio * tokens
    variance = documents / (documents - 1) * float(np.square(residuals).sum())
    return math.sqrt(variance) / float(tokens.sum())


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
