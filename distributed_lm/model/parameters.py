"""Which part of which global tensor each local parameter is: for initial weights and checkpoints.

A tensor's global name and shape do not depend on the layout. Layer numbers count from 0 over the
whole model, a tied output projection is the embedding, and the two halves of SwiGLU's fused weight
(which each tensor-parallel rank interleaves in its own way) are two tensors.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from distributed_lm.config import ModelConfig
from distributed_lm.model import initialization
from distributed_lm.model.adaptive import TIED_COPY
from distributed_lm.model.gpt import GPTStage
from distributed_lm.process_groups import ProcessGroups

EMBEDDING = "embedding.weight"
POSITION = "position."


@dataclass(frozen=True)
class Piece:
    """Rows ``first_row … first_row + rows`` of a local parameter as a block of a global tensor."""

    name: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    first_row: int
    rows: int


@dataclass(frozen=True)
class ParameterShard:
    """A local parameter and the blocks of global tensors that it holds."""

    parameter: nn.Parameter
    local_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_sharded: bool
    """Split over the tensor-parallel ranks, not copied to each."""
    is_tied_copy: bool
    """A pipeline stage's copy of weights that the first stage owns: the last one's of a tied
    embedding, and every later one's of a position method's."""
    is_partial: bool
    """Backward gives each tensor-parallel rank only a part of the gradient: from a slice of the
    tokens (sequence parallelism), or a slice of the heads."""

    @property
    def is_decayed(self) -> bool:
        """Weight decay is for matrices, not for biases and norms."""
        return len(self.local_shape) > 1


def parameter_shards(stages: list[GPTStage], groups: ProcessGroups) -> list[ParameterShard]:
    """All parameters of this rank, in a fixed order. Call before ZeRO-3 takes the weights away."""
    rank, size = groups.coordinates.tensor, groups.layout.tensor
    shards = []
    for stage in stages:
        for name, parameter, dimension in _named_parameters(stage):
            is_positions = name.startswith(POSITION)
            if is_positions and stage is not stages[0]:  # virtual stages share one method
                continue
            tied_output = (
                name == "output_layer.weight"
                and stage.share_embeddings_and_output_weights
                and not stage.pre_process
            )
            tied_copy = tied_output or (is_positions and groups.coordinates.pipeline > 0)
            partial = getattr(parameter, "sequence_parallel", False)
            if is_positions:
                slices_tokens = stage.position.embeds_only and groups.layout.sequence
                slices_heads = not stage.position.embeds_only and dimension is None
                partial = size > 1 and (slices_tokens or slices_heads)
            shape = tuple(parameter.shape)
            names = [EMBEDDING if tied_output else name]
            if name.startswith(TIED_COPY):
                tied_copy, names = True, ["embedding." + name.removeprefix(TIED_COPY)]
            if "linear_fc1" in name and stage.config.gated_linear_unit:
                names = [
                    name.replace("linear_fc1", f"linear_fc1.{half}") for half in ("gate", "up")
                ]
            pieces = _pieces(names, shape, dimension, rank, size)
            # DeepSpeed reads these two when it sums the gradient norm over model-parallel ranks.
            parameter.tensor_model_parallel = dimension is not None  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = tied_copy  # type: ignore[attr-defined]
            shards.append(
                ParameterShard(parameter, shape, pieces, dimension is not None, tied_copy, partial)
            )
    return shards


def initialize_weights(shards: list[ParameterShard], model: ModelConfig, seed: int) -> None:
    """Draw every weight from (seed, global name): the same model at any layout.

    N(0, init_std²), projections back into the residual stream with init_std / √(2·layers)
    (GPT-2's rule); norms 1, biases 0. Or as fairseq does: ``initialization.py``.
    """
    for shard in shards:
        for piece in shard.pieces:
            local = shard.parameter.data[piece.first_row : piece.first_row + piece.rows]
            local.copy_(_initial_block(piece, model, seed, local.shape))


def _initial_block(piece: Piece, model: ModelConfig, seed: int, shape: torch.Size) -> Tensor:
    is_fairseq = initialization.applies(piece.name, model)
    if piece.name.endswith(".bias") and not is_fairseq:
        return torch.zeros(shape)
    if "norm" in piece.name:
        return torch.ones(shape)
    std = model.init_std
    if "linear_proj" in piece.name or "linear_fc2" in piece.name:
        std /= math.sqrt(2.0 * model.num_layers)
    digest = hashlib.sha256(f"{seed}:{piece.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if is_fairseq:
        full = initialization.draw(piece.name, piece.global_shape, model, generator)
    else:
        full = torch.randn(piece.global_shape, generator=generator) * std
    block = tuple(
        slice(start, start + length)
        for start, length in zip(piece.global_offset, shape, strict=True)
    )
    return full[block]


def _named_parameters(stage: GPTStage) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """(global name, parameter, dimension split over the tensor-parallel ranks or None)."""
    prefixes = {
        f"decoder.layers.{index}.": f"decoder.layers.{layer.layer_number - 1}."
        for index, layer in enumerate(stage.decoder.layers)
    }
    for module_name, module in stage.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            for local, whole in prefixes.items():
                if name.startswith(local):
                    name = whole + name.removeprefix(local)
                    break
            yield name, parameter, _split_dimension(module, parameter)


def _split_dimension(module: nn.Module, parameter: nn.Parameter) -> int | None:
    if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
        return 0
    if isinstance(module, RowParallelLinear):
        return 1 if parameter.dim() == 2 else None
    return getattr(parameter, "partition_dim", None)  # a band of words, a position table


def _pieces(
    names: list[str], shape: tuple[int, ...], dimension: int | None, rank: int, size: int
) -> tuple[Piece, ...]:
    """The local tensor cut into one run of rows per name, each a block of its own tensor."""
    rows = shape[0] // len(names)
    block = (rows, *shape[1:])
    pieces = []
    for index, name in enumerate(names):
        global_shape, offset = list(block), [0] * len(block)
        if dimension is not None:
            global_shape[dimension] *= size
            offset[dimension] = block[dimension] * rank
        pieces.append(Piece(name, tuple(global_shape), tuple(offset), index * rows, rows))
    return tuple(pieces)
