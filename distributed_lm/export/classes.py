"""Which ``transformers`` class represents a model, and that class's config.json, both ways."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distributed_lm.config import ModelConfig
from distributed_lm.errors import ConfigError

OWN = "distributed_lm"
MODELING_FILE = "modeling_distributed_lm.py"
OWN_POSITIONS = ("alibi", "sinusoidal", "rotary", "learned", "t5", "none")
ROTARY_BASE = 10000.0
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "swiglu": "silu"}
# Names that mean the same function as one of ours.
OUR_ACTIVATIONS = {
    **{theirs: ours for ours, theirs in ACTIVATIONS.items()},
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
LAYER_NORM_EPSILON = {
    "mpt": "layer_norm_epsilon",
    "gpt_neox": "layer_norm_eps",
    "llama": "rms_norm_eps",
    "gpt2": "layer_norm_epsilon",
}


@dataclass(frozen=True)
class Choice:
    """The class that a model goes out as."""

    family: str
    """``model_type`` in config.json."""
    reason: str
    """Why no stock class; empty with one."""


def choose_class(model: ModelConfig) -> Choice:
    """A stock class where it computes the same function, else our own file.

    Raises:
        ConfigError: if nothing does.
    """
    for field, is_usual in (
        ("model.adaptive", model.adaptive is None),
        ("model.final_norm=false", model.final_norm),
    ):
        if not is_usual:
            raise ConfigError(
                f"{field}: no transformers class computes it, and neither does {MODELING_FILE}; "
                "this model cannot be exported"
            )
    family = {
        "alibi": "mpt",
        "rotary": "llama" if model.activation == "swiglu" else "gpt_neox",
        "learned": "gpt2",
        "sinusoidal": "gpt2",
    }.get(model.position)
    missing = [] if family is None else [need for need, met in _needs(family, model) if not met]
    if family is not None and not missing:
        return Choice(family, "")
    if model.position not in OWN_POSITIONS:
        raise ConfigError(
            f"model.position={model.position}: no transformers class computes it, and neither "
            f"does {MODELING_FILE}, which has {', '.join(OWN_POSITIONS)}; this model cannot be "
            "exported"
        )
    if family is None:
        return Choice(OWN, f"no class of transformers has model.position={model.position}")
    return Choice(OWN, f"{CLASSES[family]} has only {' and '.join(missing)}")


def _needs(family: str, model: ModelConfig) -> list[tuple[str, bool]]:
    """What a class asks of a model beyond its positions."""
    ungrouped = ("one key/value head per query head", _is_ungrouped(model))
    layernorm = ("LayerNorm", model.normalization == "layernorm")
    gated = ("a plain feed-forward block", model.activation != "swiglu")
    with_biases = ("biases in every layer", model.bias)
    if family == "mpt":
        return [
            ("exact GELU", model.activation == "gelu"),
            ("no biases at all", not model.bias),
            layernorm,
            ("a feed-forward block of 4 × hidden_size", model.ffn_size == 4 * model.hidden_size),
            ungrouped,
        ]
    if family == "llama":
        return [("RMSNorm", model.normalization == "rmsnorm"), ("no biases", not model.bias)]
    return [layernorm, with_biases, gated, ungrouped]


def _is_ungrouped(model: ModelConfig) -> bool:
    return model.key_value_heads == model.num_attention_heads


CLASSES = {
    "mpt": "MptForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    OWN: "DistributedLMForCausalLM",
}


def config_json(
    family: str, model: ModelConfig, vocab_size: int, num_positions: int
) -> dict[str, Any]:
    """What determines the function; the caller adds dtype and token ids.

    Args:
        vocab_size: rows of the embedding.
        num_positions: longest input, in tokens, where the class has such a limit.
    """
    # A scaled embedding is not the output projection any more.
    tied = model.tie_embeddings and not (family == "gpt2" and model.position == "sinusoidal")
    common = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": model.init_std,
    }
    return common | WRITERS[family](model, num_positions)


def _mpt(model: ModelConfig, num_positions: int) -> dict[str, Any]:
    return {
        "d_model": model.hidden_size,
        "n_heads": model.num_attention_heads,
        "n_layers": model.num_layers,
        "expansion_ratio": 4,
        "max_seq_len": num_positions,
        "layer_norm_epsilon": model.norm_epsilon,
        "no_bias": True,
        "learned_pos_emb": False,
        "norm_type": "layernorm",
        "attn_config": {"alibi": True, "alibi_bias_max": 8},
        "use_cache": True,
    }


def _transformer(model: ModelConfig, num_positions: int) -> dict[str, Any]:
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_size,
        "max_position_embeddings": num_positions,
    }


def _rope(fraction: float = 1.0) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": ROTARY_BASE,
        "partial_rotary_factor": fraction,
    }


def _gpt_neox(model: ModelConfig, num_positions: int) -> dict[str, Any]:
    return _transformer(model, num_positions) | {
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": False,
        "attention_bias": True,
        # The first two for transformers 4, the last for 5.
        "rotary_pct": 1.0,
        "rotary_emb_base": ROTARY_BASE,
        "rope_parameters": _rope(),
    }


def _llama(model: ModelConfig, num_positions: int) -> dict[str, Any]:
    return _transformer(model, num_positions) | {
        "num_key_value_heads": model.key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": ROTARY_BASE,
        "rope_parameters": _rope(),
    }


def _gpt2(model: ModelConfig, num_positions: int) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_layer": model.num_layers,
        "n_inner": model.ffn_size,
        "n_positions": num_positions,
        "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _own(model: ModelConfig, num_positions: int) -> dict[str, Any]:
    module = MODELING_FILE.removesuffix(".py")
    return _transformer(model, num_positions) | {
        "num_key_value_heads": model.key_value_heads,
        "position": model.position,
        "activation": model.activation,
        "bias": model.bias,
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "auto_map": {
            "AutoConfig": f"{module}.DistributedLMConfig",
            "AutoModelForCausalLM": f"{module}.DistributedLMForCausalLM",
        },
    }


WRITERS: dict[str, Callable[[ModelConfig, int], dict[str, Any]]] = {
    "mpt": _mpt,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "gpt2": _gpt2,
    OWN: _own,
}
