"""The attention between Megatron's QKV and output projections. Megatron's own takes no bias.

Shapes: S queries, K keys, B batch, N query heads of this rank, G key/value heads, H head dim.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from distributed_lm.model.attention_backends import BACKENDS
from distributed_lm.model.dropout import sharded_random_state
from distributed_lm.model.positions import PositionMethod


class CoreAttention(nn.Module):
    """Causal attention with a position method's rotation and bias.

    Megatron builds one per layer through the layer spec; ``position``, ``backend`` and
    ``dropout`` (of the attention weights) are bound there. Queries are the last S of the K key
    positions, whatever the lengths.
    """

    position: PositionMethod
    """Shared by all layers of the stage."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        position: PositionMethod,
        backend: str,
        dropout: float = 0.0,
        **_megatron: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.backend = backend
        self.dropout = dropout
        # Not as a submodule: the stage owns it and its parameters.
        object.__setattr__(self, "position", position)

    def forward(
        self,
        query_SBNH: Tensor,
        key_KBGH: Tensor,
        value_KBGH: Tensor,
        attention_mask: Tensor | None = None,
        **_megatron: Any,
    ) -> Tensor:
        """Returns [S, B, N·H]. ``attention_mask`` must be None: the mask is always causal."""
        if attention_mask is not None:
            raise ValueError("CoreAttention masks causally by itself and takes no attention_mask")
        first_query = key_KBGH.size(0) - query_SBNH.size(0)
        query_SBNH, key_KBGH = self.position.rotate(query_SBNH, key_KBGH, first_query)
        tensors = [tensor.permute(1, 2, 0, 3) for tensor in (query_SBNH, key_KBGH, value_KBGH)]
        dropout = self.dropout if self.training else 0.0
        with sharded_random_state(self.config) if dropout else nullcontext():
            context_BNSH = BACKENDS[self.backend](*tensors, self.position, dropout)
        context_SBNH = context_BNSH.permute(2, 0, 1, 3)
        return context_SBNH.reshape(*context_SBNH.shape[:2], -1)


def core_attentions(stages: Sequence[nn.Module]) -> list[CoreAttention]:
    """Every live attention module of this rank, in layer order."""
    return [
        module
        for stage in stages
        for module in stage.modules()
        if isinstance(module, CoreAttention)
    ]
