"""A study's claims, judged. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distributed_lm.evaluation.results import Result
from distributed_lm.study.measures import Measures, StepCost, per_document
from distributed_lm.study.schema import Claim, Quantity, Study
from distributed_lm.study.statistics import Estimate, State, TextError, judge, paired, text_error


@dataclass(frozen=True)
class Verdict:
    """What the runs say about one claim. Differences are in nats per token, or for seconds and
    memory natural logarithms of ratios."""

    claim: Claim
    state: State
    reason: str
    """Why nothing can be told; empty if it can."""
    left: float | None = None
    """Mean over the pairs: nats per token, seconds per token or bytes."""
    right: float | None = None
    estimate: Estimate | None = None
    differences: tuple[float, ...] = ()
    """One per pair of runs."""

    @property
    def margin(self) -> float:
        return margin_of(self.claim)


def judge_claims(study: Study, measures: Measures) -> list[Verdict]:
    return [_judge(claim, measures) for claim in study.claims]


def margin_of(claim: Claim) -> float:
    """In the unit of the difference: a relative margin r becomes log(1 + r)."""
    margin = claim.relation[1]
    return math.log1p(margin) if claim.is_ratio else margin


def _judge(claim: Claim, measures: Measures) -> Verdict:
    pairs = _cost_pairs(claim, measures) if claim.is_ratio else _loss_pairs(claim, measures)
    whole = [(left, right) for left, right in pairs if left is not None and right is not None]
    if not whole:
        return Verdict(claim, "cannot tell", _what_is_missing(claim, pairs))
    lefts, rights = (np.array(side, dtype=float) for side in zip(*whole, strict=True))
    differences = np.log(lefts) - np.log(rights) if claim.is_ratio else lefts - rights
    text = TextError(0.0, 0) if claim.is_ratio else _text_error(claim, measures)
    estimate = paired(differences.tolist(), text)
    state = judge(estimate, claim.relation[0], margin_of(claim))
    reason = ""
    if estimate.pairs < 2:
        reason = "one pair of runs says nothing about how much runs differ"
    elif len(whole) < len(pairs):
        reason = f"{len(pairs) - len(whole)} of {len(pairs)} pairs are missing"
        state = "cannot tell"
    elif not claim.is_ratio and not measures.saw_same_tokens(claim.left.arm, claim.right.arm):
        reason, state = "the arms have not seen the same tokens", "cannot tell"
    return Verdict(
        claim,
        state,
        reason,
        float(lefts.mean()),
        float(rights.mean()),
        estimate,
        tuple(differences.tolist()),
    )


def _loss_pairs(claim: Claim, measures: Measures) -> list[tuple[float | None, float | None]]:
    return [
        (measures.loss(claim.left, seed), measures.loss(claim.right, seed))
        for seed in measures.study.seeds
    ]


def _cost_pairs(claim: Claim, measures: Measures) -> list[tuple[float | None, float | None]]:
    sides = [_costs(quantity, measures) for quantity in (claim.left, claim.right)]
    return list(zip(*sides, strict=True))


def _costs(quantity: Quantity, measures: Measures) -> list[float | None]:
    if measures.study.speed is None:
        return []
    backend = quantity.backend or next(iter(measures.study.speed.backends))

    def value(cost: StepCost | None) -> float | None:
        if cost is None:
            return None
        return cost.seconds_per_token if quantity.measure == "seconds" else cost.memory

    return [value(cost) for cost in measures.costs(quantity.arm, backend)]


def _what_is_missing(claim: Claim, pairs: list[tuple[float | None, float | None]]) -> str:
    missing = []
    for side, quantity in enumerate((claim.left, claim.right)):
        if all(pair[side] is None for pair in pairs):
            at = f" at {quantity.length}" if quantity.length else ""
            missing.append(f"{quantity.measure} of {quantity.arm}{at}")
    return f"not there: {' and '.join(missing) or 'a whole pair of runs'}"


def _result(quantity: Quantity, measures: Measures, seed: int) -> Result | None:
    """With a document's losses; of a halted run those of the validation nearest to its halt."""
    if quantity.length is None:
        return None
    if quantity.measure == "loss":
        return measures.result(quantity.arm, seed, quantity.length, quantity.protocol)
    step = measures.halted_step(quantity.arm, quantity.time_of or "")
    if step is None:
        return None
    return measures.validation_near(quantity.arm, seed, quantity.length, step)


def _text_error(claim: Claim, measures: Measures) -> TextError:
    """Of the mean difference over the choice of documents, which the pairs share."""
    sums, tokens = [], None
    for seed in measures.study.seeds:
        sides = []
        for quantity in (claim.left, claim.right):
            result = _result(quantity, measures, seed)
            found = per_document(result) if result is not None and not result.gap else None
            if found is None:
                return TextError(0.0, 0)
            sides.append(found)
        (left, scored), (right, also) = sides
        if not np.array_equal(scored, also):  # other tokens: the text is not shared
            errors = [text_error(*side) for side in sides]
            size = math.hypot(*(error.size for error in errors))
            return TextError(size, min(error.documents for error in errors))
        sums.append(left - right)
        tokens = scored
    if tokens is None:
        return TextError(0.0, 0)
    return text_error(np.mean(sums, axis=0), tokens)
