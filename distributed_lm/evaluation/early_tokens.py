"""How much of the gain from a longer evaluation is merely fewer tokens with little context.

Let F(p) be the mean loss of the same targets given exactly p tokens of context (``context``
results). Scored in segments of L, targets have 1 … L tokens of context equally often, so

    N(L) = 1/L · Σ_{p=1…L} F(p)

is the nonoverlapping loss. Going from a to b > a tokens gains N(a) − N(b), the sum of

    fewer early tokens   N(a) − [a·N(a) + (b − a)·F(a)] / b  =  (b − a)/b · (N(a) − F(a)),

what there would be to gain if F stayed at F(a) beyond a (the "early token curse" of Press et al.
2022, App. B), and

    longer context       1/b · Σ_{p=a+1…b} (F(a) − F(p)),

the use the model makes of more than a tokens (negative where they harm it). F is measured at some
p only and taken to be linear in log p between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distributed_lm.errors import DataError
from distributed_lm.evaluation.bootstrap import Interval, combination_interval
from distributed_lm.evaluation.results import Result


@dataclass(frozen=True)
class ContextCurve:
    """F at some contexts, all over the same targets."""

    contexts: tuple[int, ...]
    """Ascending, from 1."""
    document_nats: np.ndarray
    """[documents, contexts]."""
    document_tokens: np.ndarray
    """[documents]."""

    @property
    def losses(self) -> np.ndarray:
        """[contexts], nats per token."""
        return self.document_nats.sum(axis=0) / self.document_tokens.sum()


@dataclass(frozen=True)
class Part:
    """Nats per token and their 95% interval over documents, drawn in pairs."""

    nats: float
    interval: Interval


@dataclass(frozen=True)
class Decomposition:
    """Of the gain from ``shorter`` to ``longer`` tokens; the parts sum to the gain."""

    shorter: int
    longer: int
    gain: Part
    fewer_early_tokens: Part
    longer_context: Part


def context_curve(results: Sequence[Result]) -> ContextCurve:
    """The curve of ``context`` results of one checkpoint over the same targets; gaps are left out.

    Raises:
        DataError: if they are not that, or a documents' file is missing.
    """
    scored = sorted((r for r in results if r.gap is None), key=lambda r: r.length)
    same = {(r.protocol, r.step, r.checkpoint, r.data_digest, r.targets) for r in scored}
    if len(same) != 1 or next(iter(same))[0] != "context":
        raise DataError(f"not the context results of one checkpoint over the same tokens: {same}")
    if scored[0].length != 1:
        raise DataError(f"{scored[0].run}: no result with 1 token of context; evaluate it again")
    sums = [result.document_sums() for result in scored]
    return ContextCurve(
        tuple(result.length for result in scored),
        np.stack([nats for nats, _ in sums], axis=1),
        sums[0][1],
    )


def decompose(curve: ContextCurve, shorter: int, longer: int) -> Decomposition:
    """Split the gain from ``shorter`` to ``longer``, both among the curve's contexts."""
    at_shorter = np.array([float(context == shorter) for context in curve.contexts])
    short, long = (mean_weights(curve.contexts, length) for length in (shorter, longer))
    gain = short - long
    early = (longer - shorter) / longer * (short - at_shorter)
    return Decomposition(
        shorter, longer, *(_part(curve, weights) for weights in (gain, early, gain - early))
    )


def mean_weights(contexts: Sequence[int], length: int) -> np.ndarray:
    """Weights [contexts] of F in N(length): each p shares its 1/length between the two measured
    contexts around it."""
    if contexts[0] != 1 or length not in contexts:
        raise ValueError(f"contexts {list(contexts)} do not begin with 1 and hold {length}")
    places = np.log2(np.arange(1, length + 1))
    knots = np.log2(np.array(contexts))
    return np.array([np.interp(places, knots, unit).mean() for unit in np.eye(len(contexts))])


def _part(curve: ContextCurve, weights: np.ndarray) -> Part:
    interval = combination_interval(curve.document_nats, curve.document_tokens, weights)
    return Part(float(curve.losses @ weights), interval)
