"""What a resumed run must not forget: updates left out, random numbers, where a rewind went."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from distributed_lm.checkpoint.folders import checkpoint_path, read_state
from distributed_lm.checkpoint.manifest import MANIFEST, write_manifest
from distributed_lm.checkpoint.plain import PlainCheckpoint
from distributed_lm.config import RunConfig
from distributed_lm.training.snapshot import begin_snapshot, load_snapshot
from distributed_lm.training.zero_state import updates_done
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, messages, train_run
from tests.support.training import build_engine, random_microbatches, tiny_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {"zero": {"stage": 0}}),
    "tp2-zero1": (2, {"parallel": {"tensor": 2}}),
    "dp2-zero2-bf16": (2, {"zero": {"stage": 2}, "precision": "bf16"}),
    "dp2-zero3": (2, {"zero": {"stage": 3}}),
}
LEFT_OUT = (0, 2, 5)
SAVED, LAST = 4, 8


def step_with_gaps(config: RunConfig, run_dir: Path, is_resumed: bool) -> dict[str, Any]:
    """Steps of which some leave the update out, with a save in the middle or going on from it."""
    engine, groups = build_engine(config)
    if is_resumed:
        load_snapshot(engine, run_dir, SAVED)
    results = []
    for step in range(SAVED if is_resumed else 0, LAST):
        if step == SAVED and not is_resumed:
            begin_snapshot(engine, run_dir, SAVED, {}).finish()
        limit = 0.0 if step in LEFT_OUT else float("inf")
        batch = random_microbatches(config, groups, step)
        results.append(engine.train_step(batch, 1e-2, limit))
    return {"results": results, "updates_done": updates_done(engine)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_left_out_are_not_made_up_for(layout: str, tmp_path: Path) -> None:
    world_size, sections = LAYOUTS[layout]
    config = tiny_config(model={"num_layers": 1}, **sections)
    whole = run_distributed(step_with_gaps, world_size, config, tmp_path, False)
    resumed = run_distributed(step_with_gaps, world_size, config, tmp_path, True)
    assert read_state(tmp_path, SAVED)["updates_done"] == SAVED - 2
    for uninterrupted, after in zip(whole, resumed, strict=True):
        assert after["results"] == uninterrupted["results"][SAVED:]
        assert after["updates_done"] == uninterrupted["updates_done"] == LAST - len(LEFT_OUT)
        skipped = [not result.is_updated for result in uninterrupted["results"]]
        assert skipped == [step in LEFT_OUT for step in range(LAST)]


SHORT = (
    "model.num_layers=1", "train.steps=12", "schedule.total_steps=12", "checkpoint.save_every=4",
    "evaluation.lengths=[64]", "evaluation.max_tokens=512",
)  # fmt: skip
SPIKES = ("train.spike.window=3", "train.spike.threshold=0.5")


def train_on_noise(config: RunConfig, positions: tuple[int, ...]) -> None:
    """Some batches hold other bytes than they should: their loss is far above the others'."""
    from distributed_lm.data.batches import TrainingData

    batch = TrainingData.batch

    def spoilt(self: TrainingData, position: int, *arguments: Any) -> tuple[torch.Tensor, ...]:
        tokens = batch(self, position, *arguments)
        return tuple(255 - part for part in tokens) if position in positions else tokens

    TrainingData.batch = spoilt
    train_run(config)


@pytest.fixture
def runs(demo_data: Path, tmp_path: Path) -> Runs:
    return Runs(demo_data, tmp_path)


def columns(records: dict[str, list[Any]]) -> dict[int, tuple[float, float, str]]:
    """Loss, gradient norm and ledger of each step, the last time it was done."""
    return {
        line["step"]: (line["loss"], line["grad_norm"], line["data_digest"])
        for line in records["train"]
    }


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_run_that_skipped_a_spike_resumes_exactly(world_size: int, stage: int, runs: Runs) -> None:
    """One spike before the checkpoint; one so soon after it that the yardstick is of before."""
    options = (*SHORT, *SPIKES, "train.spike.action=skip", f"zero.stage={stage}")
    noise = (5, 8)
    for name, steps in (("whole", 12), ("parts", 8), ("parts", 12)):
        config = runs.config(name, *options, f"train.steps={steps}")
        run_distributed(train_on_noise, world_size, config, noise)
    whole, parts = (runs.records(runs.config(name)) for name in ("whole", "parts"))
    assert len(messages(whole, "spike")) == 2
    assert all("update left out" in message for message in messages(whole, "spike"))
    assert messages(parts, "spike") == messages(whole, "spike")
    assert len(parts["train"]) == 12
    assert columns(parts) == columns(whole)
    for name in ("whole", "parts"):
        assert read_state(runs.config(name).run_dir, 8)["updates_done"] == 7
        assert read_state(runs.config(name).run_dir, 12)["updates_done"] == 10


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_rewind_is_a_fresh_start_from_its_checkpoint(
    world_size: int, stage: int, runs: Runs
) -> None:
    options = (*SHORT, *SPIKES, "train.spike.action=rewind", f"zero.stage={stage}")
    config, fresh = runs.config("rewound", *options), runs.config("fresh", *options)
    run_distributed(train_on_noise, world_size, config, (5,))
    rewound = runs.records(config)
    [message] = messages(rewound, "rewind")
    assert "at step 6: back to step 4, without the batches since" in message
    copy_checkpoint(config.run_dir, fresh.run_dir, 4, data_position=6)
    run_distributed(train_run, world_size, fresh)
    after = columns(runs.records(fresh))
    assert list(after) == list(range(5, 13))
    assert after == {step: columns(rewound)[step] for step in after}
    one, other = (PlainCheckpoint(checkpoint_path(run.run_dir, 12)) for run in (config, fresh))
    assert list(one) == list(other)
    assert not [name for name in one if not torch.equal(one.read(name), other.read(name))]


def copy_checkpoint(run_dir: Path, copy: Path, step: int, data_position: int) -> None:
    """A run folder with that checkpoint alone, whose next batch is another."""
    folder = checkpoint_path(copy, step)
    shutil.copytree(checkpoint_path(run_dir, step), folder)
    state = json.loads((folder / "state.json").read_text())
    assert state["data_position"] == step
    (folder / "state.json").write_text(json.dumps({**state, "data_position": data_position}))
    (folder / MANIFEST).unlink()
    write_manifest(folder, step, {}, state["save"])


def train_and_draw(config: RunConfig) -> list[dict[str, list[float]]]:
    """Random numbers from every source, drawn in each step as dropout would."""
    from distributed_lm.training.loop import TrainingLoop

    step, drawn = TrainingLoop._step, []

    def draw_and_step(self: TrainingLoop) -> Any:
        tracker = get_cuda_rng_tracker()
        draws = {"default": torch.rand(2).tolist()}
        for name in tracker.get_states():
            with tracker.fork(name):
                draws[name] = torch.rand(2).tolist()
        drawn.append(draws)
        return step(self)

    TrainingLoop._step = draw_and_step
    train_run(config)
    return drawn


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "zero.stage=2"])
def test_random_numbers_go_on_as_without_the_resume(layout: str, runs: Runs) -> None:
    """Of whole runs: nothing between loading and stepping may draw. Here with validation."""
    options = (*SHORT, "model.num_layers=2", layout, "evaluation.every=3")
    drawn = {}
    for name, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        config = runs.config(name, *options, f"train.steps={steps}")
        drawn[name, steps] = run_distributed(train_and_draw, 2, config)
    for rank in (0, 1):
        whole, first, second = (draws[rank] for draws in drawn.values())
        assert (len(first), len(second)) == (4, 4)
        assert first + second == whole
        for source in whole[0]:
            assert len({tuple(draws[source]) for draws in whole}) == 8  # or equal is no news
    assert losses(runs.records(runs.config("parts"))) == losses(runs.records(runs.config("whole")))
