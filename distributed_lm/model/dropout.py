"""Dropout with the right random numbers on tensor-parallel ranks.

Values that the ranks hold alike must lose the same elements on each, values that are split over
them different ones. Megatron keeps two random states for that: torch's own, equal on all ranks, and
the "model-parallel" one, different on each. With sequence parallelism everything between the
embedding and the output projection is split, and Megatron runs all layers under the second state.
"""

import contextlib
from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def replicated_dropout(
    values: Tensor, rate: float, training: bool, config: TransformerConfig
) -> Tensor:
    """Of residual-stream values outside the layers: alike on all ranks, or this rank's tokens."""
    if not training or rate == 0.0:
        return values
    with get_cuda_rng_tracker().fork() if config.sequence_parallel else contextlib.nullcontext():
        return F.dropout(values, rate)


def sharded_random_state(config: TransformerConfig) -> contextlib.AbstractContextManager[Any]:
    """Inside a layer, for what is split over heads or over the width of the feed-forward block."""
    if config.sequence_parallel:  # Megatron has set that state already, and forks do not nest
        return contextlib.nullcontext()
    return get_cuda_rng_tracker().fork()


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron's, with dropout of its input (fairseq's ``activation_dropout``, for which Megatron
    has no name), and traced by ``torch.compile`` in one piece."""

    def __init__(self, *args: Any, dropout: float = 0.0, **megatron: Any) -> None:
        super().__init__(*args, **megatron)
        self.dropout = dropout

    def forward(self, values: Tensor) -> Any:
        if self.training and self.dropout > 0.0:
            with sharded_random_state(self.config):
                values = F.dropout(values, self.dropout)
        return super().forward(values)

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Any:
        # Megatron gives no group here, and then warns of that, which would break the graph.
        return super()._forward_impl(*args, **{**kwargs, "tp_group": self.tp_group})
