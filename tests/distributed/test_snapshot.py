"""A checkpoint is of the step at which it was begun, however late it is written."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_lm.checkpoint import dcp
from distributed_lm.checkpoint.blocks import Block
from distributed_lm.checkpoint.folders import checkpoint_path
from distributed_lm.checkpoint.plain import PlainCheckpoint
from distributed_lm.config import RunConfig
from distributed_lm.training.engine import TrainingEngine
from distributed_lm.training.snapshot import begin_snapshot
from distributed_lm.training.zero_state import optimizer_blocks, weight_blocks
from tests.support.ranks import run_distributed
from tests.support.training import build_engine, random_microbatches, tiny_config

STEP = 2
# Each keeps its masters and moments in another way.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {"zero": {"stage": 0}}),
    "tp2-zero1": (2, {"parallel": {"tensor": 2}}),
    "dp2-zero2-bf16": (2, {"zero": {"stage": 2}, "precision": "bf16"}),
    "dp2-zero3": (2, {"zero": {"stage": 3}}),
}


def hold_writers(until: Path) -> None:
    """From now on a forked writer writes nothing before that file is there."""
    write = dcp._write

    def wait_and_write(*arguments: Any) -> None:
        while not until.exists():
            time.sleep(0.01)
        write(*arguments)

    dcp._write = wait_and_write


def copies(engine: TrainingEngine) -> list[Block]:
    """This rank's weights, masters and moments, as they are now."""
    blocks = weight_blocks(engine) + optimizer_blocks(engine)
    return [replace(block, values=block.values.detach().clone()) for block in blocks]


def save_late(config: RunConfig, run_dir: Path) -> dict[str, set[str]]:
    """Names of tensors that training has changed before they were written, and of those that are
    not in the checkpoint as they were when the save began."""
    engine, groups = build_engine(config)

    def step(number: int) -> None:
        engine.train_step(random_microbatches(config, groups, number), 1e-2)

    for number in range(STEP):
        step(number)
    begun = run_dir / "begun"
    hold_writers(begun)
    save = begin_snapshot(engine, run_dir, STEP, {})
    before, random = copies(engine), torch.get_rng_state()
    before.append(Block(random_key(engine), random, tuple(random.shape), (0,), (0,)))
    torch.rand(100)
    for number in (STEP, STEP + 1):
        step(number)
    changed = {
        old.key
        for old, new in zip(before, copies(engine), strict=False)  # but the random state
        if not torch.equal(old.values, new.values)
    }
    groups.barrier()
    assert not list(save.folder.glob("*.distcp"))
    begun.touch()
    save.finish()
    checkpoint = PlainCheckpoint(checkpoint_path(run_dir, STEP))
    different = {block.key for block in before if not is_as_saved(block, checkpoint)}
    return {"changed": changed, "different": different, "all": {block.key for block in before}}


def random_key(engine: TrainingEngine) -> str:
    place = engine.groups.coordinates
    return f"random.data{place.data}.pipeline{place.pipeline}.tensor{place.tensor}.default"


def is_as_saved(block: Block, checkpoint: PlainCheckpoint) -> bool:
    part = tuple(
        slice(start, start + length)
        for start, length in zip(block.offset, block.values.shape, strict=True)
    )
    return torch.equal(checkpoint.read(block.key)[part], block.values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_late_is_of_the_step_of_the_save(layout: str, tmp_path: Path) -> None:
    world_size, sections = LAYOUTS[layout]
    config = tiny_config(model={"num_layers": 1}, **sections)
    for rank in run_distributed(save_late, world_size, config, tmp_path):
        assert not rank["different"]
        # Or else equality is no news: every tensor but the random states has moved on.
        assert len(rank["changed"]) == len(rank["all"]) - 1 > 20
