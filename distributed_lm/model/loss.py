"""Cross entropy fused with the output projection: the logits are never whole in memory.

Shapes: S sequence, B batch, T = S·B tokens, D hidden, V vocabulary of this tensor-parallel rank,
R tensor-parallel ranks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

# Logits kept at once, by device: on a CPU what its caches hold, on a GPU 256 MiB in bf16, rows
# enough for its matrix products to be at their best.
MAX_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
# Fewer rows would read the whole weight for too little work.
MIN_ROWS = 256


LossesAndGradient = Callable[..., tuple[Tensor, Tensor]]


class TokenLosses(NamedTuple):
    """What the last stage hands to the schedule."""

    summed: Tensor
    """fp32 [], nats over the scored tokens: what has a gradient."""
    losses_BS: Tensor
    """fp32 [B, S], nats, without a gradient."""

    @classmethod
    def of(cls, losses_BS: Tensor, mask_BS: Tensor | None) -> "TokenLosses":
        """From losses that have a gradient each."""
        scored_BS = losses_BS if mask_BS is None else losses_BS * mask_BS
        return cls(scored_BS.sum(), losses_BS.detach())


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """Megatron's output projection, that can go on to the losses by itself."""

    def __init__(self, *args: Any, **megatron: Any) -> None:
        super().__init__(*args, **megatron)
        self.losses_and_gradient: LossesAndGradient = losses_and_gradient

    def compile_losses(self) -> None:
        """What is done with a chunk's logits becomes a kernel or two in place of ten. For one
        tensor-parallel rank: several talk in the middle."""
        self.losses_and_gradient = torch.compile(losses_and_gradient, dynamic=False)

    def forward(
        self,
        hidden_SBD: Tensor,
        labels_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Any:
        """Losses, or without labels this rank's logits [S, B, V].

        Args:
            hidden_SBD: with sequence parallelism, this rank's slice of S.
            mask_BS: 1 where the label is scored, 0 elsewhere; None scores all.
            weight: [V, D], the tied embedding in place of the layer's own weight.
        """
        if labels_BS is None:
            return super().forward(hidden_SBD, weight=weight)[0]
        if self.config.sequence_parallel:
            hidden_SBD = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_SBD, group=self.tp_group
            )
        else:
            hidden_SBD = tensor_parallel.copy_to_tensor_model_parallel_region(
                hidden_SBD, group=self.tp_group
            )
        mask_T = None if mask_BS is None else mask_BS.transpose(0, 1).flatten()
        summed, losses_T = linear_cross_entropy(
            hidden_SBD.flatten(0, 1),
            self.weight if weight is None else weight,
            labels_BS.transpose(0, 1).flatten(),
            mask_T,
            self.tp_group if self.tp_group.size() > 1 else None,
            self.losses_and_gradient,
        )
        return TokenLosses(summed, losses_T.view(hidden_SBD.shape[:2]).transpose(0, 1).contiguous())


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    mask_T: Tensor | None,
    group: dist.ProcessGroup | None,
    of_chunk: LossesAndGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of ``softmax(hidden · weightᵀ)``, in chunks of tokens.

    The gradients are computed with the losses, while a chunk's logits are there, up to the one
    factor that backward brings: the sum is all that can be differentiated.

    Args:
        weight_VD: this rank's rows, rank by rank in the order of ``group``.
        group: the tensor-parallel ranks; None for one alone.
        of_chunk: ``losses_and_gradient``, or the same compiled.

    Returns:
        fp32 [] summed over the scored tokens, and fp32 [T] of every token without a gradient, in
        nats.
    """
    # Inside a Function gradients are always off.
    wants_gradient = torch.is_grad_enabled()
    of_chunk = of_chunk or losses_and_gradient
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, labels_T, mask_T, group, wants_gradient, of_chunk
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        mask_T: Tensor | None,
        group: dist.ProcessGroup | None,
        wants_gradient: bool,
        of_chunk: LossesAndGradient,
    ) -> tuple[Tensor, Tensor]:
        tokens, dtype = hidden_TD.size(0), weight_VD.dtype
        # A sum over tokens may not fit into fp16 before backward makes a mean of it.
        is_narrow = dtype == torch.float16
        rows = _rows_at_once(tokens, weight_VD.size(0), hidden_TD.device)
        losses_T = torch.empty(tokens, dtype=torch.float32, device=hidden_TD.device)
        if mask_T is None:
            mask_T = torch.ones_like(losses_T)
        mask_T = mask_T.to(losses_T)
        grad_hidden = torch.empty_like(hidden_TD) if wants_gradient else None
        grad_weight: Tensor | None = None
        for start in range(0, tokens, rows):
            chunk = slice(start, start + rows)
            hidden = hidden_TD[chunk]
            # Not a name of its own for the logits: they are overwritten.
            losses_T[chunk], grad_logits = of_chunk(
                hidden @ weight_VD.T, labels_T[chunk], mask_T[chunk], group, wants_gradient
            )
            if grad_hidden is None:
                continue
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_hidden[chunk])
            if grad_weight is None:
                grad_weight = grad_logits.T @ hidden
                if rows < tokens or is_narrow:  # summed in fp32, as one product would be
                    grad_weight = grad_weight.float()
            else:
                grad_weight += grad_logits.T @ hidden
            del grad_logits  # not beside the next chunk's
        summed = (losses_T * mask_T).sum()
        if grad_weight is not None:
            ctx.gradients = (grad_hidden, grad_weight if is_narrow else grad_weight.to(dtype))
            ctx.dtype = dtype
        ctx.mark_non_differentiable(losses_T)
        return summed, losses_T

    @staticmethod
    def backward(ctx: Any, grad_summed: Tensor, _grad_losses: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients  # once is all they can be used: they are scaled in place
        factor = grad_summed.to(torch.float32)
        grad_weight = grad_weight.mul_(factor).to(ctx.dtype)
        return grad_hidden.mul_(factor), grad_weight, *[None] * 5


def losses_and_gradient(
    logits_TV: Tensor,
    labels_T: Tensor,
    mask_T: Tensor,
    group: dist.ProcessGroup | None,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """fp32 losses [T], and of their masked sum the gradient by this rank's logits, fp32 [T, V]."""
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    tokens, columns = logits_TV.shape
    values_TV = logits_TV.float()  # fp32 logits are overwritten: nobody else has them
    highest_T = values_TV.amax(dim=-1)
    values_TV.sub_(highest_T[:, None])
    column_T = labels_T - rank * columns
    is_here_T = (column_T >= 0) & (column_T < columns)
    column_T = torch.where(is_here_T, column_T, 0)
    target_T = values_TV.gather(1, column_T[:, None])[:, 0]
    values_TV.exp_()
    total_T = values_TV.sum(dim=-1)
    here_T = is_here_T.float()

    top_T, total_all_T, target_all_T = highest_T, total_T, target_T
    if ranks > 1:
        own_4T = torch.stack([highest_T, total_T, target_T, here_T])
        gathered = own_4T.new_empty(ranks * 4, tokens)
        dist.all_gather_into_tensor(gathered, own_4T, group=group)
        highest_RT, total_RT, target_RT, here_RT = gathered.view(ranks, 4, tokens).unbind(dim=1)
        top_T = highest_RT.amax(dim=0)
        total_all_T = (total_RT * (highest_RT - top_T).exp()).sum(dim=0)
        target_all_T = (here_RT * (target_RT + highest_RT - top_T)).sum(dim=0)
    losses_T = total_all_T.log() - target_all_T
    if wants_gradient:
        factor_T = mask_T * (highest_T - top_T).exp() / total_all_T
        values_TV.mul_(factor_T[:, None])
        values_TV.scatter_add_(1, column_T[:, None], -(mask_T * here_T)[:, None])
    return losses_T, values_TV


def _rows_at_once(tokens: int, columns: int, device: torch.device) -> int:
    """Tokens per chunk: all chunks alike, but for the last."""
    most = max(MIN_ROWS, MAX_LOGITS.get(device.type, MAX_LOGITS["cpu"]) // columns)
    chunks = -(-tokens // most)
    return -(-tokens // chunks)
