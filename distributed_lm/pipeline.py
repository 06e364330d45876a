"""Megatron's pipeline schedule behind one function, for training and for evaluation.

Without pipeline parallelism this is a loop over microbatches; with it, 1F1B or interleaved 1F1B.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from distributed_lm import platform
from distributed_lm.model.loss import TokenLosses
from distributed_lm.process_groups import ProcessGroups


@dataclass(frozen=True)
class Microbatch:
    """Input of one forward pass; B sequences of S tokens."""

    tokens_BS: Tensor
    labels_BS: Tensor
    mask_BS: Tensor | None = None
    """1 where the label is scored, 0 where it is padding; None scores all."""


def split_batch(tokens: Tensor, labels: Tensor, micro_batch_size: int) -> list[Microbatch]:
    """Rows in order, ``micro_batch_size`` at a time."""
    return [
        Microbatch(*pair)
        for pair in zip(tokens.split(micro_batch_size), labels.split(micro_batch_size), strict=True)
    ]


def run_schedule(
    stages: list[Any],
    microbatches: list[Microbatch],
    groups: ProcessGroups,
    *,
    forward_only: bool,
    on_losses: Callable[[Tensor], None] | None = None,
    stopwatch: platform.Stopwatch | None = None,
) -> Tensor:
    """Forward, and unless ``forward_only`` backward, over all microbatches of this rank.

    All microbatches must have one shape. Backward is of the mean loss per token.

    Args:
        stages: what Megatron's schedule calls, one per virtual stage.
        on_losses: called on the last stage with each microbatch's per-token losses [B, S].
        stopwatch: times what this data-parallel rank does before it waits for the others.

    Returns:
        fp64 [2]: summed loss in nats and tokens scored over the whole run's batch, on every rank.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=groups.device)

    def forward_step(batches: Iterator[Microbatch], stage: nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        # Without waiting for what the GPU has still to do of the microbatch before.
        tokens_BS = batch.tokens_BS.to(groups.device, non_blocking=True)
        labels_BS = batch.labels_BS.to(groups.device, non_blocking=True)
        mask_BS = batch.mask_BS
        if mask_BS is not None:
            mask_BS = mask_BS.to(groups.device, non_blocking=True)
        output = stage(tokens_BS, labels_BS, mask_BS)

        def loss_function(losses: TokenLosses) -> tuple[Tensor, dict[str, Tensor]]:
            # Megatron divides what it is given by the number of microbatches, in place: keep ours.
            totals[0] += losses.summed.detach().double()
            scored: Any = labels_BS.numel() if mask_BS is None else mask_BS.sum()
            totals[1] += scored
            if on_losses is not None:
                on_losses(losses.losses_BS)
            return losses.summed / (scored if mask_BS is None else scored.clamp(min=1)), {}

        return output, loss_function

    sequences, length = microbatches[0].tokens_BS.shape
    iterators = [iter(microbatches) for _ in stages]
    if stopwatch is not None:
        stopwatch.start()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(stages) > 1 else iterators[0],
        model=stages if len(stages) > 1 else stages[0],
        num_microbatches=len(microbatches),
        seq_length=length,
        micro_batch_size=sequences,
        forward_only=forward_only,
    )
    if stopwatch is not None:
        stopwatch.stop()
    return groups.sum_over_run(totals)
