"""Weights of a position method that every layer of a stage uses, and their gradient as one sum.

Recomputation runs backward layer by layer, so a weight that all layers share would get its
gradient in as many parts, which ZeRO 2 and 3 refuse: they take a gradient away as soon as its first
part is there. So the layers work with an fp32 copy, and where backward leaves the stage, the copy's
gradient of the whole microbatch is handed to the weight at once.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from distributed_lm.model.positions.base import PositionMethod


class LentPosition:
    """What the layers of this rank use for ``owner``: itself, or a copy if it learns on them."""

    def __init__(self, owner: PositionMethod, device: torch.device) -> None:
        self.owner = owner
        self.has_copy = not owner.embeds_only and next(owner.parameters(), None) is not None
        self.copy = copy.deepcopy(owner).to(device) if self.has_copy else owner

    def refresh(self) -> list[Tensor]:
        """The copy takes over the owner's weights. Returns those."""
        names = [name for name, _ in self.copy.named_parameters()]
        # By name, since that has ZeRO 3 gather a weight that is in parts.
        weights: list[Tensor] = [self.owner.get_parameter(name) for name in names]
        for mine, weight in zip(self.copy.parameters(), weights, strict=True):
            # Behind autograd's back: under a pipeline other microbatches are between forward and
            # backward, with the same values, since no update comes in between.
            mine.data.copy_(weight.data)
        return weights

    def lend(self, hidden: Tensor) -> Tensor:
        """Pass what goes into a stage's first layer through here: it comes back as it was."""
        return _Lend.apply(self.copy, hidden, *self.refresh()) if self.has_copy else hidden


class _Lend(torch.autograd.Function):
    """Backward gets here last of the stage: nodes of later operations run before it."""

    @staticmethod
    def forward(context: Any, borrower: PositionMethod, hidden: Tensor, *weights: Tensor) -> Tensor:
        context.borrower = borrower
        context.dtypes = [weight.dtype for weight in weights]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        collected = []
        for mine, dtype in zip(context.borrower.parameters(), context.dtypes, strict=True):
            collected.append(None if mine.grad is None else mine.grad.to(dtype))
            mine.grad = None
        return None, gradient, *collected
