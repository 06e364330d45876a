"""What the runs of a study have left in their folders, as numbers. No torch."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_lm.config import RunConfig
from distributed_lm.errors import DataError
from distributed_lm.evaluation.results import Result, read_results
from distributed_lm.study.choice import Choice
from distributed_lm.study.runs import WARM_UP_STEPS, speed_run, training_run
from distributed_lm.study.schema import Arm, Quantity, Study
from distributed_lm.study.statistics import Estimate, TextError, paired, text_error
from distributed_lm.tracking.metrics_file import read_records

NUM_LOSSES = 5


@dataclass(frozen=True)
class TrainingCurve:
    """One run's training, by step: what a later life did again counts once."""

    steps: list[int]
    losses: list[float]
    """Nats per token of the training batch."""
    seconds: list[float]
    """Clock at the end of the step, without evaluation, saves and restarts."""
    validation: dict[int, dict[int, float]]
    """Nats per token by context length and step."""
    digests: dict[int, str]
    """Of the tokens up to a step."""

    @classmethod
    def read(cls, run_dir: Path) -> TrainingCurve:
        train: dict[int, dict[str, Any]] = {}
        validation: dict[int, dict[int, float]] = {}
        for record in read_records(run_dir / "metrics.jsonl"):
            if record["kind"] == "train":
                train[record["step"]] = record
            elif record["kind"] == "evaluation":
                losses_by_step = validation.setdefault(record["length"], {})
                losses_by_step[record["step"]] = _number(record.get("loss"))
        steps = sorted(train)
        seconds, clock, before = [], 0.0, 0
        for step in steps:
            clock += train[step].get("step_seconds", 0.0) * (step - before)
            before = step
            seconds.append(clock)
        losses = [_number(train[step]["loss"]) for step in steps]
        digests = {
            step: train[step]["data_digest"] for step in steps if "data_digest" in train[step]
        }
        return cls(steps, losses, seconds, validation, digests)

    def final_loss(self, length: int, step: int) -> float | None:
        """Validation loss after the last step; not finite if the run diverged; None = not there."""
        return self.validation.get(length, {}).get(step)

    def halted_loss(self, length: int, step: float) -> float | None:
        """Validation loss at a step between two validations, on the line between them; None before
        the first and after the last."""
        known = sorted(self.validation.get(length, {}).items())
        if not known or not known[0][0] <= step <= known[-1][0]:
            return None
        steps, losses = zip(*known, strict=True)
        return float(np.interp(step, steps, losses))

    def first_step_below(self, length: int, loss: float) -> float | None:
        """Where the validation loss first gets down to ``loss``, on the lines between
        validations; None = never."""
        known = sorted(self.validation.get(length, {}).items())
        if known and known[0][1] <= loss:
            return float(known[0][0])
        for (step, higher), (later, lower) in itertools.pairwise(known):
            if higher > loss >= lower:
                return step + (later - step) * (higher - loss) / (higher - lower)
        return None


@dataclass(frozen=True)
class StepCost:
    """Of one speed run."""

    seconds_per_token: float
    memory: float
    """Peak bytes of the largest rank."""


class RunSet:
    """Finished runs by arm and seed; each file is read once."""

    def __init__(self, configs: dict[str, dict[int, RunConfig]]) -> None:
        self.configs = configs
        self._curves: dict[tuple[str, int], TrainingCurve] = {}
        self._results: dict[tuple[str, int], list[Result]] = {}
        """Of all steps."""

    @property
    def arms(self) -> list[str]:
        return list(self.configs)

    def seeds_of(self, arm: str) -> list[int]:
        return list(self.configs[arm])

    def config(self, arm: str, seed: int) -> RunConfig:
        return self.configs[arm][seed]

    def any_config(self, arm: str) -> RunConfig:
        """An arm's runs differ in the seed only."""
        return next(iter(self.configs[arm].values()))

    def curve(self, arm: str, seed: int) -> TrainingCurve:
        key = (arm, seed)
        if key not in self._curves:
            self._curves[key] = TrainingCurve.read(self.config(arm, seed).run_dir)
        return self._curves[key]

    def results(self, arm: str, seed: int, protocol: str | None = None) -> list[Result]:
        """Evaluations of the run's last step, with one protocol or all."""
        last = self.config(arm, seed).train.steps
        found = [one for one in self._all_results(arm, seed) if one.step == last]
        return [one for one in found if protocol in (None, one.protocol)]

    def _all_results(self, arm: str, seed: int) -> list[Result]:
        key = (arm, seed)
        if key not in self._results:
            self._results[key] = read_results(self.config(arm, seed).run_dir)
        return self._results[key]

    def validation_near(self, arm: str, seed: int, length: int, step: float) -> Result | None:
        """The validation nearest to a step; None if none was kept."""
        kept = [
            one
            for one in self._all_results(arm, seed)
            if (one.length, one.protocol, one.gap) == (length, "nonoverlapping", None)
        ]
        return min(kept, key=lambda one: abs(one.step - step), default=None)

    def result(
        self, arm: str, seed: int, length: int, protocol: str = "nonoverlapping"
    ) -> Result | None:
        """One evaluation; None = not there.

        Raises:
            DataError: if there are several that differ in something else.
        """
        found = [
            result
            for result in self.results(arm, seed)
            if (result.length, result.protocol) == (length, protocol)
        ]
        if len(found) > 1:
            raise DataError(
                f"{self.config(arm, seed).run_dir}/evaluation: {len(found)} {protocol} results at "
                f"length {length} of the same step; remove those of other evaluations"
            )
        return found[0] if found else None

    def lengths(self, protocol: str = "nonoverlapping") -> list[int]:
        """All context lengths at which some run was scored."""
        return sorted(
            {
                result.length
                for arm in self.arms
                for seed in self.seeds_of(arm)
                for result in self.results(arm, seed)
                if result.protocol == protocol
            }
        )

    def mean_loss(self, arm: str, length: int, protocol: str = "nonoverlapping") -> Estimate | None:
        """Over an arm's runs; None where none of them was, or can be, scored."""
        found = [self.result(arm, seed, length, protocol) for seed in self.seeds_of(arm)]
        scored = [result for result in found if result is not None and not result.gap]
        if not scored:
            return None
        texts = [per_document(result) for result in scored]
        error = TextError(0.0, 0)
        if texts[0] is not None and all(text is not None for text in texts):
            nats = np.mean([text[0] for text in texts if text], axis=0)
            error = text_error(nats, texts[0][1])
        return paired([result.loss for result in scored], error)

    def saw_same_tokens(self, arm: str, other: str) -> bool:
        """Whether with each seed that both have, the recorded steps of both have equal digests. An
        arm with another seed's runs only was never meant to see the same."""
        for seed in set(self.configs[arm]) & set(self.configs[other]):
            ours, theirs = self.curve(arm, seed).digests, self.curve(other, seed).digests
            if any(ours[step] != theirs[step] for step in ours.keys() & theirs.keys()):
                return False
        return True


class Measures(RunSet):
    """A study's runs, with their speed and what was chosen for them."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.choice = Choice.read(study.folder)
        super().__init__(
            {
                arm.name: {
                    seed: training_run(study, arm, seed, self.choice).config for seed in study.seeds
                }
                for arm in study.arms
            }
        )
        self._costs: dict[tuple[str, str], list[StepCost | None]] = {}

    def costs(self, arm: str, backend: str) -> list[StepCost | None]:
        """One per turn; None = not measured."""
        key = (arm, backend)
        if key not in self._costs:
            rounds = self.study.speed.rounds if self.study.speed else 0
            runs = [
                speed_run(self.study, self.study.arm(arm), backend, turn) for turn in range(rounds)
            ]
            self._costs[key] = [_step_cost(run.config) for run in runs]
        return self._costs[key]

    def loss(self, quantity: Quantity, seed: int) -> float | None:
        """Nats per token, of a claim's left or right side; None = a gap, or not measured yet."""
        if quantity.length is None:
            return None
        if quantity.measure == "loss":
            result = self.result(quantity.arm, seed, quantity.length, quantity.protocol)
            return None if result is None or result.gap else result.loss
        steps = self.halted_step(quantity.arm, quantity.time_of or "")
        if steps is None:
            return None
        return self.curve(quantity.arm, seed).halted_loss(quantity.length, steps)

    def halted_step(self, arm: str, time_of: str) -> float | None:
        """How far an arm gets in another's time; not beyond its own end."""
        ratio = self.choice.time_ratios.get(f"{time_of}/{arm}")
        if ratio is None:
            return None
        steps = self.any_config(arm).train.steps
        return steps * min(1.0, ratio)

    def break_even(self, short: str, arm: Arm, seed: int) -> float | None:
        """Speed ratio at which halting ``arm`` in the time of ``short`` gives the same loss at the
        length of ``arm``: how much faster ``short`` must be. None = ``arm`` never gets there; not a
        number = not measured."""
        result = self.result(short, seed, arm.length)
        if result is None or result.gap or not self.curve(arm.name, seed).validation:
            return math.nan
        steps = self.config(arm.name, seed).train.steps
        step = self.curve(arm.name, seed).first_step_below(arm.length, result.loss)
        return None if step is None else steps / step

    def time_to_loss(self, short: str, arm: Arm, seed: int) -> float | None:
        """Time that ``short`` needs to reach a loss at the length of ``arm``, over the time that
        ``arm`` needs: the mean over five losses, from the worse of the two last ones up. So the
        paper measures how much faster training is (§4.2); None = not measured."""
        ratio = self.choice.time_ratios.get(f"{short}/{arm.name}")
        curves = [self.curve(name, seed) for name in (short, arm.name)]
        known = [sorted(curve.validation.get(arm.length, {}).items()) for curve in curves]
        if ratio is None or not all(known):
            return None
        worst = max(points[-1][1] for points in known)
        start = min(points[0][1] for points in known)
        if not start > worst:
            return None
        ratios = []
        for loss in np.linspace(worst, worst + (start - worst) / 2, NUM_LOSSES):
            ours, theirs = (curve.first_step_below(arm.length, float(loss)) for curve in curves)
            if ours is None or theirs is None:
                return None
            ratios.append(ratio * ours / theirs)
        return statistics.fmean(ratios)


def per_document(result: Result) -> tuple[np.ndarray, np.ndarray] | None:
    """(nats, tokens), each [documents]; None where there are not two documents to compare."""
    if result.documents is None:
        return None
    nats, tokens = result.document_sums()
    scored = tokens > 0
    return (nats, tokens) if int(scored.sum()) > 1 else None


def time_ratio(measures: Measures, short: str, long: str) -> float | None:
    """An update's time of ``short`` over that of ``long``: both have as many tokens. Geometric mean
    over the turns of the first backend; None = not measured."""
    if measures.study.speed is None:
        return None
    backend = next(iter(measures.study.speed.backends))
    logs = [
        math.log(a.seconds_per_token / b.seconds_per_token)
        for a, b in zip(measures.costs(short, backend), measures.costs(long, backend), strict=True)
        if a is not None and b is not None
    ]
    return math.exp(statistics.fmean(logs)) if logs else None


def _step_cost(config: RunConfig) -> StepCost | None:
    records = [
        record
        for record in read_records(config.run_dir / "metrics.jsonl")
        if record["kind"] == "train" and record["step"] > WARM_UP_STEPS
    ]
    if not records:
        return None
    seconds = statistics.median(record["step_seconds"] for record in records)
    memory = max(record["peak_memory_bytes"] for record in records)
    return StepCost(seconds / config.tokens_per_step, memory)


def _number(value: float | None) -> float:
    """The record has null for what is not finite."""
    return math.nan if value is None else value
