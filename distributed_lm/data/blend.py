"""The order of blocks over one or several corpora."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distributed_lm.data.cache_files import building, load_plain


class BlockOrder:
    """Which block of which corpus comes at each place of the order of training.

    One corpus is read epoch after epoch. Several are mixed by Megatron's greedy blend, whose every
    prefix keeps the weights as closely as whole blocks can, so a longer run begins like a shorter.

    Args:
        weights: shares of the corpora, in any unit.
        blocks_per_epoch: whole blocks in each corpus.
        length: places that will be asked for.
        cache: folder for the blend, ten bytes per place, which processes then share by memory map.
    """

    def __init__(
        self,
        weights: Sequence[float],
        blocks_per_epoch: Sequence[int],
        length: int,
        cache: Path,
    ) -> None:
        self.length = length
        self._blocks_per_epoch = blocks_per_epoch
        self._shares = np.array(weights, dtype=np.float64) / sum(weights)
        name = hashlib.sha256(self._shares.tobytes()).hexdigest()[:16]
        self._folder = cache / f"blend-{name}-{length}"
        self._blend: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def is_built(self) -> bool:
        return len(self._shares) == 1 or self._folder.is_dir()

    def build(self) -> None:
        """Write the blend, unless it is there or there is only one corpus."""
        if self.is_built:
            return
        from megatron.core.datasets import helpers

        corpora = np.zeros(self.length, dtype=np.int16)
        numbers = np.zeros(self.length, dtype=np.int64)
        size = len(self._shares)
        helpers.build_blending_indices(corpora, numbers, self._shares, size, self.length, False)
        with building(self._folder) as temporary:
            np.save(temporary / "corpora.npy", corpora)
            np.save(temporary / "numbers.npy", numbers)

    def place(self, number: int) -> tuple[int, int, int]:
        """(corpus, epoch, place in that epoch's shuffled order) of block ``number``.

        Raises:
            DataError: if the blend is missing or damaged.
        """
        corpus, nth = 0, number
        if len(self._shares) > 1:
            corpora, numbers = self._opened()
            corpus, nth = int(corpora[number]), int(numbers[number])
        epoch, place = divmod(nth, self._blocks_per_epoch[corpus])
        return corpus, epoch, place

    def epochs(self) -> list[int]:
        """How many epochs of each corpus the order enters."""
        drawn = [self.length]
        if len(self._shares) > 1:
            drawn = np.bincount(self._opened()[0], minlength=len(self._shares)).tolist()
        return [-(-n // size) for n, size in zip(drawn, self._blocks_per_epoch, strict=True)]

    def _opened(self) -> tuple[np.ndarray, np.ndarray]:
        if self._blend is None:
            corpora, numbers = (
                load_plain(self._folder / f"{name}.npy") for name in ("corpora", "numbers")
            )
            self._blend = (corpora, numbers)
        return self._blend
