"""Exact parameter counts of one rank: its pipeline stages, cut by its tensor-parallel share."""

from dataclasses import dataclass

from distributed_lm.config import ModelConfig
from distributed_lm.layout import Layout, layers_per_stage
from distributed_lm.planner.parameters import norm_parameters, position_parameters


@dataclass(frozen=True)
class RankParameters:
    """Elements that one rank holds, copies of other ranks' included."""

    embedding: int
    layers: int
    output: int
    """Output projection: 0 where it is the stage's own embedding; and an adaptive softmax's."""
    other: int
    """Final norm, and what the position method learns."""
    largest: int
    """Elements of the largest single parameter."""

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.output + self.other


def stage_layers(model: ModelConfig, layout: Layout, pipeline: int) -> list[int]:
    """Layers of each of this pipeline rank's model chunks."""
    stages = layers_per_stage(model.num_layers, layout.pipeline * layout.virtual_pipeline)
    return stages[pipeline :: layout.pipeline]


def layer_shard(model: ModelConfig, tensor: int) -> int:
    """Of one layer on one of ``tensor`` ranks. Megatron cuts the first matrices and their biases by
    columns, the second ones by rows; their biases and the norms are on every rank."""
    hidden, ffn = model.hidden_size, model.ffn_size
    query_key_value = hidden + 2 * model.key_value_heads * model.head_dim
    up = ffn * (2 if model.activation == "swiglu" else 1)
    cut = hidden * (query_key_value + hidden + up + ffn)
    whole = 2 * norm_parameters(model)
    if model.bias:
        cut += query_key_value + up
        whole += 2 * hidden
    return cut // tensor + whole


def rank_parameters(
    model: ModelConfig, vocab_size: int, layout: Layout, pipeline: int
) -> RankParameters:
    """What a rank at this pipeline coordinate holds; all its tensor-parallel peers hold as much."""
    is_first, is_last = pipeline == 0, pipeline == layout.pipeline - 1
    hidden, tensor = model.hidden_size, layout.tensor
    embedding = output = other = 0
    if model.adaptive is None:
        words = vocab_size // tensor * hidden
        embedding = words * is_first
        output = words * (is_last and not (model.tie_embeddings and is_first))
    else:
        words, projections = _adaptive_shard(model, vocab_size, tensor)
        embedding = (words + projections) * is_first
        classes = len(model.adaptive.cutoffs) * hidden
        # A copy on a last stage of its own does not project band 0, which is as wide as the model.
        copy = 0 if is_first else words + projections - hidden * hidden
        output = (classes + copy) * is_last
    if model.final_norm and is_last:
        other += norm_parameters(model)
    if model.position == "t5":
        other += position_parameters(model) // tensor
    elif is_first:
        other += position_parameters(model)
    layers = sum(stage_layers(model, layout, pipeline)) * layer_shard(model, tensor)
    up = model.ffn_size * hidden * (2 if model.activation == "swiglu" else 1) // tensor
    ends = vocab_size // tensor * hidden if embedding or output else 0
    return RankParameters(embedding, layers, output, other, max(up, ends))


def _adaptive_shard(model: ModelConfig, vocab_size: int, tensor: int) -> tuple[int, int]:
    """Words of one tensor-parallel rank, and the projections, which every rank has."""
    assert model.adaptive is not None
    widths = model.adaptive.band_widths(model.hidden_size)
    sizes = model.adaptive.band_sizes(vocab_size)
    words = sum(size // tensor * width for size, width in zip(sizes, widths, strict=True))
    return words, model.hidden_size * sum(widths)
