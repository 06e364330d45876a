"""What a study will cost, before anything runs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_lm.config import RunConfig
from distributed_lm.data.vocabulary import vocabulary
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.study.choice import Choice
from distributed_lm.study.runs import scorings_of, speed_runs, training_run, tuning_run
from distributed_lm.study.schema import Arm, Study

# A forward pass is a third of forward and backward.
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Item:
    """One line of the bill."""

    name: str
    runs: int
    tokens: float
    """Of all its runs."""
    hours: float
    """Device-hours of all its runs, at the assumed FLOP/s."""


def make_bill(study: Study) -> list[Item]:
    """Training and evaluation of each arm, tuning and speed, by FLOPs over assumed FLOP/s.

    An arm that is given another's time is billed as training in full: how much less it takes is
    known once both have been timed. Sliding evaluation with stride S reads length / S times the
    tokens it scores.
    """
    choice = Choice()
    items = []
    for arm in study.arms:
        config = training_run(study, arm, study.seeds[0], choice).config
        items.append(_item(arm.name, study, [config] * len(study.seeds)))
    tuned = [
        tuning_run(study, arm, rate).config
        for arm in study.full_arms
        for rate in (study.tuning.learning_rates if study.tuning else ())
    ]
    items.append(_item("tuning", study, tuned))
    items.append(_item("speed", study, [run.config for run in speed_runs(study)]))
    items.append(_evaluation(study, choice))
    return [item for item in items if item.runs]


def parameters(study: Study, arm: Arm) -> int | None:
    config = training_run(study, arm, study.seeds[0], Choice()).config
    size = vocabulary(config)
    return None if size is None else total_parameters(config.model, size)


def _item(name: str, study: Study, configs: Sequence[RunConfig]) -> Item:
    tokens = [config.train.steps * config.tokens_per_step for config in configs]
    flops = sum(
        count * _flops_per_token(config, config.data.sequence_length)
        for count, config in zip(tokens, configs, strict=True)
    )
    return Item(name, len(configs), sum(tokens), _hours(study, flops))


def _evaluation(study: Study, choice: Choice) -> Item:
    runs, tokens, flops = 0, 0.0, 0.0
    for arm in study.arms:
        config = training_run(study, arm, study.seeds[0], choice).config
        for scoring in scorings_of(study, arm):
            runs += len(study.seeds)
            for length in scoring.lengths:
                reads = length / scoring.stride if scoring.stride else 1.0
                if scoring.protocol == "context":
                    reads = float(length)
                scored = scoring.sample or config.evaluation.max_tokens
                count = scored * reads * len(study.seeds)
                tokens += count
                flops += FORWARD_SHARE * count * _flops_per_token(config, length)
    return Item("evaluation", runs, tokens, _hours(study, flops))


def _flops_per_token(config: RunConfig, length: int) -> float:
    return training_flops_per_token(config.model, vocabulary(config) or 0, length).full


def _hours(study: Study, flops: float) -> float:
    return flops / (study.teraflops_per_device * 1e12) / 3600
