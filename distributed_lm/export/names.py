"""The name table: our global tensors against those of each ``transformers`` class, both ways.

A rule ties one of our tensors to those that hold the same numbers there. Nothing is rounded, so
exporting and importing again gives the same bits.

Shapes: G key/value heads, R query heads for each, H head dim, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distributed_lm.config import ModelConfig
from distributed_lm.model.positions.sinusoidal import sinusoidal_table

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Transform:
    """One of our tensors as one or more of theirs, and back."""

    to_theirs: Callable[[Tensor, ModelConfig], Tensors]
    to_ours: Callable[[Tensors, ModelConfig], Tensor]


@dataclass(frozen=True)
class Rule:
    ours: str
    theirs: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class Table:
    """Every tensor of a model, and those of theirs that no weight of ours stands for."""

    rules: tuple[Rule, ...]
    constants: dict[str, Tensor]
    """Theirs, computed: written on export, compared on import."""


def table_of(family: str, model: ModelConfig, num_positions: int) -> Table:
    """The table of a model of ours in the given class.

    Args:
        family: a ``model_type`` of ``FAMILIES``.
        num_positions: rows of a table of positions, where the class has one.
    """
    rules = [*_ends(family, model)]
    for layer in range(model.num_layers):
        rules += [
            Rule(
                rule.ours.format(layer=layer),
                tuple(name.format(layer=layer) for name in rule.theirs),
                rule.transform,
            )
            for rule in FAMILIES[family](model)
        ]
    constants = {}
    if family == "gpt2" and model.position == "sinusoidal":
        table = sinusoidal_table(0, num_positions, model.hidden_size, torch.device("cpu"))
        constants["transformer.wpe.weight"] = table
    return Table(tuple(rules), constants)


def _split_qkv(fused: Tensor, model: ModelConfig) -> Tensors:
    """Megatron's [G·(R + 2)·H, …], each group's queries, key and value, as three tensors."""
    groups = model.key_value_heads
    per_group = model.num_attention_heads // groups
    grouped = fused.view(groups, per_group + 2, model.head_dim, *fused.shape[1:])
    parts = grouped[:, :per_group], grouped[:, per_group], grouped[:, per_group + 1]
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in parts)


def _fuse_qkv(parts: Tensors, model: ModelConfig) -> Tensor:
    groups, rest = model.key_value_heads, parts[0].shape[1:]
    grouped = [part.view(groups, -1, model.head_dim, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _unstack_qkv(stacked: Tensor, model: ModelConfig) -> Tensor:
    """Theirs, all queries, then all keys, then all values, as our fused one (no groups)."""
    return _fuse_qkv(tuple(stacked.chunk(3)), model)


SAME = Transform(lambda ours, _: (ours,), lambda theirs, _: theirs[0])
TRANSPOSED = Transform(lambda ours, _: (ours.t(),), lambda theirs, _: theirs[0].t())
SPLIT_QKV = Transform(_split_qkv, _fuse_qkv)
STACKED_QKV = Transform(
    lambda ours, model: (torch.cat(_split_qkv(ours, model)),),
    lambda theirs, model: _unstack_qkv(theirs[0], model),
)
TRANSPOSED_STACKED_QKV = Transform(
    lambda ours, model: (torch.cat(_split_qkv(ours, model)).t(),),
    lambda theirs, model: _unstack_qkv(theirs[0].t(), model),
)
# A class that adds positions to unscaled embeddings gets them scaled, and the tied output
# projection, which is not, as a tensor of its own.
SCALED_AND_PLAIN = Transform(
    lambda ours, model: (ours.float() * math.sqrt(model.hidden_size), ours),
    lambda theirs, _: theirs[1],
)
SCALED = Transform(
    lambda ours, model: (ours.float() * math.sqrt(model.hidden_size),),
    lambda theirs, model: theirs[0] / math.sqrt(model.hidden_size),
)

EMBEDDING, OUTPUT, FINAL_NORM = (
    "embedding.weight",
    "output_layer.weight",
    "decoder.final_layernorm",
)
POSITION_TABLE = "position.table"
QKV, PROJECTION = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
NORM_1, NORM_2 = "input_layernorm", "pre_mlp_layernorm"

# Embedding, final norm and output projection of each class.
ENDS = {
    "mpt": ("transformer.wte.weight", "transformer.norm_f", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight"),
    "llama": ("model.embed_tokens.weight", "model.norm", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "transformer.ln_f", "lm_head.weight"),
    "distributed_lm": (EMBEDDING, FINAL_NORM, OUTPUT),
}


def _ends(family: str, model: ModelConfig) -> Iterator[Rule]:
    embedding, norm, output = ENDS[family]
    if family == "gpt2" and model.position == "sinusoidal":
        if model.tie_embeddings:
            yield Rule(EMBEDDING, (embedding, output), SCALED_AND_PLAIN)
        else:
            yield Rule(EMBEDDING, (embedding,), SCALED)
    else:
        yield Rule(EMBEDDING, (embedding,), SAME)
    yield from _norm(model, FINAL_NORM, norm)
    if not model.tie_embeddings:
        yield Rule(OUTPUT, (output,), SAME)
    if model.position in ("learned", "t5"):
        theirs = "transformer.wpe.weight" if family == "gpt2" else POSITION_TABLE
        yield Rule(POSITION_TABLE, (theirs,), SAME)


def _norm(model: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}.weight", (f"{theirs}.weight",), SAME)
    if model.bias and model.normalization == "layernorm":
        yield Rule(f"{ours}.bias", (f"{theirs}.bias",), SAME)


def _linear(
    model: ModelConfig,
    ours: str,
    theirs: str | tuple[str, ...],
    weight: Transform = SAME,
    bias: Transform = SAME,
) -> Iterator[Rule]:
    names = (theirs,) if isinstance(theirs, str) else theirs
    yield Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in names), weight)
    if model.bias:
        yield Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in names), bias)


def _mpt(model: ModelConfig) -> Iterator[Rule]:
    ours, theirs = "decoder.layers.{layer}.", "transformer.blocks.{layer}."
    yield from _norm(model, ours + NORM_1, theirs + "norm_1")
    yield from _linear(model, ours + QKV, theirs + "attn.Wqkv", STACKED_QKV)
    yield from _linear(model, ours + PROJECTION, theirs + "attn.out_proj")
    yield from _norm(model, ours + NORM_2, theirs + "norm_2")
    yield from _linear(model, ours + FC1, theirs + "ffn.up_proj")
    yield from _linear(model, ours + FC2, theirs + "ffn.down_proj")


def _gpt_neox(model: ModelConfig) -> Iterator[Rule]:
    """Its fused QKV has Megatron's order: each head's query, key and value."""
    ours, theirs = "decoder.layers.{layer}.", "gpt_neox.layers.{layer}."
    yield from _norm(model, ours + NORM_1, theirs + "input_layernorm")
    yield from _linear(model, ours + QKV, theirs + "attention.query_key_value")
    yield from _linear(model, ours + PROJECTION, theirs + "attention.dense")
    yield from _norm(model, ours + NORM_2, theirs + "post_attention_layernorm")
    yield from _linear(model, ours + FC1, theirs + "mlp.dense_h_to_4h")
    yield from _linear(model, ours + FC2, theirs + "mlp.dense_4h_to_h")


def _llama(model: ModelConfig) -> Iterator[Rule]:
    ours, theirs = "decoder.layers.{layer}.", "model.layers.{layer}."
    projections = tuple(f"{theirs}self_attn.{part}_proj" for part in "qkv")
    yield from _norm(model, ours + NORM_1, theirs + "input_layernorm")
    yield from _linear(model, ours + QKV, projections, SPLIT_QKV, SPLIT_QKV)
    yield from _linear(model, ours + PROJECTION, theirs + "self_attn.o_proj")
    yield from _norm(model, ours + NORM_2, theirs + "post_attention_layernorm")
    for half in ("gate", "up"):
        yield from _linear(model, f"{ours}{FC1}.{half}", f"{theirs}mlp.{half}_proj")
    yield from _linear(model, ours + FC2, theirs + "mlp.down_proj")


def _gpt2(model: ModelConfig) -> Iterator[Rule]:
    """Its Conv1D holds every matrix as [in, out]."""
    ours, theirs = "decoder.layers.{layer}.", "transformer.h.{layer}."
    yield from _norm(model, ours + NORM_1, theirs + "ln_1")
    yield from _linear(
        model, ours + QKV, theirs + "attn.c_attn", TRANSPOSED_STACKED_QKV, STACKED_QKV
    )
    yield from _linear(model, ours + PROJECTION, theirs + "attn.c_proj", TRANSPOSED)
    yield from _norm(model, ours + NORM_2, theirs + "ln_2")
    yield from _linear(model, ours + FC1, theirs + "mlp.c_fc", TRANSPOSED)
    yield from _linear(model, ours + FC2, theirs + "mlp.c_proj", TRANSPOSED)


def _distributed_lm(model: ModelConfig) -> Iterator[Rule]:
    """``modeling_distributed_lm.py`` has our own names."""
    layer = "decoder.layers.{layer}."
    halves = (f"{FC1}.gate", f"{FC1}.up") if model.activation == "swiglu" else (FC1,)
    for name in (QKV, PROJECTION, *halves, FC2):
        yield from _linear(model, layer + name, layer + name)
    for name in (NORM_1, NORM_2):
        yield from _norm(model, layer + name, layer + name)


FAMILIES: dict[str, Callable[[ModelConfig], Iterator[Rule]]] = {
    "mpt": _mpt,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "gpt2": _gpt2,
    "distributed_lm": _distributed_lm,
}
