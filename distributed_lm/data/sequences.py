"""Which sequences each data-parallel rank reads at each step: arithmetic alone, no tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distributed_lm.config import RunConfig
from distributed_lm.data.blend import BlockOrder
from distributed_lm.errors import TrainingError


class SequenceId(NamedTuple):
    """One training sequence: part of a block."""

    corpus: int
    epoch: int
    place: int
    """Of the block, in that epoch's shuffled order."""
    part: int
    """Of the block, in sequence lengths from its start."""


class StepSequences:
    """The sequences of every step, and which data-parallel rank reads them.

    Args:
        blocks_per_epoch: whole blocks in each corpus.
        cache: folder for the blend, if there are several corpora.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: Sequence[float],
        blocks_per_epoch: Sequence[int],
        cache: Path,
    ) -> None:
        self._config = config
        self._sequences_per_block = config.data.block_size // config.data.sequence_length
        self._blocks_per_step = config.tokens_per_step // config.data.block_size
        # Over all steps of the run, and some more: rewinding past a spike skips steps.
        rewinds = config.train.steps if config.train.spike.action == "rewind" else 0
        steps = config.train.steps + rewinds + 10
        self.order = BlockOrder(weights, blocks_per_epoch, steps * self._blocks_per_step, cache)

    def places(self, position: int) -> list[tuple[int, int, int]]:
        """(corpus, epoch, place in its shuffled order) of each block of step ``position`` (from 0).

        Raises:
            TrainingError: if ``position`` lies beyond what was planned for the run.
        """
        first = position * self._blocks_per_step
        last = first + self._blocks_per_step
        if position < 0 or last > self.order.length:
            planned = self.order.length // self._blocks_per_step
            raise TrainingError(
                f"train.spike.action=rewind has left out more batches than the "
                f"{self._config.train.steps} steps of the run: batch {position} of {planned} "
                "planned was asked for; lower optimizer.learning_rate or raise "
                "train.spike.threshold"
            )
        return [self.order.place(number) for number in range(first, last)]

    def of_rank(self, position: int, rank: int, size: int) -> list[SequenceId]:
        """What data-parallel rank ``rank`` of ``size`` reads at step ``position``, in order.

        The step's sequences are its blocks in order, each cut from its start. Microbatch m of rank
        r holds those from ``(m · size + r) · micro_batch_size`` on.

        Raises:
            TrainingError: as ``places``.
        """
        places, mine = self.places(position), []
        for number in self._numbers(rank, size):
            block, part = divmod(number, self._sequences_per_block)
            mine.append(SequenceId(*places[block], part))
        return mine

    def _numbers(self, rank: int, size: int) -> list[int]:
        """Numbers, within the step, of the sequences that ``rank`` gets, in the order it does."""
        micro = self._config.batch.micro_batch_size
        sequences = self._config.batch.global_batch_size
        return [
            start + offset
            for start in range(rank * micro, sequences, micro * size)
            for offset in range(micro)
        ]
