"""fairseq's optimizer and schedule, against fairseq's own arithmetic written out."""

import math

import pytest
import torch

from distributed_lm.config import ScheduleConfig, load_config
from distributed_lm.training.nesterov import NAG
from distributed_lm.training.optimizer import learning_rate

RECIPE = load_config("configs/runs/wikitext103_alibi_L512.yaml")


def fairseq_nag(
    weight: torch.Tensor, gradients: list[torch.Tensor], rates: list[float], decay: float
) -> list[torch.Tensor]:
    """``fairseq/optim/nag.py``, line by line: the weights after each step."""
    momentum, velocity, last = 0.99, torch.zeros_like(weight), rates[0]
    weights = []
    for gradient, rate in zip(gradients, rates, strict=True):
        correct = rate / last
        weight = weight * (1 - rate * decay)
        weight = weight + velocity * (momentum * momentum * correct)
        weight = weight - gradient * ((1 + momentum) * rate)
        velocity = velocity * (momentum * correct) - gradient * rate
        last = rate
        weights.append(weight)
    return weights


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_updates_are_fairseqs_while_the_rate_changes(decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(30)]
    rates = [1e-7 + 0.05 * step for step in range(20)] + [0.3 * 0.9**step for step in range(10)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = NAG([{"params": [weight], "decay": decay}], lr=1.0, momentum=0.99)
    for step, expected in enumerate(fairseq_nag(start, gradients, rates, decay)):
        optimizer.param_groups[0]["lr"] = rates[step]
        weight.grad = gradients[step].clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert optimizer.state[weight]["step"] == 30


def test_a_skipped_update_leaves_weights_and_momentum_untouched() -> None:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12))
    optimizer = NAG([{"params": [weight], "decay": 0.1}], lr=0.1, momentum=0.99)
    weight.grad = torch.ones(12)
    optimizer.step()
    before = [weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()]
    optimizer.skip_update = True
    optimizer.step()
    assert torch.equal(weight.detach(), before[0])
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], before[1])
    assert optimizer.state[weight]["step"] == 1


# (update from 1, learning rate): by hand from fairseq's formula with --lr 1.0
# --warmup-updates 16000 --warmup-init-lr 1e-07 --lr-period-updates 270000 --t-mult 2
# --lr-shrink 0.75 --min-lr 0.0001. fairseq counts updates from 0. The second period begins after
# 286,000 updates, is 540,000 long, and goes from 0.75 to 0.75e-4; the third is 1,080,000 long.
TABLE = [
    (1, 1e-7),
    (2, 1e-7 + (1 - 1e-7) / 16000),
    (8001, 0.50000005),
    (16000, 1 - (1 - 1e-7) / 16000),
    (16001, 1.0),
    (16001 + 67500, 1e-4 + 0.5 * 0.9999 * (1 + math.sqrt(0.5))),
    (16001 + 135000, 0.50005),
    (16001 + 202500, 1e-4 + 0.5 * 0.9999 * (1 - math.sqrt(0.5))),
    (286000, 1e-4),
    (286001, 0.75),
    (286001 + 270000, 0.75 * 0.50005),
    (286001 + 540000, 0.75**2),
    (286001 + 540000 + 540000, 0.75**2 * 0.50005),
]


@pytest.mark.parametrize(("step", "expected"), TABLE)
def test_schedule_of_the_recipe(step: int, expected: float) -> None:
    found = learning_rate(step, 1.0, RECIPE.schedule, RECIPE.train.steps)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-10)


def fairseq_cosine(update: int, period: float, multiplier: float, shrink: float) -> float:
    """``cosine_lr_scheduler.py`` after warm-up, which finds the period by a logarithm."""
    if multiplier == 1:
        number = math.floor(update / period)
        length, since = period, update - period * number
    else:
        number = math.floor(math.log(1 - update / period * (1 - multiplier), multiplier))
        length = multiplier**number * period
        since = update - (1 - multiplier**number) / (1 - multiplier) * period
    low, high = 0.1 * shrink**number, shrink**number
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * since / length))


@pytest.mark.parametrize(("multiplier", "shrink"), [(1.0, 1.0), (1.0, 0.5), (2.0, 0.75)])
def test_periods_are_fairseqs(multiplier: float, shrink: float) -> None:
    schedule = ScheduleConfig(
        kind="cosine_restarts",
        warmup_steps=3,
        period_steps=10,
        period_multiplier=multiplier,
        period_shrink=shrink,
        minimum_ratio=0.1,
    )
    # Not at a restart itself for periods that grow: there fairseq's logarithm may fall short.
    for update in (0, 1, 9, 11, 25, 29, 31, 44, 69, 71):
        expected = 2.0 * fairseq_cosine(update, 10, multiplier, shrink)
        assert learning_rate(update + 4, 2.0, schedule, 1000) == pytest.approx(expected)


def test_one_period_fills_what_is_left() -> None:
    schedule = ScheduleConfig(kind="cosine_restarts", warmup_steps=10)
    assert learning_rate(61, 1.0, schedule, 110) == pytest.approx(0.5)
