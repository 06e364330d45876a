"""A ``transformers`` config.json as our model config, or the reason why it is none of ours."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
import torch

from distributed_lm.config import ModelConfig
from distributed_lm.errors import CheckpointError
from distributed_lm.export.classes import (
    LAYER_NORM_EPSILON,
    OUR_ACTIVATIONS,
    OWN,
    OWN_POSITIONS,
    ROTARY_BASE,
)
from distributed_lm.export.names import ENDS, FAMILIES
from distributed_lm.export.safetensors_files import SafetensorsFolder
from distributed_lm.model.positions import METHODS
from distributed_lm.model.positions.sinusoidal import sinusoidal_table

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Foreign:
    """What a folder holds."""

    folder: Path
    family: str
    model: ModelConfig
    num_positions: int
    """Longest input it was made for, in tokens."""
    trained_length: int
    precision: str

    @property
    def tied_output(self) -> str:
        """A tensor that repeats the embedding, where there is one."""
        return ENDS[self.family][2]


class _Fields:
    """config.json, over the defaults that its class in ``transformers`` has."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        try:
            self.raw: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            self.family = str(self.raw["model_type"])
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: missing; give a transformers folder") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: cannot be used ({error!r})") from None
        if self.family not in FAMILIES:
            raise CheckpointError(
                f"{self.path}: model_type={self.family}, expected one of {', '.join(FAMILIES)}"
            )
        self.defaults = {} if self.family == OWN else _with_defaults(self.path, self.raw)

    def get(self, name: str) -> Any:
        """A field by its dotted name; None if it is nowhere."""
        for values in (self.raw, self.defaults):
            found: Any = values
            for part in name.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if found is not None:
                return found
        return None

    def require(self, name: str, *allowed: Any, why: str) -> None:
        """Raises CheckpointError unless the field has one of these values; None is also absent."""
        found = self.get(name)
        if found not in allowed:
            expected = " or ".join(str(value) for value in allowed)
            raise CheckpointError(
                f"{self.path}: {name}={found}: {why} (expected {expected}); this model cannot be "
                "imported"
            )


def read_foreign(folder: Path, tensors: SafetensorsFolder) -> Foreign:
    """Raises CheckpointError, naming the field, if no model of ours computes the same."""
    fields = _Fields(folder)
    try:
        values = READERS[fields.family](fields)
        num_positions = int(values.pop("num_positions"))
        model = ModelConfig.model_validate(
            {
                "vocab_size": fields.get("vocab_size"),
                "init_std": fields.get("initializer_range") or 0.02,
                "tie_embeddings": bool(fields.get("tie_word_embeddings")),
                **values,
            }
        )
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{fields.path}: {where}: {problem['msg']}") from None
    dtype = str(fields.get("torch_dtype") or fields.get("dtype") or "float32")
    trained = fields.get("distributed_lm.trained_length") or num_positions
    precision = PRECISIONS.get(dtype, "fp32")
    foreign = Foreign(folder, fields.family, model, num_positions, int(trained), precision)
    if fields.family == "gpt2":
        foreign = _recognise_sinusoidal(foreign, tensors)
    if foreign.model.position not in METHODS:
        raise CheckpointError(
            f"{fields.path}: positions are {foreign.model.position}, which we do not have"
        )
    return foreign


def _with_defaults(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw)).to_dict()
    except Exception as error:  # whatever its validation raises
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: transformers refuses it: {first_line}") from None


def _mpt(fields: _Fields) -> dict[str, Any]:
    """Names as in llm-foundry, some of whose fields transformers' class ignores."""
    heads = fields.get("n_heads")
    checks: list[tuple[str, tuple[Any, ...], str]] = [
        ("attn_config.alibi", (True,), "its positions are learned, not ALiBi"),
        ("attn_config.alibi_bias_max", (8,), "its slopes are not the paper's"),
        ("attn_config.clip_qkv", (None, 0), "queries, keys and values are clipped"),
        ("attn_config.qk_ln", (False, None), "queries and keys are normalised"),
        ("attn_config.softmax_scale", (None,), "scores are not scaled by 1/√(head size)"),
        ("attn_config.prefix_lm", (False, None), "attention is not causal"),
        ("attn_config.attn_type", ("multihead_attention", None), "heads share keys and values"),
        ("attn_config.kv_n_heads", (None, heads), "heads share keys and values"),
        ("attn_config.rope", (False, None), "positions are also rotary"),
        ("attn_config.sliding_window_size", (-1, None), "attention is windowed"),
        ("attn_config.attn_uses_sequence_id", (False, None), "attention stops at documents"),
        ("attn_config.attn_impl", ("torch", "flash", "triton", None), "unknown attention"),
        ("ffn_config.ffn_type", ("mptmlp", None), "its feed-forward block is another"),
        ("logit_scale", (None,), "logits are scaled"),
        ("no_bias", (True,), "transformers' class has no biases, and would drop these"),
        ("norm_type", ("low_precision_layernorm", "layernorm"), "it has another norm"),
        ("embedding_fraction", (1.0,), "gradients of the embedding are scaled"),
    ]
    for name, allowed, why in checks:
        fields.require(name, *allowed, why=why)
    return {
        "num_layers": fields.get("n_layers"),
        "hidden_size": fields.get("d_model"),
        "num_attention_heads": heads,
        "ffn_hidden_size": int(fields.get("expansion_ratio") * fields.get("d_model")),
        "position": "alibi",
        "activation": "gelu",
        "bias": False,
        "normalization": "layernorm",
        "norm_epsilon": fields.get(LAYER_NORM_EPSILON["mpt"]),
        "num_positions": fields.get("max_seq_len"),
    }


def _transformer(fields: _Fields) -> dict[str, Any]:
    return {
        "num_layers": fields.get("num_hidden_layers"),
        "hidden_size": fields.get("hidden_size"),
        "num_attention_heads": fields.get("num_attention_heads"),
        "ffn_hidden_size": fields.get("intermediate_size"),
        "num_positions": fields.get("max_position_embeddings"),
    }


def _require_plain_rotary(fields: _Fields) -> None:
    why = "rotary positions are scaled, partial or of another base"
    fields.require("rope_parameters.rope_type", "default", None, why=why)
    fields.require("rope_parameters.rope_theta", ROTARY_BASE, None, why=why)
    fields.require("rope_parameters.partial_rotary_factor", 1.0, None, why=why)
    # Where transformers 4 kept them.
    fields.require("rope_scaling", None, why=why)
    fields.require("rotary_pct", 1.0, None, why=why)
    fields.require("rotary_emb_base", ROTARY_BASE, None, why=why)
    fields.require("rope_theta", ROTARY_BASE, None, why=why)


def _activation(fields: _Fields, name: str) -> str:
    plain = [theirs for theirs, ours in OUR_ACTIVATIONS.items() if ours != "swiglu"]
    fields.require(name, *plain, why="no activation of ours")
    return OUR_ACTIVATIONS[fields.get(name)]


def _gpt_neox(fields: _Fields) -> dict[str, Any]:
    _require_plain_rotary(fields)
    why = "attention and feed-forward block read the same input"
    fields.require("use_parallel_residual", False, why=why)
    fields.require("attention_bias", True, why="only some layers have biases")
    return _transformer(fields) | {
        "position": "rotary",
        "activation": _activation(fields, "hidden_act"),
        "bias": True,
        "normalization": "layernorm",
        "norm_epsilon": fields.get(LAYER_NORM_EPSILON["gpt_neox"]),
    }


def _llama(fields: _Fields) -> dict[str, Any]:
    _require_plain_rotary(fields)
    fields.require("hidden_act", "silu", why="its gate is not SwiGLU's")
    for name in ("attention_bias", "mlp_bias"):
        fields.require(name, False, None, why="only some layers have biases")
    head_dim = fields.get("hidden_size") // fields.get("num_attention_heads")
    fields.require("head_dim", head_dim, None, why="heads are not hidden_size wide together")
    return _transformer(fields) | {
        "num_key_value_heads": fields.get("num_key_value_heads"),
        "position": "rotary",
        "activation": "swiglu",
        "bias": False,
        "normalization": "rmsnorm",
        "norm_epsilon": fields.get(LAYER_NORM_EPSILON["llama"]),
    }


def _gpt2(fields: _Fields) -> dict[str, Any]:
    fields.require("scale_attn_weights", True, None, why="scores are not scaled")
    fields.require("scale_attn_by_inverse_layer_idx", False, None, why="scores are scaled by layer")
    fields.require("add_cross_attention", False, None, why="it attends to another model")
    return {
        "num_layers": fields.get("n_layer"),
        "hidden_size": fields.get("n_embd"),
        "num_attention_heads": fields.get("n_head"),
        "ffn_hidden_size": fields.get("n_inner") or 4 * fields.get("n_embd"),
        "position": "learned",
        "max_positions": fields.get("n_positions"),
        "activation": _activation(fields, "activation_function"),
        "bias": True,
        "normalization": "layernorm",
        "norm_epsilon": fields.get(LAYER_NORM_EPSILON["gpt2"]),
        "num_positions": fields.get("n_positions"),
    }


def _own(fields: _Fields) -> dict[str, Any]:
    fields.require("position", *OWN_POSITIONS, why="no position method of ours")
    is_limited = fields.get("position") == "learned"
    copied = ("num_key_value_heads", "position", "activation", "bias", "normalization")
    return _transformer(fields) | {
        **{name: fields.get(name) for name in (*copied, "norm_epsilon")},
        "max_positions": fields.get("max_position_embeddings") if is_limited else None,
    }


READERS: dict[str, Callable[[_Fields], dict[str, Any]]] = {
    "mpt": _mpt,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "gpt2": _gpt2,
    OWN: _own,
}


def _recognise_sinusoidal(foreign: Foreign, tensors: SafetensorsFolder) -> Foreign:
    """A GPT-2 whose positions are fairseq's sines and whose embedding is √D times its output
    projection is a tied sinusoidal model of ours, to the last bit."""
    embedding, _, output = ENDS["gpt2"]
    names = (embedding, "transformer.wpe.weight", output)
    if foreign.model.tie_embeddings or not all(name in tensors for name in names):
        return foreign
    width = foreign.model.hidden_size
    table = sinusoidal_table(0, foreign.num_positions, width, torch.device("cpu"))
    if not torch.equal(tensors.read(names[1]), table):
        return foreign
    scaled = tensors.read(output).float() * math.sqrt(width)
    if not torch.equal(tensors.read(embedding), scaled):
        return foreign
    changes = {"position": "sinusoidal", "tie_embeddings": True, "max_positions": None}
    return replace(foreign, model=foreign.model.model_copy(update=changes))
