"""Resume equals the uninterrupted run: bit for bit at one layout, within rounding at another."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distributed_lm.checkpoint.folders import read_state
from distributed_lm.config import RunConfig
from distributed_lm.errors import CheckpointError
from distributed_lm.training.snapshot import begin_snapshot, load_snapshot
from distributed_lm.training.zero_state import optimizer_blocks, weight_blocks
from tests.support.ranks import run_distributed
from tests.support.training import build_engine, local_weights, random_microbatches, tiny_config

BEFORE, AFTER = 3, 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {"zero": {"stage": 0}}),
    "zero1": (1, {}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "tp2-pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "tp2-sequence-zero1": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pp2-interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "dp2-zero1": (2, {"zero": {"stage": 1}}),
    "dp2-zero2": (2, {"zero": {"stage": 2}}),
    "dp2-zero3": (2, {"zero": {"stage": 3}}),
}
MODEL = {"activation": "swiglu", "ffn_hidden_size": 96}  # SwiGLU's fused weight is two tensors


def run_steps(
    config: RunConfig, first: int, last: int, load_from: Path | None, save_to: Path | None
) -> dict[str, Any]:
    """Steps first … last − 1, after loading step ``first`` and with a save in the middle."""
    engine, groups = build_engine(config)
    if load_from is not None:
        state = load_snapshot(engine, load_from, first)
        assert state["data_position"] == first
    results = []
    for step in range(first, last):
        if save_to is not None and step == BEFORE:
            save = begin_snapshot(engine, save_to, step, {"data_position": step})
        results.append(engine.train_step(random_microbatches(config, groups, step), 1e-3))
        if step == BEFORE and save_to is not None:  # the weights have changed since the snapshot
            save.finish()
            # Megatron's own writer leaves a server process of 200 MB behind.
            assert not psutil.Process().children()
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "weights": local_weights(engine),
    }


# bf16 with ZeRO 0 is a config error.
SAME = [layout for layout in LAYOUTS if layout not in ("zero1", "pp2", "tp2", "tp2-pp2")]
PRECISIONS = [(layout, "fp32") for layout in SAME]
PRECISIONS += [(layout, "bf16") for layout in SAME if layout != "zero0"]


@pytest.mark.parametrize(("layout", "precision"), PRECISIONS)
def test_same_layout_is_bit_identical(layout: str, precision: str, tmp_path: Path) -> None:
    world_size, sections = LAYOUTS[layout]
    config = tiny_config(model=MODEL, precision=precision, **sections)
    whole = run_distributed(run_steps, world_size, config, 0, BEFORE + AFTER, None, tmp_path)
    resumed = run_distributed(run_steps, world_size, config, BEFORE, BEFORE + AFTER, tmp_path, None)
    for uninterrupted, after in zip(whole, resumed, strict=True):
        assert after["losses"] == uninterrupted["losses"][BEFORE:]
        assert after["grad_norms"] == uninterrupted["grad_norms"][BEFORE:]
        for one, other in zip(uninterrupted["weights"], after["weights"], strict=True):
            np.testing.assert_array_equal(one[3], other[3], err_msg=one[0])


ALIBI_TIED: dict[str, Any] = {}
UNTIED = {"tie_embeddings": False}
SINUSOIDAL = {"position": "sinusoidal"}
T5 = {"position": "t5"}
LEARNED = {"position": "learned"}
# From a layout, to a layout, of a model.
PAIRS = [
    ("tp2-sequence-zero1", "zero0", ALIBI_TIED),
    ("zero0", "tp2-sequence-zero1", SINUSOIDAL),
    ("tp2", "zero1", ALIBI_TIED),
    ("zero1", "tp2", UNTIED),
    ("pp2", "zero1", ALIBI_TIED),
    ("zero1", "pp2-interleaved", UNTIED),
    ("zero1", "dp2-zero1", ALIBI_TIED),
    ("dp2-zero2", "zero0", SINUSOIDAL),
    ("dp2-zero3", "dp2-zero1", ALIBI_TIED),
    ("dp2-zero1", "dp2-zero3", UNTIED),
    ("tp2-pp2", "dp2-zero1", ALIBI_TIED),
    ("dp2-zero1", "tp2-pp2", UNTIED),
    ("pp2-interleaved", "dp2-zero2", ALIBI_TIED),
    ("dp2-zero3", "tp2-sequence-zero1", ALIBI_TIED),
    ("tp2-pp2", "dp2-zero3", T5),
    ("dp2-zero2", "pp2-interleaved", T5),
    ("tp2-pp2", "zero0", LEARNED),
]


@pytest.mark.parametrize(
    ("written", "read", "model"), PAIRS, ids=[f"{pair[0]}->{pair[1]}" for pair in PAIRS]
)
def test_another_layout_continues_the_run(
    written: str, read: str, model: dict[str, Any], tmp_path: Path
) -> None:
    (write_size, write_sections), (read_size, read_sections) = LAYOUTS[written], LAYOUTS[read]
    writer = tiny_config(model={**MODEL, **model}, **write_sections)
    reader = tiny_config(model={**MODEL, **model}, **read_sections)
    last = BEFORE + 20
    whole = run_distributed(run_steps, write_size, writer, 0, last, None, tmp_path)[0]
    after = run_distributed(run_steps, read_size, reader, BEFORE, last, tmp_path, None)[0]
    np.testing.assert_allclose(after["losses"], whole["losses"][BEFORE:], rtol=5e-6)
    np.testing.assert_allclose(after["grad_norms"], whole["grad_norms"][BEFORE:], rtol=1e-4)


@pytest.mark.parametrize(("written", "read"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_precision_starts_from_the_fp32_masters(
    written: str, read: str, tmp_path: Path
) -> None:
    """Weights are the masters, rounded to the new precision."""
    writer, reader = (tiny_config(model=MODEL, precision=name) for name in (written, read))
    run_distributed(run_steps, 1, writer, 0, BEFORE + 1, None, tmp_path)
    [values] = run_distributed(masters_and_weights, 1, reader, tmp_path)
    for name, (master, weight) in values.items():
        np.testing.assert_array_equal(master, weight, err_msg=name)


def masters_and_weights(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Each loaded weight beside its loaded master, the latter rounded as the weight is."""
    engine, _ = build_engine(config)
    load_snapshot(engine, run_dir, BEFORE)
    weights = {block.key.split(".", 1)[1]: block.values for block in weight_blocks(engine)}
    masters = {
        block.key.removeprefix("optimizer.master."): block.values
        for block in optimizer_blocks(engine)
        if block.key.startswith("optimizer.master.")
    }
    assert weights.keys() == masters.keys()
    return {
        name: (masters[name].to(weight.dtype).float().numpy().copy(), weight.float().numpy().copy())
        for name, weight in weights.items()
    }


def repeat_after_loading(config: RunConfig, run_dir: Path) -> tuple[list[float], list[float]]:
    """Losses of three steps after a save, and of the same steps after going back to it."""
    engine, groups = build_engine(config)

    def steps(first: int, last: int) -> list[float]:
        return [
            engine.train_step(random_microbatches(config, groups, step), 1e-2).loss
            for step in range(first, last)
        ]

    steps(0, BEFORE)
    begin_snapshot(engine, run_dir, BEFORE, {}).finish()
    once = steps(BEFORE, BEFORE + 3)
    load_snapshot(engine, run_dir, BEFORE)
    return once, steps(BEFORE, BEFORE + 3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_going_back_within_a_life_is_exact(stage: int, tmp_path: Path) -> None:
    """What a rewind does: the engine has stepped, and ZeRO 3 holds gathered copies."""
    config = tiny_config(zero={"stage": stage})
    for once, again in run_distributed(repeat_after_loading, 2, config, tmp_path):
        assert again == once


def load_into_other_model(config: RunConfig, run_dir: Path) -> str:
    engine, _ = build_engine(config)
    with pytest.raises(CheckpointError) as caught:
        load_snapshot(engine, run_dir, BEFORE)
    return str(caught.value)


def test_another_model_or_step_is_refused_by_name(tmp_path: Path) -> None:
    config = tiny_config(model=MODEL)
    run_distributed(run_steps, 1, config, 0, BEFORE + 1, None, tmp_path)
    wider = tiny_config(model={**MODEL, "ffn_hidden_size": 128})
    [message] = run_distributed(load_into_other_model, 1, wider, tmp_path)
    assert "linear_fc1" in message
    assert "(96, 64)" in message
    assert "(128, 64)" in message
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; there are: 3"):
        read_state(tmp_path, 9)
