"""AdamW with decay groups, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch

from distributed_lm.config import OptimizerConfig, ScheduleConfig
from distributed_lm.model.parameters import ParameterShard


class AdamW(torch.optim.AdamW):
    """Torch's AdamW (Loshchilov and Hutter 2019), with a switch that makes ``step`` do nothing.

    DeepSpeed reduces, clips and then calls ``step`` on this object whatever the ZeRO stage, so the
    switch drops one update (a loss spike) without touching the engine's bookkeeping.
    """

    skip_update: bool = False

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return None if self.skip_update else super().step(closure)


def build_optimizer(shards: list[ParameterShard], config: OptimizerConfig) -> AdamW:
    """AdamW over two groups: matrices with weight decay, biases and norms without."""
    decayed = [shard.parameter for shard in shards if shard.is_decayed]
    plain = [shard.parameter for shard in shards if not shard.is_decayed]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, train_steps: int) -> float:
    """The learning rate of update number ``step``, counted from 1.

    Linear warm-up to ``peak``, then the shape that ``schedule.kind`` names, which reaches
    ``minimum_ratio`` × peak one step after the last of the schedule: no update is spent at 0.
    """
    warmup = schedule.warmup_steps
    total = schedule.total_steps or train_steps
    floor = schedule.minimum_ratio
    if step < warmup:
        return peak * step / warmup
    if schedule.kind == "inverse_sqrt":
        return peak * max(floor, math.sqrt(max(warmup, 1) / max(step, 1)))
    return peak * (floor + (1.0 - floor) * _remaining(step, warmup, total, schedule))


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
