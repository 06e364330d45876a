"""Rehearse small worlds in one process, where a test can break the code that builds them."""

import importlib
from collections.abc import Callable, Sequence

from distributed_lm.config import RunConfig
from distributed_lm.rehearsal.views import RankView
from tests.support.ranks import run_distributed

Breakage = Callable[[], None]


def build_views(
    config: RunConfig, world_size: int, breakage: Breakage | None = None
) -> tuple[list[RankView], dict[str, list[str]]]:
    """In a process of its own: every rank as far as it can be built, and all problems by check."""
    importlib.import_module("distributed_lm.rehearsal.preload")
    from distributed_lm.rehearsal import command, worker
    from distributed_lm.rehearsal.world import prepare

    script = prepare(config, world_size)
    if breakage is not None:
        breakage()
    built = [worker.build(script, rank) for rank in range(world_size)]
    views = [view for view in built if isinstance(view, RankView)]
    problems = command.find_problems(views, command.expectations(script))
    return views, {"building": [text for text in built if isinstance(text, str)], **problems}


def rehearse_all(
    cases: Sequence[tuple[RunConfig, int]],
) -> list[tuple[list[RankView], dict[str, list[str]]]]:
    """``build_views`` of each (config, world size), one after another in the same process."""
    return run_distributed(_each, 1, list(cases))[0]


def problems_of(config: RunConfig, world_size: int, breakage: Breakage) -> dict[str, list[str]]:
    """What the checks say once the code is broken; checks that say nothing are left out."""
    found = run_distributed(_broken, 1, config, world_size, breakage)[0]
    return {name: problems for name, problems in found.items() if problems}


def _each(
    cases: list[tuple[RunConfig, int]],
) -> list[tuple[list[RankView], dict[str, list[str]]]]:
    return [build_views(config, world_size) for config, world_size in cases]


def _broken(config: RunConfig, world_size: int, breakage: Breakage) -> dict[str, list[str]]:
    return build_views(config, world_size, breakage)[1]
