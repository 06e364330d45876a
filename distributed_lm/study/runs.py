"""The runs of a study, each a config of its own in the study's folder. No torch.

Arms differ in position method, length and learning rate only: tokens per update, block length,
seed and everything in the base config are the same, and so are the tokens of each update.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_lm.config import RunConfig, load_config, longest_input
from distributed_lm.errors import ConfigError
from distributed_lm.study.choice import Choice
from distributed_lm.study.schema import Arm, Scoring, Study, as_overrides

WARM_UP_STEPS = 3
"""Of a speed run: allocations, kernel choices and compilation."""


@dataclass(frozen=True)
class StudyRun:
    """One training run of a study."""

    config: RunConfig
    path: Path
    """Its config file."""

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    def write(self) -> None:
        """Write the config, if the run was not made with another one.

        Raises:
            ConfigError: if the run folder's config says otherwise.
        """
        made = self.run_dir / "config.yaml"
        if made.exists():
            difference = _difference(load_config(made), self.config)
            if difference:
                raise ConfigError(
                    f"{self.run_dir} was made with {difference}; give the study another name, or "
                    "move that folder away"
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.config.to_yaml(), encoding="utf-8")


def training_run(study: Study, arm: Arm, seed: int, choice: Choice) -> StudyRun:
    """The run of an arm and a seed, at the chosen learning rate."""
    fields: dict[str, Any] = {"seed": seed, "evaluation.lengths": _validated(arm)}
    rate = choice.rate(study.full_twin(arm).name)
    if rate is not None:
        fields["optimizer.learning_rate"] = rate
    if arm.name in choice.steps:
        fields["train.steps"] = choice.steps[arm.name]
    return _run(study, arm, f"{arm.name}-seed{seed}", fields)


def training_runs(study: Study, choice: Choice) -> list[StudyRun]:
    """Seed by seed, so that a study that is cut short has whole pairs."""
    return [training_run(study, arm, seed, choice) for seed in study.seeds for arm in study.arms]


def tuning_run(study: Study, arm: Arm, rate: float) -> StudyRun:
    """The proxy run that tries one learning rate for an arm."""
    if study.tuning is None:
        raise ValueError("the study has no tuning")
    fields = {
        "seed": study.tuning.seed,
        "evaluation.lengths": (arm.length,),
        "evaluation.every": 0,
        "optimizer.learning_rate": rate,
        **study.tuning.fields,
    }
    return _run(study, arm, f"tune-{arm.name}-lr{rate:g}", fields)


def tuning_runs(study: Study) -> list[StudyRun]:
    rates = study.tuning.learning_rates if study.tuning else ()
    return [tuning_run(study, arm, rate) for arm in study.full_arms for rate in rates]


def speed_run(study: Study, arm: Arm, backend: str, turn: int) -> StudyRun:
    """A short run that measures an arm's step with one attention backend."""
    if study.speed is None:
        raise ValueError("the study measures no speed")
    fields = {
        "seed": 0,  # none of the study's, which may change
        "train.steps": WARM_UP_STEPS + study.speed.steps,
        "train.log_every": 1,
        "schedule.warmup_steps": 0,
        "evaluation.lengths": (arm.length,),
        "evaluation.every": 0,
        "evaluation.max_tokens": arm.length,
        "checkpoint.save_every": 0,
        "attention.backend": study.speed.backends[backend],
    }
    return _run(study, arm, f"speed-{arm.name}-{backend}-{turn}", fields)


def speed_runs(study: Study) -> list[StudyRun]:
    """In turns, so that a machine that slows down slows all arms down."""
    if study.speed is None:
        return []
    return [
        speed_run(study, arm, backend, turn)
        for turn in range(study.speed.rounds)
        for backend in study.speed.backends
        for arm in study.timed_arms
    ]


def evaluate_arguments(scoring: Scoring) -> list[str]:
    """Of ``distributed-lm evaluate RUN``."""
    arguments = ["--lengths", ",".join(map(str, scoring.lengths)), "--protocol", scoring.protocol]
    if scoring.stride is not None:
        arguments += ["--stride", str(scoring.stride)]
    if scoring.sample is not None:
        arguments += ["--sample", str(scoring.sample)]
    return arguments


def scorings_of(study: Study, arm: Arm) -> list[Scoring]:
    return [scoring for scoring in study.scorings if not scoring.arms or arm.name in scoring.arms]


def _run(study: Study, arm: Arm, name: str, fields: dict[str, Any]) -> StudyRun:
    base = study.path.parent / study.base
    matched = {
        "name": name,
        "output_dir": str(study.folder.resolve()),
        "model.position": arm.position,
        "data.sequence_length": arm.length,
        "data.block_length": study.block_length,
        "batch.global_batch_size": study.tokens_per_update // arm.length,
        "batch.micro_batch_size": study.tokens_per_microbatch // arm.length,
    }
    everything = {**study.fields, **arm.fields, **matched, **fields}
    config = load_config(base, as_overrides(everything))
    limit = longest_input(config)
    if limit is not None:
        possible = [length for length in config.evaluation.lengths if length <= limit]
        config = load_config(base, as_overrides({**everything, "evaluation.lengths": possible}))
    return StudyRun(config, study.folder / "configs" / f"{name}.yaml")


def _validated(arm: Arm) -> tuple[int, ...]:
    """During training: at the trained length and at twice that."""
    return (arm.length, 2 * arm.length)


def _difference(found: RunConfig, wanted: RunConfig) -> str:
    """The first field that differs, as ``field=found, now it is wanted``; empty = none that
    matters to what is learned or measured."""
    ours, theirs = _flat(wanted.model_dump(mode="json")), _flat(found.model_dump(mode="json"))
    for field in sorted(ours.keys() | theirs.keys()):
        if field.split(".")[0] in ("output_dir", "tracking", "checkpoint", "supervision"):
            continue
        if ours.get(field) != theirs.get(field):
            return f"{field}={theirs.get(field)}, and the study now has {ours.get(field)}"
    return ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
