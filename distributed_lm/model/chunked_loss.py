"""Losses from hidden states without keeping the logits of a long input.

Shapes: S sequence, L its part on this rank (sequence parallelism), R = S / L ranks, B batch,
D hidden, V vocabulary of this tensor-parallel rank.
"""

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from torch import Tensor

# Logits of a chunk, over all tensor-parallel ranks and in fp32: 64 MiB.
MAX_LOGITS_ELEMENTS = 1 << 24


def losses_in_chunks(
    hidden_LBD: Tensor, labels_BS: Tensor, project: Callable[[Tensor], Tensor], vocab_size: int
) -> Tensor:
    """Cross entropy of each label, in nats.

    With gradients it is one chunk: backward needs all the logits anyway.

    Args:
        project: hidden states [l, B, D] to logits [R·l, B, V], those of rank 0 first: what
            Megatron's ``ColumnParallelLinear`` does with any part of the sequence.
        vocab_size: over all tensor-parallel ranks.

    Returns:
        fp32 [B, S].
    """
    local, batch = hidden_LBD.shape[:2]
    labels_RLB = labels_BS.transpose(0, 1).reshape(-1, local, batch)
    ranks = labels_RLB.size(0)
    chunk = local
    if not torch.is_grad_enabled():
        chunk = min(local, max(1, MAX_LOGITS_ELEMENTS // (ranks * batch * vocab_size)))
    parts_RLB = []
    for start in range(0, local, chunk):
        logits = project(hidden_LBD[start : start + chunk])
        labels = labels_RLB[:, start : start + chunk].reshape(-1, batch).contiguous()
        # fp32 logits are overwritten: nobody else has them.
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels)
        parts_RLB.append(losses.view(ranks, -1, batch))
    losses_SB = torch.cat(parts_RLB, dim=1).view(ranks * local, batch)
    return losses_SB.transpose(0, 1).contiguous()
