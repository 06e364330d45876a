"""Whether rectangles tile a tensor: every element in one of them, none in two."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fault:
    """A part of a tensor that is not covered exactly once."""

    row: int
    column: int
    """One element of it."""
    times: int
    """How often that element is covered."""
    indices: tuple[int, ...]
    """Of the rectangles that cover it."""


def first_fault(shape: tuple[int, ...], bounds: np.ndarray, *, whole: bool) -> Fault | None:
    """The first element, row by row, that is outside the tensor, covered twice, or not covered.

    Args:
        shape: of the tensor, one or two dimensions.
        bounds: int64 [n, 4], as ``views.bounds`` gives them.
        whole: whether an element that is not covered is a fault.
    """
    rows, columns = (*shape, 1)[:2]
    outside = (bounds[:, [0, 2]] < 0).any(axis=1) | (bounds[:, 1] > rows) | (bounds[:, 3] > columns)
    if outside.any():
        index = int(outside.argmax())
        row, column = int(bounds[index, 0]), int(bounds[index, 2])
        return Fault(row, column, 1, (index,))
    # Between two neighbouring edges of rectangles nothing changes: count on the grid of edges, by
    # the corners' differences summed up twice.
    row_edges = np.unique(np.append(bounds[:, :2], [0, rows]))
    column_edges = np.unique(np.append(bounds[:, 2:], [0, columns]))
    counts = np.zeros((len(row_edges), len(column_edges)), dtype=np.int32)
    top, bottom = (np.searchsorted(row_edges, bounds[:, side]) for side in (0, 1))
    left, right = (np.searchsorted(column_edges, bounds[:, side]) for side in (2, 3))
    for side, end, sign in (
        (top, left, 1),
        (bottom, right, 1),
        (top, right, -1),
        (bottom, left, -1),
    ):
        np.add.at(counts, (side, end), sign)
    counts = counts.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
    wrong = counts != 1 if whole else counts > 1
    if not wrong.any():
        return None
    at_row, at_column = divmod(int(wrong.argmax()), counts.shape[1])
    row, column = int(row_edges[at_row]), int(column_edges[at_column])
    covering = (
        (bounds[:, 0] <= row) & (row < bounds[:, 1])
        & (bounds[:, 2] <= column) & (column < bounds[:, 3])
    )  # fmt: skip
    indices = tuple(int(index) for index in np.flatnonzero(covering))
    return Fault(row, column, int(counts[at_row, at_column]), indices)
