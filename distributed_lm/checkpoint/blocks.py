"""Blocks: views of local memory that are rectangles of named global tensors.

ZeRO cuts the concatenation of all parameters into equal flat pieces, wherever that falls inside a
matrix. A flat piece of a matrix is at most three rectangles (the end of a row, whole rows, the
start of a row), and rectangles are what the checkpoint format can hold and load at another layout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from distributed_lm.model.parameters import ParameterShard
from distributed_lm.process_groups import ProcessGroups


@dataclass(frozen=True)
class Block:
    """``values`` is the block of the tensor ``key`` that starts at ``offset``.

    ``values`` is a view: loading writes through it. ``replica`` is all zeros on the one rank that
    saves the block and anything else on ranks with a copy.
    """

    key: str
    values: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    replica: tuple[int, ...]


def model_blocks(shards: list[ParameterShard], groups: ProcessGroups) -> list[Block]:
    """The weights in the training dtype, under ``model.NAME``."""
    return [
        block
        for shard in shards
        for block in whole_parameter("model", shard, shard.parameter.data, groups)
    ]


def replica(shard: ParameterShard, groups: ProcessGroups) -> tuple[int, int]:
    """Copies beside data-parallel ones: of parameters not split, and of a tied embedding."""
    return 0 if shard.is_sharded else groups.coordinates.tensor, int(shard.is_tied_copy)


def whole_parameter(
    kind: str, shard: ParameterShard, values: Tensor, groups: ProcessGroups
) -> Iterator[Block]:
    """Blocks of a tensor of the local parameter's shape that every data-parallel rank holds."""
    copy = (*replica(shard, groups), groups.coordinates.data)
    yield from flat_range(kind, shard, values.view(-1), 0, copy)


def flat_range(
    kind: str, shard: ParameterShard, flat: Tensor, start: int, copy: tuple[int, ...]
) -> Iterator[Block]:
    """Blocks of ``flat``, which is elements start … start + len − 1 of the local parameter.

    Args:
        kind: what of the parameter this is, as in ``optimizer.exp_avg``: the key's first part.
        flat: contiguous, 1-D.
        copy: the blocks' ``replica``.
    """
    stop = start + flat.numel()
    row_size = math.prod(shard.local_shape[1:])
    for piece in shard.pieces:
        first = piece.first_row * row_size
        last = first + piece.rows * row_size
        position, end = max(start, first), min(stop, last)
        while position < end:
            row, column = divmod(position - first, row_size)
            if column == 0 and end - position >= row_size:
                rows, columns = (end - position) // row_size, row_size
            else:
                rows, columns = 1, min(row_size - column, end - position)
            size = rows * columns
            values = flat.narrow(0, position - start, size)
            is_matrix = len(shard.local_shape) == 2
            local_offset = (row, column) if is_matrix else (row,)
            yield Block(
                key=f"{kind}.{piece.name}",
                values=values.view(rows, columns) if is_matrix else values,
                global_shape=piece.global_shape,
                offset=tuple(
                    base + local
                    for base, local in zip(piece.global_offset, local_offset, strict=True)
                ),
                replica=copy,
            )
            position += size
