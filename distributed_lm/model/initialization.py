"""Initial weights by fairseq's rules (``model.initialization: fairseq``, and adaptive embeddings
always), which the paper's WikiText-103 models had.

Sources: ``fairseq/modules/{multihead_attention,transformer_layer,adaptive_input,
adaptive_softmax}.py``. torch's ``nn.Linear`` default is uniform within 1/√fan_in for weight and
bias; ``xavier_uniform_`` within gain · √(6 / (fan_in + fan_out)). Two things are not copied: in
every band row 1, fairseq's padding, starts at zero and never learns from inputs (two of the 267,744
rows are real words).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_lm.config import ModelConfig

ADAPTIVE = ("embedding.bands.", "embedding.projections.", "output_layer.classes.")


def applies(name: str, model: ModelConfig) -> bool:
    """Whether the tensor of that global name starts by these rules; norms and a position method's
    own table never do."""
    if "norm" in name or name.startswith("position."):
        return False
    return model.initialization == "fairseq" or name.startswith(ADAPTIVE)


def draw(name: str, shape: Sequence[int], model: ModelConfig, generator: torch.Generator) -> Tensor:
    """fp32 of ``shape``, the whole tensor's."""
    if name.startswith("embedding.") and "projections" not in name:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
    bound = _bound(name, shape, model)
    return (torch.rand(*shape, generator=generator) * 2.0 - 1.0) * bound


def _bound(name: str, shape: Sequence[int], model: ModelConfig) -> float:
    """The uniform distribution's."""
    if name.endswith("linear_proj.bias"):
        return 0.0
    if name.endswith("linear_qkv.weight"):  # three square matrices, with gain 1/√2
        return math.sqrt(3.0 / model.hidden_size) / math.sqrt(2.0)
    if "linear_qkv" in name or "linear_fc1" in name:
        return model.hidden_size**-0.5
    if "linear_fc2" in name:
        return model.ffn_size**-0.5
    return math.sqrt(6.0 / sum(shape))
