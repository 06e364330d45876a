"""Exact parameter counts."""

from distributed_lm.config import ModelConfig


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


def total_parameters(model: ModelConfig, vocab_size: int) -> int:
    """The whole model; a tied embedding counts once. Position methods so far have no weights."""
    embeddings = vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return model.num_layers * layer_parameters(model) + norm_parameters(model) + embeddings
