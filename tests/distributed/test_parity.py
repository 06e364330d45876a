"""Parallel equals serial: any layout gives one process's losses, gradient norms and weights."""

import functools
from typing import Any

import numpy as np
import pytest

from distributed_lm.model.positions import METHODS
from tests.support.ranks import run_distributed
from tests.support.training import assemble_weights, tiny_config, train_tiny

STEPS = 20
LOSS_TOLERANCE = 5e-6
NORM_TOLERANCE = 1e-4

TENSOR2 = {"tensor": 2}
SEQUENCE2 = {"tensor": 2, "sequence": True}
INTERLEAVED2 = {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel": TENSOR2}),
    "tp2-sequence": (2, {"parallel": SEQUENCE2}),
    "pp2": (2, {"parallel": {"pipeline": 2}}),
    "pp2-interleaved": (2, {"parallel": INTERLEAVED2}),
    "pp4": (4, {"parallel": {"pipeline": 4}}),
    "tp2-pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "dp2-zero0": (2, {"zero": {"stage": 0}}),
    "dp2-zero1": (2, {"zero": {"stage": 1}}),
    "dp2-zero2": (2, {"zero": {"stage": 2}}),
    "dp2-zero3": (2, {"zero": {"stage": 3}}),
    "tp2-sequence-zero2": (2, {"parallel": SEQUENCE2, "zero": {"stage": 2}}),
    "tp2-sequence-zero3": (2, {"parallel": SEQUENCE2, "zero": {"stage": 3}}),
    "selective-recompute": (1, {"train": {"recompute": "selective"}}),
    "full-recompute": (1, {"train": {"recompute": "full"}}),
    "tp2-sequence-full-recompute": (2, {"parallel": SEQUENCE2, "train": {"recompute": "full"}}),
    "pp2-full-recompute": (2, {"parallel": {"pipeline": 2}, "train": {"recompute": "full"}}),
    "tp2-pp2-selective-recompute": (4, {
        "parallel": {"tensor": 2, "pipeline": 2}, "train": {"recompute": "selective"},
    }),
    "tp2-pp2-dp2": (8, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "dp2-zero2-full-recompute": (2, {"zero": {"stage": 2}, "train": {"recompute": "full"}}),
    "dp2-zero3-selective-recompute": (2, {
        "zero": {"stage": 3}, "train": {"recompute": "selective"},
    }),
}  # fmt: skip
# ZeRO takes a gradient at its first part: only weights that all layers share have more than one.
SHARED_WEIGHTS_ONLY = {"dp2-zero2-full-recompute", "dp2-zero3-selective-recompute"}
# Recomputing is about the layout, not about what is recomputed.
ALIBI_ONLY = {"tp2-sequence-full-recompute", "pp2-full-recompute", "tp2-pp2-selective-recompute"}
SPLITS = {"tp2", "pp2"}
# A method without weights is split as others are. Weights that all layers share, and weights of the
# first stage, meet each way of splitting, of reducing gradients and of going backward.
LAYOUTS_OF: dict[str, set[str]] = {
    "alibi": LAYOUTS.keys() - SHARED_WEIGHTS_ONLY,
    "sinusoidal": LAYOUTS.keys() - SHARED_WEIGHTS_ONLY - ALIBI_ONLY,
    "rotary": {*SPLITS, "tp2-pp2"},
    "none": SPLITS,
    "t5": {
        *SPLITS, "pp2-interleaved", "pp4", "tp2-pp2", "dp2-zero0", "dp2-zero2", "dp2-zero3",
        "pp2-full-recompute", "dp2-zero2-full-recompute", "dp2-zero3-selective-recompute",
    },
    "learned": {"tp2-sequence", "pp2", "pp2-interleaved", "tp2-pp2", "tp2-sequence-zero3"},
}  # fmt: skip


@functools.cache
def serial(position: str) -> dict[str, Any]:
    """One process, ZeRO 0: plain torch gradients, our own norm and clipping, torch's AdamW."""
    config = tiny_config(model={"position": position}, zero={"stage": 0})
    return run_distributed(train_tiny, 1, config, STEPS)[0]


@functools.cache
def serial_weights(position: str) -> dict[str, np.ndarray]:
    return assemble_weights([serial(position)])


# A user's own method, from his own file, inherits the tests.
CUSTOM = "tests.support.custom_position:LogarithmicBias"
CUSTOM_TRAINED = "tests.support.custom_position:TrainedLogarithmicBias"
CASES = [
    (layout, position)
    for position in sorted(METHODS)
    for layout in LAYOUTS
    if layout in LAYOUTS_OF[position]
]
CASES += [(layout, CUSTOM) for layout in ("tp2-sequence", "tp2-pp2")]
CASES += [(layout, CUSTOM_TRAINED) for layout in ("tp2", "pp2", "tp2-pp2")]


@pytest.mark.parametrize(("layout", "position"), CASES)
def test_layout_equals_one_process(layout: str, position: str) -> None:
    world_size, sections = LAYOUTS[layout]
    config = tiny_config(model={"position": position}, **sections)
    results = run_distributed(train_tiny, world_size, config, STEPS)
    expected = serial(position)
    for result in results:
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=LOSS_TOLERANCE)
        np.testing.assert_allclose(
            result["grad_norms"], expected["grad_norms"], rtol=NORM_TOLERANCE
        )
    weights = assemble_weights(results)
    assert weights.keys() == serial_weights(position).keys()
    for name, tensor in serial_weights(position).items():
        # Adam makes a step out of the rounding error of a gradient that should be zero (a key
        # bias): 2e-5 is a thousandth of what the weights have moved by.
        np.testing.assert_allclose(weights[name], tensor, atol=2e-5, rtol=0, err_msg=name)
