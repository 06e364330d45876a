"""A whole training state to and from a checkpoint."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed_lm import platform
from distributed_lm.checkpoint import store
from distributed_lm.checkpoint.blocks import Block
from distributed_lm.checkpoint.folders import read_state
from distributed_lm.errors import CheckpointError
from distributed_lm.process_groups import (
    ProcessGroups,
    random_states,
    seed_random_states,
    set_random_states,
)
from distributed_lm.training.engine import TrainingEngine
from distributed_lm.training.zero_state import (
    MASTER,
    ensure_moments,
    loss_scale_state,
    optimizer_blocks,
    refresh_gathered_weights,
    set_loss_scale_state,
    set_updates_done,
    updates_done,
    weight_blocks,
)


def begin_snapshot(
    engine: TrainingEngine, run_dir: Path, step: int, state: dict[str, Any]
) -> store.Save:
    """Collective. ``state`` is the loop's own part; the engine's is added here.

    Raises:
        SaveError: with the reason; training can go on.
    """
    blocks = snapshot_blocks(engine)
    content = {
        **state,
        "layout": engine.groups.layout.describe(),
        "updates_done": updates_done(engine),
        "loss_scale": loss_scale_state(engine),
        "config": engine.config.model_dump(mode="json"),
        "versions": platform.describe_environment(),
    }
    timeout_seconds = engine.config.checkpoint.save_timeout_seconds
    return store.Save(run_dir, step, blocks, content, engine.groups, timeout_seconds)


def snapshot_blocks(engine: TrainingEngine) -> list[Block]:
    """Every tensor of a checkpoint as far as this rank holds it."""
    ensure_moments(engine)
    return weight_blocks(engine) + optimizer_blocks(engine) + _random_blocks(engine.groups)


def load_snapshot(engine: TrainingEngine, run_dir: Path, step: int) -> dict[str, Any]:
    """Collective. Restores the engine and returns what ``state`` was saved.

    Raises:
        CheckpointError: if the checkpoint does not fit the config.
    """
    state = read_state(run_dir, step)
    ensure_moments(engine)
    store.load(
        run_dir, step, _weights_from_masters(engine) + optimizer_blocks(engine), engine.groups
    )
    refresh_gathered_weights(engine)
    set_updates_done(engine, state["updates_done"])
    set_loss_scale_state(engine, state["loss_scale"])
    if not _continue_random_states(engine, run_dir, step, state["layout"]):
        # None to continue on this grid or device: new ones, which depend on seed and step alone.
        seed_random_states(_seed_after(engine.config.seed, step), engine.groups)
    return state


def _seed_after(seed: int, step: int) -> int:
    """A seed like no other run's: seed + step would be that of seed + 1 one step earlier."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:4], "big")


def _continue_random_states(engine: TrainingEngine, run_dir: Path, step: int, layout: str) -> bool:
    """False if the checkpoint is of another layout, or of CPUs where there are now GPUs."""
    if layout != engine.groups.layout.describe():
        return False
    random = _random_blocks(engine.groups)
    try:
        store.load(run_dir, step, random, engine.groups)
    except CheckpointError:
        return False
    set_random_states({block.key.rsplit(".", 1)[1]: block.values for block in random})
    return True


def _weights_from_masters(engine: TrainingEngine) -> list[Block]:
    """The weights, to be filled by rounding the fp32 masters: exact from any precision to any."""
    return [
        replace(block, key=f"{MASTER}.{block.key.removeprefix('model.')}")
        for block in weight_blocks(engine)
    ]


def _random_blocks(groups: ProcessGroups) -> list[Block]:
    """Each rank's random states as tensors of their own, named by its place in the grid."""
    place = groups.coordinates
    prefix = f"random.data{place.data}.pipeline{place.pipeline}.tensor{place.tensor}"
    return [
        Block(f"{prefix}.{name}", values, tuple(values.shape), (0,), (0,))
        for name, values in sorted(random_states().items())
    ]
