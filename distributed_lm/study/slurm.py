"""A study as the file of ``python -m launch stages``: job arrays that wait for one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from distributed_lm.study.choice import Choice
from distributed_lm.study.runs import (
    StudyRun,
    evaluate_arguments,
    scorings_of,
    speed_runs,
    training_run,
    training_runs,
    tuning_runs,
)
from distributed_lm.study.schema import Study, load_study

STUDY = "study.yaml"
STAGES = "stages.yaml"


def write_stages(study: Study) -> Path:
    """Write ``STUDY/study.yaml``, with nothing in it that depends on where it is read, the configs
    of all runs, and ``STUDY/stages.yaml``. Returns the latter's path.

    The training runs' learning rates are not known yet: the ``choose`` job writes them into the
    configs that the training jobs will read.
    """
    study = _resolved(study)
    choice = Choice.read(study.folder)
    tune, speed = tuning_runs(study), speed_runs(study)
    train = training_runs(study, choice)
    for run in (*tune, *speed, *train):
        run.write()
    stages: list[dict[str, Any]] = []
    if choice.missing(study):
        if tune:
            stages.append({"name": "tune", "tasks": [_trains(run) for run in tune]})
        if speed:  # one at a time: what runs beside it might be measured, too
            tasks = [_trains(run) for run in speed]
            stages.append({"name": "speed", "after": _last(stages), "limit": 1, "tasks": tasks})
        stages.append({"name": "choose", "after": _all(stages), "tasks": [_step(study, "choose")]})
    stages += [
        {"name": "train", "after": _last(stages), "tasks": [_trains(run) for run in train]},
        {"name": "evaluate", "after": ["train"], "tasks": _evaluations(study, choice)},
        {"name": "report", "after": ["evaluate"], "tasks": [_step(study, "report")]},
    ]
    path = study.folder / STAGES
    graph = {"name": study.name, "folder": str(study.folder), "stages": stages}
    path.write_text(yaml.safe_dump(graph, sort_keys=False), encoding="utf-8")
    return path


def _resolved(study: Study) -> Study:
    folder = study.folder.resolve()
    config = training_run(study, study.arms[0], study.seeds[0], Choice()).config
    data = config.data.model_dump(mode="json")
    if isinstance(data["path"], str):
        data["path"] = str(Path(data["path"]).resolve())
    else:
        for corpus in data["path"]:
            corpus["path"] = str(Path(corpus["path"]).resolve())
    fields: dict[str, Any] = {**study.fields, "data.path": data["path"]}
    if data["cache_path"]:
        fields["data.cache_path"] = str(Path(data["cache_path"]).resolve())
    values = study.model_dump(mode="json", exclude={"path", "overrides"})
    values |= {
        "base": str((study.path.parent / study.base).resolve()),
        "output_dir": str(folder.parent),
        "fields": fields,
        "prepare": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STUDY
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return load_study(path)


def _trains(run: StudyRun) -> dict[str, Any]:
    return {"config": str(run.path.resolve())}


def _step(study: Study, stage: str) -> dict[str, Any]:
    return {"command": ["study", str(study.path), "--stage", stage], "part": stage}


def _evaluations(study: Study, choice: Choice) -> list[dict[str, Any]]:
    return [
        {
            "config": str(training_run(study, arm, seed, choice).path.resolve()),
            "command": ["evaluate", *evaluate_arguments(scoring)],
            "part": f"evaluate-{number}",
        }
        for seed in study.seeds
        for arm in study.arms
        for number, scoring in enumerate(scorings_of(study, arm))
    ]


def _all(stages: list[dict[str, Any]]) -> list[str]:
    return [stage["name"] for stage in stages]


def _last(stages: list[dict[str, Any]]) -> list[str]:
    return [stages[-1]["name"]] if stages else []
