"""Resume equals the uninterrupted run: bit for bit at one layout, within rounding at another."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distributed_lm.checkpoint.folders import read_state
from distributed_lm.config import RunConfig
from distributed_lm.errors import CheckpointError
from distributed_lm.training.snapshot import load_snapshot, save_snapshot
from tests.support.ranks import run_distributed
from tests.support.training import build_engine, local_weights, random_microbatches, tiny_config

BEFORE, AFTER = 3, 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (1, {"zero": {"stage": 0}}),
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
            save_snapshot(engine, save_to, step, {"data_position": step})
            # Megatron's own writer leaves a server process of 200 MB behind.
            assert not psutil.Process().children()
        results.append(engine.train_step(random_microbatches(config, groups, step), 1e-3))
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "weights": local_weights(engine),
    }


# bf16 with ZeRO 0 is a config error.
PRECISIONS = [(layout, "fp32") for layout in LAYOUTS]
PRECISIONS += [(layout, "bf16") for layout in LAYOUTS if layout != "zero0"]


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


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("dp2-zero1", "zero0"),
        ("dp2-zero3", "tp2-sequence-zero1"),
        ("tp2-sequence-zero1", "pp2-interleaved"),
        ("pp2-interleaved", "dp2-zero2"),
        ("zero0", "dp2-zero3"),
    ],
)
def test_another_layout_continues_the_run(written: str, read: str, tmp_path: Path) -> None:
    (write_size, write_sections), (read_size, read_sections) = LAYOUTS[written], LAYOUTS[read]
    writer = tiny_config(model=MODEL, **write_sections)
    reader = tiny_config(model=MODEL, **read_sections)
    whole = run_distributed(run_steps, write_size, writer, 0, BEFORE + AFTER, None, tmp_path)[0]
    after = run_distributed(run_steps, read_size, reader, BEFORE, BEFORE + AFTER, tmp_path, None)[0]
    np.testing.assert_allclose(after["losses"], whole["losses"][BEFORE:], rtol=5e-6)
    np.testing.assert_allclose(after["grad_norms"], whole["grad_norms"][BEFORE:], rtol=1e-4)


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
