"""A study as a graph: prepare -> tune, speed -> choose -> train -> evaluate -> report. No torch.

Every stage skips what is there already, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from distributed_lm.checkpoint.folders import saved_steps
from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError, DataError, TrainingError
from distributed_lm.evaluation.results import read_results
from distributed_lm.study.choice import CHOICE, Choice, Tuned, best_rate
from distributed_lm.study.execution import Task
from distributed_lm.study.measures import Measures, TrainingCurve, time_ratio
from distributed_lm.study.runs import (
    StudyRun,
    evaluate_arguments,
    scorings_of,
    training_run,
    tuning_run,
)
from distributed_lm.study.schema import Arm, Scoring, Study
from distributed_lm.tracking.metrics_file import read_records

PACKAGE_PREFIX = "package:"


def prepare(study: Study, console: Console) -> None:
    """Make the data set if it is not there.

    Raises:
        TrainingError: if prepare-data fails.
    """
    if not study.prepare:
        return
    arguments = [_in_package(argument) for argument in study.prepare]
    command = [sys.executable, "-m", "distributed_lm", "prepare-data", *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        raise TrainingError(f"prepare-data failed: {' '.join(command)}")


def training_tasks(runs: Sequence[StudyRun]) -> list[Task]:
    """Write the runs' configs; one task each, done when its last validation is on record."""
    for run in runs:
        run.write()
    return [
        Task(run.config.name, (str(run.path),), partial(_has_ended, run.config)) for run in runs
    ]


def evaluation_tasks(study: Study, choice: Choice) -> list[Task]:
    """One for each run and scoring."""
    tasks = []
    for seed in study.seeds:
        for arm in study.arms:
            config = training_run(study, arm, seed, choice).config
            for number, scoring in enumerate(scorings_of(study, arm)):
                tasks.append(
                    Task(
                        f"evaluate-{config.name}-{number}-{scoring.protocol}",
                        (
                            str(config.run_dir),
                            "--command",
                            "evaluate",
                            "--",
                            *evaluate_arguments(scoring),
                        ),
                        partial(_is_scored, config, scoring),
                    )
                )
    return tasks


def choose(study: Study, console: Console) -> Choice:
    """Learning rates from the tuning runs, steps from the speed runs; written to ``choice.json``.
    What it says already stays, since runs were made with it.

    Raises:
        TrainingError: if every learning rate of an arm diverged.
        DataError: if a tuning or speed run is missing.
    """
    before = Choice.read(study.folder)
    if not before.missing(study):
        return before
    tuned, ratios, steps = dict(before.tuned), dict(before.time_ratios), dict(before.steps)
    for arm in study.full_arms if study.tuning else ():
        if arm.name not in tuned:
            tuned[arm.name] = one = _tune(study, arm)
            edge = ", the edge of what was tried" if one.at_edge else ""
            console.print(f"  {arm.name}: learning rate {one.rate:g}{edge}")
    measures = Measures(study)
    for short, long in study.time_pairs:
        if f"{short}/{long}" not in ratios:
            ratio = time_ratio(measures, short, long)
            if ratio is None:
                raise DataError(f"{study.folder}: {short} and {long} have not been timed")
            ratios[f"{short}/{long}"] = ratio
    for arm in study.arms:
        if arm.time_of is not None and arm.name not in steps:
            twin = study.full_twin(arm)
            full = training_run(study, twin, study.seeds[0], Choice()).config.train.steps
            steps[arm.name] = max(1, round(full * ratios[f"{arm.time_of}/{twin.name}"]))
            console.print(f"  {arm.name}: {steps[arm.name]} steps")
    choice = Choice(tuned, steps, ratios)
    choice.write(study.folder)
    return choice


def chosen(study: Study) -> Choice:
    """What was chosen for the study.

    Raises:
        DataError: if something is missing.
    """
    choice = Choice.read(study.folder)
    missing = choice.missing(study)
    if missing:
        raise DataError(
            f"{study.folder}/{CHOICE} does not say {missing[0]}; run the study without --stage, or "
            "its stages up to choose"
        )
    return choice


def _tune(study: Study, arm: Arm) -> Tuned:
    tuning = study.tuning
    assert tuning is not None
    runs = {rate: tuning_run(study, arm, rate) for rate in tuning.learning_rates}
    losses = {rate: _tuning_loss(run.config) for rate, run in runs.items()}
    factor = 1.0
    if tuning.transfer == "inverse_width":
        full = training_run(study, arm, study.seeds[0], Choice()).config
        proxy = next(iter(runs.values())).config
        factor = proxy.model.hidden_size / full.model.hidden_size
    try:
        return best_rate(losses, factor)
    except ValueError:
        raise TrainingError(
            f"arms.{arm.name}: every learning rate diverged; give smaller tuning.learning_rates"
        ) from None


def _tuning_loss(config: RunConfig) -> float:
    loss = TrainingCurve.read(config.run_dir).final_loss(
        config.data.sequence_length, config.train.steps
    )
    if loss is None and not _has_diverged(config):
        raise DataError(f"{config.run_dir}: this tuning run is not finished; run the tune stage")
    return math.inf if loss is None else loss


def _has_ended(config: RunConfig) -> bool:
    """Whether the run is validated and, after that, saved; or has diverged."""
    curve = TrainingCurve.read(config.run_dir)
    lengths = config.evaluation_lengths
    if all(curve.final_loss(length, config.train.steps) is not None for length in lengths):
        return config.train.steps in saved_steps(config.run_dir)
    return _has_diverged(config)


def _has_diverged(config: RunConfig) -> bool:
    if config.train.steps in saved_steps(config.run_dir):
        return False
    records = read_records(config.run_dir / "metrics.jsonl")
    return any(record.get("event") == "non_finite" for record in records)


def _is_scored(config: RunConfig, scoring: Scoring) -> bool:
    """Whether the results are there; a run that has diverged has none to give."""
    if _has_diverged(config):
        return True
    scored = {
        result.length
        for result in read_results(config.run_dir)
        if result.step == config.train.steps
        and result.protocol == scoring.protocol
        and scoring.stride in (None, result.stride)
        and (scoring.sample is None or f"sample_{scoring.sample}_" in result.targets)
    }
    return scored >= set(scoring.lengths)


def _in_package(argument: str) -> str:
    """``package:NAME/PATH`` as the path of a file that comes with an installed package."""
    if not argument.startswith(PACKAGE_PREFIX):
        return argument
    name, _, inside = argument.removeprefix(PACKAGE_PREFIX).partition("/")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"prepare: {argument}: the package {name} is not installed; pip install it"
        )
    return str(Path(found.submodule_search_locations[0]) / inside)


STAGES = ("prepare", "tune", "speed", "choose", "train", "evaluate", "report")
