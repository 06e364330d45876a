"""``python -m launch array``: several runs as stages: train, then evaluate, then report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from distributed_lm.config import load_config
from launch.graph import Graph, Stage, Task


def array_graph(
    paths: Sequence[Path], overrides: Sequence[str], lengths: Sequence[int], reports: bool
) -> Graph:
    """The stages of some runs.

    Args:
        overrides: for all of them.
        lengths: context lengths to evaluate each run at, each in a job of its own; none = none.
        reports: whether to compare the runs at the end.

    Raises:
        ConfigError: if a config is wrong.
    """
    configs = [load_config(path, overrides) for path in paths]
    runs = [str(config.run_dir.resolve()) for config in configs]
    name = f"array-{configs[0].name}"
    folder = Path(runs[0]).parent / "arrays" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    stages = [Stage(name="train", tasks=tuple(_task(path, overrides) for path in paths))]
    if lengths:
        tasks = [_evaluation(path, overrides, length) for path in paths for length in lengths]
        stages.append(Stage(name="evaluate", after=("train",), tasks=tuple(tasks)))
    if reports:
        command = ("report", *runs, "--output", str(folder))
        stages.append(
            Stage(name="report", after=(stages[-1].name,), tasks=(Task(command=command),))
        )
    return Graph(name=name, folder=str(folder), stages=tuple(stages))


def _task(path: Path, overrides: Sequence[str]) -> Task:
    return Task(config=str(path), overrides=tuple(overrides))


def _evaluation(path: Path, overrides: Sequence[str], length: int) -> Task:
    command = ("evaluate", "--lengths", str(length))
    return _task(path, overrides).model_copy(
        update={"command": command, "part": f"evaluate_{length}"}
    )
