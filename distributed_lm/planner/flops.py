"""Floating-point operations of training, under the two conventions in use.

Papers and frameworks differ on whether causal attention counts in full or by half, so both are
always reported.
"""

from dataclasses import dataclass

from distributed_lm.config import ModelConfig
from distributed_lm.planner.parameters import position_parameters, total_parameters


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward of one token, without recomputation."""

    full: float
    """Attention counted over the whole square (llm-foundry, nanoGPT, PaLM's MFU)."""
    causal: float
    """Attention counted below the diagonal only: what a causal kernel has to do."""


def training_flops_per_token(
    model: ModelConfig, vocab_size: int, sequence_length: int
) -> FlopsPerToken:
    """6 per parameter of a matrix product and token, plus 12·layers·hidden·length for the scores
    and the weighted sum (Chowdhery et al. 2022, PaLM, appendix B).

    Of an adaptive softmax, the rarer bands are left out: few tokens' targets are in them, and how
    many only the text knows."""
    parameters = total_parameters(model, vocab_size) - position_parameters(model)
    if model.adaptive is not None:
        rare = model.adaptive.band_sizes(vocab_size)[1:]
        widths = model.adaptive.band_widths(model.hidden_size)[1:]
        parameters -= sum(words * width for words, width in zip(rare, widths, strict=True))
        parameters += model.hidden_size * sum(widths)  # projected on input and on output
    elif not model.tie_embeddings:  # looking up a row is no matrix product
        parameters -= vocab_size * model.hidden_size
    attention = 12.0 * model.num_layers * model.hidden_size * sequence_length
    return FlopsPerToken(full=6.0 * parameters + attention, causal=6.0 * parameters + attention / 2)
