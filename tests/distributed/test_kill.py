"""A kill at any instant of a save leaves a run that resumes as if nothing had happened."""

import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distributed_lm.checkpoint.folders import checkpoint_path, saved_steps
from distributed_lm.checkpoint.manifest import verify
from tests.support.killing import (
    PHASES,
    Kill,
    run_to_death,
    train_and_watch_syncs,
    train_with_fuse,
)
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, train_run

SHORT = (
    "model.num_layers=2", "train.steps=4", "checkpoint.save_every=1", "checkpoint.keep_last=1",
    "evaluation.lengths=[64]", "evaluation.max_tokens=512",
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "two": (2, ("parallel.tensor=2",)),
}


class Case(NamedTuple):
    layout: str
    phase: str
    rank: int = 0
    is_power_cut: bool = False
    """Or else the other rank loses its peer, and is ended as a launcher would."""


CASES = [Case("one", phase) for phase in (PHASES * 3)[:16]]
CASES += [Case("two", phase, is_power_cut=True) for phase in PHASES]
CASES += [Case("two", "manifest"), Case("two", "rename")]
CASES += [Case("two", phase, rank=1) for phase in ("copy", "write", "fsync")]


def test_cases_cover_every_phase_and_all_ways_to_die() -> None:
    hits = Counter(case.phase for case in CASES)
    assert set(hits) == set(PHASES)
    assert min(hits.values()) >= 3
    assert len(CASES) >= 25
    assert sum(case.is_power_cut for case in CASES) >= 5
    assert sum(case.layout == "two" for case in CASES) >= 8
    assert {case.rank for case in CASES if case.layout == "two"} == {0, 1}


@pytest.fixture(scope="module")
def reference(
    demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[list[str]], list[float]]]:
    """By layout: what operations a run's saves make on each rank, by phase; and its losses."""
    found = {}
    for name, (world_size, overrides) in LAYOUTS.items():
        runs = Runs(demo_data, tmp_path_factory.mktemp("reference"))
        config = runs.config(name, *SHORT, *overrides)
        operations = run_distributed(train_with_fuse, world_size, config)
        found[name] = (operations, losses(runs.records(config)))
    return found


def final_losses(records: dict[str, list[Any]]) -> list[float]:
    """The loss of each step in the life that counted: the last time it was done."""
    by_step = {line["step"]: line["loss"] for line in records["train"]}
    return [by_step[step] for step in sorted(by_step)]


def choose_instant(seed: int, case: Case, operations: list[list[str]]) -> Kill:
    """Any operation of that phase, of any of the run's saves."""
    instants = [
        index for index, phase in enumerate(operations[case.rank], 1) if phase == case.phase
    ]
    return Kill(case.rank, random.Random(seed).choice(instants), case.is_power_cut)


@pytest.mark.parametrize(
    ("seed", "case"), list(enumerate(CASES)), ids=lambda value: "-".join(map(str, value))
    if isinstance(value, Case) else str(value),
)  # fmt: skip
def test_kill_during_a_save_loses_no_checkpoint(
    seed: int, case: Case, reference: dict[str, Any], demo_data: Path, tmp_path: Path
) -> None:
    world_size, overrides = LAYOUTS[case.layout]
    operations, expected = reference[case.layout]
    runs = Runs(demo_data, tmp_path)
    config = runs.config("killed", *SHORT, *overrides)
    kill = choose_instant(seed, case, operations)
    assert run_to_death(config, world_size, kill) == case.phase
    steps = saved_steps(config.run_dir)
    first_life = len(runs.records(config)["train"])
    for step in steps:
        verify(checkpoint_path(config.run_dir, step))  # what has a name is whole
    run_distributed(train_run, world_size, config)
    records = runs.records(config)
    assert final_losses(records) == expected
    # It went on from the newest checkpoint; a run that starts over gets the same losses, too.
    second_life = [line["step"] for line in records["train"][first_life:]]
    assert second_life == list(range((steps or [0])[-1] + 1, 5))
    assert saved_steps(config.run_dir) == [4]
    assert not list((config.run_dir / "checkpoints").glob(".*"))


def test_nothing_has_a_name_before_it_is_on_disk(demo_data: Path, tmp_path: Path) -> None:
    config = Runs(demo_data, tmp_path).config("synced", *SHORT, "checkpoint.keep_last=0")
    assert run_distributed(train_and_watch_syncs, 1, config) == [(4, [])]
