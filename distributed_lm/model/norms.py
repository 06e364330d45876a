"""Norms that tell the engine when each rank sees only part of the tokens."""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` with Megatron's constructor; a model without biases has none here."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_megatron: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, bias=config.add_bias_linear)
        _tag(self, config)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` with Megatron's constructor."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_megatron: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        _tag(self, config)


NORMS: dict[str, type[nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def _tag(norm: nn.Module, config: TransformerConfig) -> None:
    """Gradients of tagged parameters are summed over the tensor-parallel ranks (gradients.py)."""
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
