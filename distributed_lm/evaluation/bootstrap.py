"""Confidence intervals that resample documents, the units that are drawn from the population.

Tokens of one document depend on one another, so an interval that treats tokens as independent is
too narrow. The loss is a ratio of sums: total nats over total tokens of the documents drawn.
"""

import math

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
# Beyond this many documents neighbours are drawn together, which costs no accuracy worth having.
MAX_UNITS = 4096

Interval = tuple[float, float]
NO_INTERVAL: Interval = (math.nan, math.nan)


def loss_interval(nats: np.ndarray, tokens: np.ndarray, seed: int = 0) -> Interval:
    """95% interval of the loss, in nats per token (percentiles of 1000 resamples).

    Args:
        nats, tokens: [documents] sums; documents without tokens are left out.

    Returns:
        Low and high; not-a-number with fewer than two documents, which say nothing about others.
    """
    kept = tokens > 0
    tokens, nats = tokens[kept].astype(np.float64), nats[kept]
    if len(tokens) < 2:
        return NO_INTERVAL
    if len(tokens) > MAX_UNITS:
        edges = np.arange(MAX_UNITS) * len(tokens) // MAX_UNITS
        tokens, nats = np.add.reduceat(tokens, edges), np.add.reduceat(nats, edges)
    units = len(tokens)
    # How often each document is drawn: [resamples, documents].
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), RESAMPLES)
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(draws @ nats / (draws @ tokens), [tail, 100.0 - tail])
    return float(low), float(high)


def difference_interval(
    nats_a: np.ndarray, nats_b: np.ndarray, tokens: np.ndarray, seed: int = 0
) -> Interval:
    """95% interval of loss a − loss b over the same tokens, resampling documents in pairs: far
    narrower than the two losses' own intervals, since easy documents are easy for both."""
    return loss_interval(nats_a - nats_b, tokens, seed)


def combination_interval(
    nats: np.ndarray, tokens: np.ndarray, weights: np.ndarray, seed: int = 0
) -> Interval:
    """95% interval of a weighted sum of losses over the same tokens.

    Args:
        nats: [documents, losses]; tokens: [documents]; weights: [losses].
    """
    return loss_interval(nats @ weights, tokens, seed)
