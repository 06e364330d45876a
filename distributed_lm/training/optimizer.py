"""Optimizers with decay groups, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch

from distributed_lm.config import OptimizerConfig, ScheduleConfig
from distributed_lm.model.parameters import ParameterShard
from distributed_lm.training.nesterov import NAG


class AdamW(torch.optim.AdamW):
    """Torch's AdamW (Loshchilov and Hutter 2019), with a switch that makes ``step`` do nothing.

    DeepSpeed reduces, clips and then calls ``step`` on this object whatever the ZeRO stage, so the
    switch drops one update (a loss spike) without touching the engine's bookkeeping.
    """

    moments = ("exp_avg", "exp_avg_sq")
    skip_update: bool = False

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return None if self.skip_update else super().step(closure)


Optimizer = AdamW | NAG
"""Each has ``moments``, what its state holds beside ``step``, and ``skip_update``."""

OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "nag": NAG}
"""By ``optimizer.kind``."""


def build_optimizer(shards: list[ParameterShard], config: OptimizerConfig) -> Optimizer:
    """Over two groups: matrices with weight decay, biases and norms without."""
    decayed = [shard.parameter for shard in shards if shard.is_decayed]
    plain = [shard.parameter for shard in shards if not shard.is_decayed]
    decay = "decay" if config.kind == "nag" else "weight_decay"
    groups = [
        {"params": decayed, decay: config.weight_decay},
        {"params": plain, decay: 0.0},
    ]
    used = [group for group in groups if group["params"]]
    if config.kind == "nag":
        return NAG(used, lr=config.learning_rate, momentum=config.momentum)
    return AdamW(
        used,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, train_steps: int) -> float:
    """The learning rate of update number ``step``, counted from 1.

    Linear warm-up to ``peak``, then the shape that ``schedule.kind`` names, which reaches
    ``minimum_ratio`` × peak one step after the last of the schedule: no update is spent at 0.
    ``cosine_restarts`` is fairseq's to the step, warm-up included.
    """
    warmup = schedule.warmup_steps
    total = schedule.total_steps or train_steps
    floor = schedule.minimum_ratio
    if schedule.kind == "cosine_restarts":
        return peak * _restarting(step, schedule, total)
    if step < warmup:
        return peak * step / warmup
    if schedule.kind == "inverse_sqrt":
        return peak * max(floor, math.sqrt(max(warmup, 1) / max(step, 1)))
    return peak * (floor + (1.0 - floor) * _remaining(step, warmup, total, schedule))


def _restarting(step: int, schedule: ScheduleConfig, total: int) -> float:
    """Fraction of the peak: ``fairseq/optim/lr_scheduler/cosine_lr_scheduler.py``, which counts
    updates from 0."""
    updates, warmup = step - 1, schedule.warmup_steps
    if updates < warmup:
        return schedule.warmup_start_ratio + (1.0 - schedule.warmup_start_ratio) * updates / warmup
    length = float(schedule.period_steps or max(1, total - warmup))
    since, scale = float(updates - warmup), 1.0
    while since >= length:
        since -= length
        length *= schedule.period_multiplier
        scale *= schedule.period_shrink
    floor = schedule.minimum_ratio
    return scale * (floor + 0.5 * (1.0 - floor) * (1.0 + math.cos(math.pi * since / length)))


def _remaining(step: int, warmup: int, total: int, schedule: ScheduleConfig) -> float:
    """Fraction of the way from the floor back up to the peak, in [0, 1]."""
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, total // 10)
        return min(1.0, max(0.0, (total + 1 - step) / decay))
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total + 1 - warmup)))
    if schedule.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress
