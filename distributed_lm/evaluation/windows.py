"""Which tokens each protocol feeds the model at once, and which of its predictions it scores.

A *target* is a token to be predicted, numbered by its place in the stream: every token but the
first is one. A *window* is a run of input tokens; its prediction at position p (from 0) is of the
target one further on and has p + 1 tokens of context.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Windows of at most ``length`` inputs, in the order of the stream; int64 arrays [windows].

    Window w reads tokens starts[w] … starts[w] + counts[w] − 1 and scores its positions
    firsts[w] … counts[w] − 1, those of them whose target is in ``targets``.
    """

    length: int
    starts: np.ndarray
    counts: np.ndarray
    firsts: np.ndarray
    targets: np.ndarray | None = None
    """Sorted, int64; None = every target."""

    def __len__(self) -> int:
        return len(self.starts)

    def mask(self, window: int) -> np.ndarray:
        """Which positions of a window are scored, bool [counts]."""
        count = int(self.counts[window])
        scored = np.arange(count) >= self.firsts[window]
        if self.targets is not None:
            first = self.starts[window] + 1
            low, high = np.searchsorted(self.targets, [first, first + count])
            wanted = np.zeros(count, dtype=bool)
            wanted[self.targets[low:high] - first] = True
            scored &= wanted
        return scored

    @property
    def num_scored(self) -> int:
        """Targets that are scored over all windows."""
        if self.targets is not None:
            return len(self.targets)
        return int((self.counts - self.firsts).sum())


def sliding_windows(num_targets: int, length: int, stride: int, first_token: int = 0) -> Windows:
    """Windows of ``length`` tokens, each ``stride`` further on; of every window but the first only
    the last ``stride`` targets are scored (Press et al. 2022, §2.1). So every target is scored
    once, with as much context as its window holds; the last window is cut at the last target.

    ``stride = length`` is the paper's nonoverlapping evaluation.

    Args:
        num_targets: targets of the stretch, which is ``num_targets + 1`` tokens long.
        first_token: where the stretch begins in the stream.
    """
    if not 0 < stride <= length:
        raise ValueError(f"stride {stride} is not between 1 and the length {length}")
    number = 1 + max(0, -(-(num_targets - length) // stride)) if num_targets else 0
    offsets = np.arange(number, dtype=np.int64) * stride
    counts = np.minimum(length, num_targets - offsets)
    firsts = np.full(number, length - stride, dtype=np.int64)
    firsts[:1] = 0
    return Windows(length, first_token + offsets, counts, firsts)


def document_windows(ends: np.ndarray, length: int, stride: int, longer_than: int) -> Windows:
    """``sliding_windows`` inside each document of more than ``longer_than`` tokens.

    No window crosses a document's border. A document's first token is not scored: nothing of the
    document is there to predict it from.

    Args:
        ends: of ``evaluation_document_ends``.
    """
    starts = np.concatenate(([0], ends[:-1])).astype(np.int64)
    long = np.flatnonzero(ends - starts > max(1, longer_than))
    parts = [
        sliding_windows(int(ends[d] - starts[d]) - 1, length, stride, int(starts[d])) for d in long
    ]
    empty = np.zeros(0, dtype=np.int64)
    return Windows(
        length,
        np.concatenate([empty, *[part.starts for part in parts]]),
        np.concatenate([empty, *[part.counts for part in parts]]),
        np.concatenate([empty, *[part.firsts for part in parts]]),
    )


def only_targets(windows: Windows, targets: np.ndarray) -> Windows:
    """The windows that score any of ``targets`` (sorted), and of these only those."""
    low = np.searchsorted(targets, windows.starts + 1 + windows.firsts)
    high = np.searchsorted(targets, windows.starts + 1 + windows.counts)
    kept = np.flatnonzero(high > low)
    return Windows(
        windows.length, windows.starts[kept], windows.counts[kept], windows.firsts[kept], targets
    )


def context_windows(targets: np.ndarray, context: int) -> Windows:
    """One window per target, that scores it with exactly ``context`` tokens before it."""
    size = len(targets)
    counts = np.full(size, context, dtype=np.int64)
    return Windows(context, targets - context, counts, counts - 1)


def sample_targets(first: int, last: int, number: int, seed: int) -> np.ndarray:
    """``number`` of the targets ``first … last``, spread evenly: one from each of as many equal
    stretches, at a random place. All of them if there are no more. Sorted int64."""
    available = last - first + 1
    if number >= available:
        return np.arange(first, last + 1, dtype=np.int64)
    edges = first + np.arange(number + 1, dtype=np.int64) * available // number
    generator = np.random.default_rng(seed)
    return generator.integers(edges[:-1], edges[1:], dtype=np.int64)


def geometric_contexts(lengths: Sequence[int]) -> tuple[int, ...]:
    """Powers of two from 1 up to the longest of ``lengths``, and the lengths themselves."""
    powers = [1 << exponent for exponent in range(max(lengths).bit_length())]
    return tuple(sorted({*(power for power in powers if power <= max(lengths)), *lengths}))


def position_edges(length: int) -> tuple[int, ...]:
    """Edges of bins over 1 … ``length`` tokens of context, two to an octave, half open: bin k holds
    edges[k] … edges[k + 1] − 1. They are the same at every length but for the last, and bins end at
    every power of two, so that bins can be merged and compared between lengths."""
    ends = {round(2 ** (half / 2)) for half in range(2 * length.bit_length() + 1)}
    return (1, *(end + 1 for end in sorted(ends) if end < length), length + 1)
