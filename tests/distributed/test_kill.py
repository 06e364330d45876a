"""A kill at any instant of a save leaves a run that resumes as if nothing had happened."""

import random
from pathlib import Path
from typing import Any

import pytest

from distributed_lm.checkpoint.folders import checkpoint_path, saved_steps
from distributed_lm.checkpoint.manifest import verify
from tests.support.killing import run_to_death, train_with_fuse
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, train_run

SHORT = (
    "model.num_layers=2", "train.steps=4", "checkpoint.save_every=1", "checkpoint.keep_last=1",
    "evaluation.lengths=[64]", "evaluation.max_tokens=512",
)  # fmt: skip
INSTANTS = 25


@pytest.fixture(scope="module")
def reference(
    demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[int], list[float]]]:
    """By layout: how many disk operations a run's saves make on each rank, and its losses."""
    found = {}
    for name, world_size, overrides in (("one", 1, ()), ("two", 2, ("parallel.tensor=2",))):
        runs = Runs(demo_data, tmp_path_factory.mktemp("reference"))
        config = runs.config(name, *SHORT, *overrides)
        counts = run_distributed(train_with_fuse, world_size, config, None, None)
        found[name] = (counts, losses(runs.records(config)))
    return found


def final_losses(records: dict[str, list[Any]]) -> list[float]:
    """The loss of each step in the life that counted: the last time it was done."""
    by_step = {line["step"]: line["loss"] for line in records["train"]}
    return [by_step[step] for step in sorted(by_step)]


@pytest.mark.parametrize("seed", range(INSTANTS))
def test_kill_during_a_save_loses_no_checkpoint(
    seed: int, reference: dict[str, Any], demo_data: Path, tmp_path: Path
) -> None:
    # One rank alone, or either of two: the other then loses its peer.
    name, world_size, overrides, rank = (
        ("two", 2, ("parallel.tensor=2",), seed % 2) if seed % 5 == 4 else ("one", 1, (), 0)
    )
    operations, expected = reference[name]
    fatal = random.Random(seed).randint(1, operations[rank])
    runs = Runs(demo_data, tmp_path)
    config = runs.config("killed", *SHORT, *overrides)
    assert run_to_death(config, world_size, rank, fatal)
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
