"""Schedules as pure functions of the step, and the switch that drops an update."""

import math
from itertools import pairwise

import pytest
import torch

from distributed_lm.config import ScheduleConfig
from distributed_lm.training.optimizer import AdamW, learning_rate

PEAK = 6e-4
WARMUP, STEPS = 10, 110
KINDS = ["constant", "linear", "cosine", "inverse_sqrt", "wsd"]


def rates(kind: str, steps: int = STEPS, **options: object) -> list[float]:
    """The learning rate of every update, the first one at index 0."""
    schedule = ScheduleConfig.model_validate({"kind": kind, "warmup_steps": WARMUP, **options})
    return [learning_rate(step, PEAK, schedule, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_linearly_to_the_peak(kind: str) -> None:
    curve = rates(kind)
    assert curve[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(1, WARMUP + 1)])
    assert max(curve) == pytest.approx(PEAK)
    assert all(later <= earlier for earlier, later in pairwise(curve[9:]))


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_update_is_near_the_peak(kind: str) -> None:
    curve = rates(kind, warmup_steps=0)
    assert curve[0] == pytest.approx(PEAK, rel=0.02)
    assert min(curve) > 0


# Half-way through the decay, and the last update: one step before the floor would be reached.
ENDS = {
    "constant": (1.0, 1.0),
    "linear": (0.5, 1 / 101),
    "cosine": (0.5, 0.5 * (1 + math.cos(math.pi * 100 / 101))),
    "inverse_sqrt": (math.sqrt(10 / 60.5), math.sqrt(10 / 110)),
    "wsd": (1.0, 1 / 11),
}


@pytest.mark.parametrize("kind", KINDS)
def test_shape_after_warm_up(kind: str) -> None:
    middle, end = ENDS[kind]
    curve = rates(kind)
    # Half-way from step 10 to step 111 is between updates 60 and 61.
    assert (curve[59] + curve[60]) / 2 == pytest.approx(PEAK * middle, rel=1e-4)
    assert curve[-1] == pytest.approx(PEAK * end)


@pytest.mark.parametrize("kind", KINDS)
def test_no_update_is_wasted_at_zero(kind: str) -> None:
    assert min(rates(kind)) > 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "inverse_sqrt"])
def test_minimum_ratio_is_the_floor(kind: str) -> None:
    schedule = ScheduleConfig.model_validate(
        {"kind": kind, "warmup_steps": WARMUP, "minimum_ratio": 0.1}
    )
    assert min(rates(kind, minimum_ratio=0.1)) >= 0.1 * PEAK
    for beyond in (1_000_000, 10_000_000):
        assert learning_rate(beyond, PEAK, schedule, STEPS) == pytest.approx(0.1 * PEAK)


def test_total_steps_decouples_the_schedule_from_the_run() -> None:
    """A run cut short, or extended, follows the curve it was planned with."""
    planned = rates("cosine", steps=200)
    assert rates("cosine", steps=STEPS, total_steps=200) == planned[:STEPS]
    assert rates("cosine", steps=STEPS) != planned[:STEPS]


def test_wsd_holds_the_peak_and_decays_in_decay_steps() -> None:
    curve = rates("wsd", decay_steps=30)
    assert curve[WARMUP - 1 : STEPS - 29] == pytest.approx([PEAK] * 72)
    decay = [PEAK * left / 30 for left in range(29, 0, -1)]
    assert curve[STEPS - 29 :] == pytest.approx(decay)


def test_warm_up_longer_than_the_run_only_rises() -> None:
    curve = rates("linear", steps=5, warmup_steps=20)
    assert curve == pytest.approx([PEAK * step / 20 for step in range(1, 6)])


def test_a_skipped_update_leaves_weights_and_moments_untouched() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = AdamW([weight], lr=0.1, weight_decay=0.1, fused=True)
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    before = {"weight": weight.detach().clone()}
    before |= {name: value.clone() for name, value in optimizer.state[weight].items()}
    assert before["step"] == 1

    optimizer.skip_update = True
    weight.grad = torch.full_like(weight, 1e6)
    optimizer.step()
    after = {"weight": weight.detach(), **optimizer.state[weight]}
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name

    optimizer.skip_update = False
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2
    assert not torch.equal(weight.detach(), before["weight"])
