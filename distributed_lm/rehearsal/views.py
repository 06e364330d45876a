"""What goes into building one rank, and what comes out: plain values to compare. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distributed_lm.config import RunConfig
from distributed_lm.data.sequences import StepSequences
from distributed_lm.layout import Coordinates, Layout


@dataclass(frozen=True)
class Script:
    """What all ranks of a rehearsal have in common."""

    config: RunConfig
    layout: Layout
    vocab_size: int
    """Rows of the embedding."""
    moments: tuple[str, ...]
    """Names of the optimizer's."""
    sequences: StepSequences
    steps: tuple[int, ...]
    """Positions whose sequences are compared."""
    data_note: str
    """Where the sequence ids come from."""


@dataclass(frozen=True)
class Weight:
    """A rectangle of a global tensor that a rank holds in its model."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_sharded: bool
    """Split over the tensor-parallel ranks, not copied to each."""
    is_tied_copy: bool
    """A later pipeline stage's copy of what another stage owns."""


@dataclass(frozen=True)
class SavedBlocks:
    """The rectangles of global tensors that a rank writes into a checkpoint; n of them."""

    keys: tuple[str, ...]
    """Names of the tensors."""
    global_shapes: tuple[tuple[int, ...], ...]
    """Of each of ``keys``."""
    tensor: np.ndarray
    """int32 [n]: of which tensor, an index into ``keys``."""
    bounds: np.ndarray
    """int64 [n, 4], as ``bounds`` gives them."""


@dataclass(frozen=True)
class RankView:
    """One rank of the run."""

    rank: int
    coordinates: Coordinates
    groups: dict[str, tuple[int, ...]]
    """Members of Megatron's groups that this rank is in, in group order."""
    deepspeed_groups: dict[str, tuple[int, ...]]
    """Members of the ``data`` and ``model`` groups that DeepSpeed's engine works with."""
    layers: tuple[tuple[int, ...], ...]
    """Numbers, from 0, of the layers of each virtual stage."""
    has_embedding: bool
    has_output: bool
    parameters: int
    """Elements of all local parameters, as built."""
    weights: tuple[Weight, ...]
    slopes: tuple[tuple[float, ...], ...] | None
    """Of the live attention modules, layer by layer; None where the method has none."""
    expected_slopes: tuple[float, ...] | None
    """Of all heads of the model, by the paper's formula."""
    samples: np.ndarray
    """int64 [steps, sequences, 4]: ``SequenceId`` of what it reads at each rehearsed step."""
    saved: SavedBlocks
    state_bytes: int
    """Weights, fp32 master weights and moments that this rank holds."""


def bounds(offset: Sequence[int], shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A rectangle as (first row, row after the last, first column, column after the last). A vector
    is one column."""
    (row, column), (rows, columns) = [*offset, 0][:2], [*shape, 1][:2]
    return row, row + rows, column, column + columns
