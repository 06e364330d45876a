"""The file of ``python -m launch stages``: what is to be done, in which order.

::

    name: demo                     # of the jobs in the queue
    folder: /shared/runs/demo      # for scripts and logs of the arrays, and for plain commands
    stages:
      - name: tune                 # a stage is one job array
        tasks:
          - config: /shared/a.yaml                 # train this run
            overrides: [optimizer.learning_rate=1e-3]
          - config: /shared/b.yaml
      - name: choose
        after: [tune]
        tasks:
          - command: [study-step, choose, /shared/study.yaml]   # one process, on one node
            part: choose
      - name: evaluate
        after: [choose]
        tasks:
          - config: /shared/a.yaml                 # at the run's nodes, on its run folder
            command: [evaluate, --lengths, "1024,2048"]
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from distributed_lm.config import NAME_PATTERN
from distributed_lm.errors import ConfigError
from launch.supervisor.journal import CANCELLED

# A folder beside files of the launcher's own, which all have a dot in their names but for one.
PART_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Word = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(Section):
    """One command of ``distributed-lm``: on a run, or in a process of its own."""

    config: str | None = None
    """Of the run to work on; off = the command runs in one process on one node, without devices."""
    overrides: tuple[str, ...] = ()
    """Fields of the config to change."""
    command: Annotated[tuple[Word, ...], Field(min_length=1)] = ("train",)
    """On a run, ``train``, or ``evaluate`` with its arguments, which is given the run folder as its
    first; in one process per device. Without a run any command with its arguments."""
    part: Annotated[str, Field(pattern=PART_PATTERN)] | None = None
    """Tells what is done in one folder apart: journal and logs are in ``slurm/PART`` and
    ``logs/PART``. Off = the command's name; training has none."""

    @property
    def trains(self) -> bool:
        return self.config is not None and self.command == ("train",)

    @property
    def folder_of_part(self) -> str:
        return "" if self.trains else self.part or self.command[0]


class Stage(Section):
    """Tasks that are submitted as one job array."""

    name: Name
    after: tuple[str, ...] = ()
    """Stages before it. A task on a run waits for their tasks on the same run; where there are
    none, and without a run, it waits for all of them."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """So many of its tasks at once; off = as the command line says."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)]


class Graph(Section):
    name: Name
    """Beginning of the jobs' names."""
    folder: Annotated[str, Field(min_length=1)]
    """For the arrays, and for commands without a run: those work in ``FOLDER/slurm/PART``."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @property
    def path(self) -> Path:
        return Path(self.folder).resolve()


def load_graph(path: Path) -> Graph:
    """Read YAML or JSON.

    Raises:
        ConfigError: naming file and field, what was found and what was expected.
    """
    try:
        graph = Graph.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_problem(error)}") from None
    for problem in _contradictions(graph):
        raise ConfigError(f"{path}: {problem}")
    return graph


def _contradictions(graph: Graph) -> Iterator[str]:
    known: list[str] = []
    for stage in graph.stages:
        where = f"stage {stage.name}"
        if stage.name in known:
            yield f"{where}: another stage has this name; give each its own"
        for name in stage.after:
            if name not in known:
                before = ", ".join(known) or "none"
                yield f"{where}: after: {name!r} is no stage before this one; there are: {before}"
        known.append(stage.name)
        if len({task.config is None for task in stage.tasks}) > 1:
            yield f"{where}: tasks with a config and without one need two stages"
        for number, task in enumerate(stage.tasks):
            for problem in _problems_of_task(task):
                yield f"{where}: task {number}: {problem}"


def _problems_of_task(task: Task) -> Iterator[str]:
    if not re.match(PART_PATTERN, task.command[0]):
        yield f"command={list(task.command)}: expected a command of distributed-lm first"
    if task.config is None and task.overrides:
        yield "overrides: there is no config to change; leave them out"
    if task.config is None and task.command[0] == "train":
        yield "config: missing; training needs one"
    if task.config is not None and task.command[0] not in ("train", "evaluate"):
        yield (
            f"command={list(task.command)}: on a run's nodes run train and evaluate; give other "
            "commands without a config, with the run folder among their arguments"
        )
    if task.config is not None and task.command[0] == "train" and len(task.command) > 1:
        yield f"command={list(task.command)}: train takes no arguments here; use overrides"
    if task.trains and task.part is not None:
        yield f"part={task.part}: the training of a run is no part of it; leave it out"
    if task.folder_of_part == CANCELLED:
        yield f"part={CANCELLED}: the launcher has a file of this name; choose another"


def _problem(error: pydantic.ValidationError) -> str:
    """The first one as 'field=found: expected', on one line."""
    problem: Any = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    field = field if field.isprintable() else repr(field)
    if problem["type"] == "extra_forbidden":
        return f"{field}: no such field; launch/graph.py explains them all"
    if problem["type"] == "missing":
        return f"{field}: missing; add it"
    if problem["type"] == "too_short":
        return f"{field}: empty; it needs at least one"
    if problem["type"] == "string_pattern_mismatch":
        return (
            f"{field}={problem['input'][:60]!r}: expected a plain name of letters, digits, - and _"
        )
    found = str(problem["input"])[:60]
    if not field:
        return f"expected 'name:', 'folder:' and 'stages:', found {found!r}"
    return f"{field}={found!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
