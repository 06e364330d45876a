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


def stage_parameters(
    model: ModelConfig, vocab_size: int, num_layers: int, *, is_first: bool, is_last: bool
) -> int:
    """What one pipeline stage holds, over all its tensor-parallel ranks: a stage's copy of weights
    that an earlier stage holds too counts here, what every tensor-parallel rank has counts once.

    Args:
        num_layers: of this stage; of all virtual stages of the pipeline rank, if there are several.
        is_first: whether it embeds.
        is_last: whether it has the output projection.
    """
    if is_first and is_last:
        embeddings = embedding_parameters(model, vocab_size)
    elif model.adaptive is None:
        embeddings = vocab_size * model.hidden_size * (is_first + is_last)
    else:
        embeddings = _adaptive_end(model, vocab_size, is_last) if is_first or is_last else 0
    final_norm = norm_parameters(model) if model.final_norm and is_last else 0
    # Learned positions are added to the embeddings; T5's bias is used by the layers of every stage.
    positions = position_parameters(model) if is_first or model.position == "t5" else 0
    return num_layers * layer_parameters(model) + embeddings + final_norm + positions


def _adaptive_end(model: ModelConfig, vocab_size: int, is_last: bool) -> int:
    """Of an adaptive embedding on the first stage, or of the softmax's copy on another, the last:
    that has classes, and does not project band 0."""
    whole = embedding_parameters(model, vocab_size)
    assert model.adaptive is not None
    classes = len(model.adaptive.cutoffs) * model.hidden_size
    widths = model.adaptive.band_widths(model.hidden_size)
    return whole - model.hidden_size * widths[0] if is_last else whole - classes
