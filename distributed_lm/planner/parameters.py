"""Exact parameter counts."""

from distributed_lm.config import T5_BUCKETS, ModelConfig
from distributed_lm.errors import ConfigError


def layer_parameters(model: ModelConfig) -> int:
    """Weights, biases and norms of one decoder layer."""
    hidden, ffn = model.hidden_size, model.ffn_size
    query_key_value = hidden + 2 * model.key_value_heads * model.head_dim
    up = ffn * (2 if model.activation == "swiglu" else 1)
    matrices = hidden * query_key_value + hidden * hidden + hidden * up + ffn * hidden
    biases = query_key_value + hidden + up + hidden if model.bias else 0
    return matrices + biases + 2 * norm_parameters(model)


def norm_parameters(model: ModelConfig) -> int:
    has_bias = model.normalization == "layernorm" and model.bias
    return model.hidden_size * (2 if has_bias else 1)


def position_parameters(model: ModelConfig) -> int:
    """The position method's own table. A user's own method counts as having none.

    Raises:
        ConfigError: if ``learned`` was not given its number of rows.
    """
    if model.position == "t5":
        return model.num_attention_heads * T5_BUCKETS
    if model.position == "learned":
        if model.max_positions is None:
            raise ConfigError("model.max_positions: missing; model.position=learned has a row each")
        return model.max_positions * model.hidden_size
    return 0


def embedding_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Word embeddings and output projection; tied ones count once."""
    hidden = model.hidden_size
    if model.adaptive is None:
        return vocab_size * hidden * (1 if model.tie_embeddings else 2)
    widths = model.adaptive.band_widths(hidden)
    words = sum(
        size * width
        for size, width in zip(model.adaptive.band_sizes(vocab_size), widths, strict=True)
    )
    classes = len(model.adaptive.cutoffs)
    return words + hidden * sum(widths) + classes * hidden


def total_parameters(model: ModelConfig, vocab_size: int) -> int:
    """The whole model; a tied embedding counts once."""
    final_norm = norm_parameters(model) if model.final_norm else 0
    layers = model.num_layers * layer_parameters(model)
    embeddings = embedding_parameters(model, vocab_size)
    return layers + final_norm + embeddings + position_parameters(model)
