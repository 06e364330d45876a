"""Score windows at any layout, and sum what comes out by position and by document."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_lm.evaluation.windows import Windows
from distributed_lm.layout import Layout
from distributed_lm.pipeline import Microbatch
from distributed_lm.process_groups import ProcessGroups

Advance = Callable[[int, int], None]
"""Called with how many of the windows are done, and how many there are."""

Score = Callable[[list[Microbatch], Callable[[Tensor], None]], object]
"""Runs microbatches, and on the last stage calls back with each one's losses [B, S], in order."""


@dataclass(frozen=True)
class Sums:
    """Nats and tokens scored over the whole run, fp64."""

    position_nats: np.ndarray
    """[length]; entry p is of predictions from p + 1 tokens of context."""
    position_tokens: np.ndarray
    document_nats: np.ndarray
    """[documents] of the stream, those without a scored token included."""
    document_tokens: np.ndarray

    @property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens of each."""
        return self.document_nats, self.document_tokens

    @property
    def nats(self) -> float:
        return float(self.position_nats.sum())

    @property
    def tokens(self) -> int:
        return round(float(self.position_tokens.sum()))


def score_windows(
    stream: np.ndarray,
    document_ends: np.ndarray,
    windows: Windows,
    tokens_per_batch: int,
    groups: ProcessGroups,
    score: Score,
    advance: Advance = lambda done, total: None,
) -> Sums:
    """Score what ``windows`` says. Collective.

    Args:
        stream: token ids.
        document_ends: of ``evaluation_document_ends``, for the same stream.
        tokens_per_batch: tokens per forward pass of one data-parallel rank.
    """
    sums, done = _RankSums(windows, document_ends), 0
    for batch in _batches(windows, groups.layout, groups.coordinates.data, tokens_per_batch):
        rows_of = iter(batch)
        score(
            [_microbatch(stream, windows, rows, groups.layout) for rows in batch],
            lambda losses_BS, rows_of=rows_of: sums.add(next(rows_of), losses_BS),  # type: ignore[misc]
        )
        done += len(batch) * len(batch[0]) * groups.layout.data
        advance(min(done, len(windows)), len(windows))
    whole = groups.sum_over_run(torch.from_numpy(sums.packed()).to(groups.device)).cpu().numpy()
    result = sums.unpacked(whole)
    assert result.tokens == windows.num_scored, (result.tokens, windows.num_scored)
    return result


class _RankSums:
    """What this rank's last stage has seen; zero on all other stages."""

    def __init__(self, windows: Windows, document_ends: np.ndarray) -> None:
        self._windows = windows
        self._ends = document_ends
        self._positions = np.zeros((2, windows.length))
        self._documents = np.zeros((2, len(document_ends)))

    def add(self, rows: range, losses_BS: Tensor) -> None:
        values = losses_BS.double().cpu().numpy()
        for row, window in enumerate(rows):
            if window >= len(self._windows):
                break
            positions = np.flatnonzero(self._windows.mask(window))
            nats = values[row, positions]
            self._positions[0, positions] += nats
            self._positions[1, positions] += 1
            targets = self._windows.starts[window] + 1 + positions
            # A window's documents are neighbours: no array over all documents for each window.
            documents = np.searchsorted(self._ends, targets, side="right")
            first = int(documents[0]) if len(documents) else 0
            counted = np.bincount(documents - first)
            part = slice(first, first + len(counted))
            self._documents[0, part] += np.bincount(documents - first, weights=nats)
            self._documents[1, part] += counted

    def packed(self) -> np.ndarray:
        return np.concatenate([self._positions.ravel(), self._documents.ravel()])

    def unpacked(self, values: np.ndarray) -> Sums:
        size = self._positions.size
        positions = values[:size].reshape(2, -1)
        documents = values[size:].reshape(2, -1)
        return Sums(positions[0], positions[1], documents[0], documents[1])


def _batches(
    windows: Windows, layout: Layout, data_rank: int, tokens_per_batch: int
) -> Iterator[list[range]]:
    """This rank's windows, one list per schedule run: a microbatch per pipeline stage, all of one
    shape. Windows are dealt to the data-parallel ranks in turn; past the last there is padding."""
    rows = max(1, tokens_per_batch // (windows.length * layout.pipeline))
    per_run = rows * layout.pipeline * layout.data
    for first in range(0, len(windows), per_run):
        starts = [
            first + (microbatch * layout.data + data_rank) * rows
            for microbatch in range(layout.pipeline)
        ]
        yield [range(start, start + rows) for start in starts]


def _microbatch(stream: np.ndarray, windows: Windows, rows: range, layout: Layout) -> Microbatch:
    """Padding stands behind the last token, where causal attention does not look, and fills up to
    what sequence parallelism can divide."""
    parts = layout.tensor if layout.sequence else 1
    length = -(-windows.length // parts) * parts
    tokens = np.zeros((len(rows), length + 1), dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.float32)
    for row, window in enumerate(rows):
        if window < len(windows):
            start, count = int(windows.starts[window]), int(windows.counts[window])
            tokens[row, : count + 1] = stream[start : start + count + 1]
            mask[row, :count] = windows.mask(window)
    whole = torch.from_numpy(tokens)
    return Microbatch(whole[:, :-1], whole[:, 1:], torch.from_numpy(mask))
