"""The order of training and its batches, as a pure function of (config, step, data-parallel rank).

The unit of shuffling is a *block* of ``data.block_length`` tokens. A step takes the next blocks of
the order; the sequences of a step are cut inside its blocks. So which tokens a step sees follows
from the corpora, seed, block length and tokens per step, and from nothing else: not the layout,
not the sequence length, not ``train.steps``.

Order of one corpus: epoch after epoch, each shuffled by Megatron's ``GPTDataset`` with
``seed + epoch``. Order of several: see ``blend``.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distributed_lm.config import RunConfig
from distributed_lm.data.blend import BlockOrder
from distributed_lm.data.corpora import (
    Corpus,
    corpora_hash,
    evaluation_stream,
    open_corpora,
)
from distributed_lm.data.index_cache import (
    EpochIndex,
    cache_folder,
    check_shared_cache,
    writing_to,
)
from distributed_lm.errors import TrainingError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

__all__ = ["TrainingData", "build_index_caches", "check_shared_cache", "evaluation_stream"]


def build_index_caches(config: RunConfig) -> None:
    """Make the shuffle indices that the run will read.

    Every process calls it, before torch.distributed is initialised; one process per visible cache
    folder does the work and the others wait.

    Raises:
        DataError: if a data set is missing, damaged or too small.
        ConfigError: if the cache folder cannot be written.
    """
    corpora = open_corpora(config)
    indices = [EpochIndex(corpus, config) for corpus in corpora]
    order = _order(config, corpora, indices)
    if not order.is_built:
        with writing_to(cache_folder(corpora[0].folder, config)):
            order.build()
    for corpus, index, epochs in zip(corpora, indices, order.epochs(), strict=True):
        # Looked at without the lock first: a finished cache may lie on a read-only disk.
        missing = [epoch for epoch in range(epochs) if not index.path(epoch).is_dir()]
        if missing:
            with writing_to(cache_folder(corpus.folder, config)):
                for epoch in missing:
                    index.build(epoch)


class TrainingData:
    """Batches of the training split, after ``build_index_caches``.

    Raises:
        DataError: if a data set is missing, damaged or too small, or does not fit the others.
    """

    def __init__(self, config: RunConfig) -> None:
        corpora = open_corpora(config)
        self.vocab_size = corpora[0].manifest.vocab_size
        self.corpus_hash = corpora_hash(corpora)
        self._config = config
        self._sequence_length = config.data.sequence_length
        self._sequences_per_block = config.data.block_size // config.data.sequence_length
        self._blocks_per_step = config.tokens_per_step // config.data.block_size
        self._indices = [EpochIndex(corpus, config) for corpus in corpora]
        self._order = _order(config, corpora, self._indices)
        # An epoch is left for good once its last block is read; blends straddle a boundary.
        self._open = functools.lru_cache(maxsize=2 * len(corpora))(self._open_epoch)

    def blocks(self, position: int) -> list[tuple[int, int, int]]:
        """(corpus, epoch, block of that epoch) of each block of step ``position`` (from 0).

        The same at any layout and any sequence length.

        Raises:
            TrainingError: if ``position`` lies beyond what was planned for the run.
        """
        places = self._places(position)
        return [
            (corpus, epoch, int(self._open(corpus, epoch).shuffle_index[place]))
            for corpus, epoch, place in places
        ]

    def batch(
        self, position: int, data_parallel_rank: int, data_parallel_size: int
    ) -> tuple[Tensor, Tensor]:
        """One data-parallel rank's part of step ``position`` (from 0).

        The step's sequences are its blocks in order, each cut from its start. Microbatch m of rank
        r holds those from ``(m · data_parallel_size + r) · micro_batch_size`` on.

        Returns:
            tokens and labels, each int64 [global_batch_size / data_parallel_size,
            sequence_length], microbatch after microbatch; labels are the next tokens.

        Raises:
            TrainingError: if ``position`` lies beyond what was planned for the run.
        """
        places = self._places(position)
        rows = self._rows(data_parallel_rank, data_parallel_size)
        shape = (len(rows), self._sequence_length)
        tokens = torch.empty(shape, dtype=torch.int64)
        labels = torch.empty(shape, dtype=torch.int64)
        read = -1
        for row, sequence in enumerate(rows):
            number, part = divmod(sequence, self._sequences_per_block)
            if number != read:
                corpus, epoch, place = places[number]
                block, read = self._open(corpus, epoch)[place], number
            cut = slice(part * self._sequence_length, (part + 1) * self._sequence_length)
            tokens[row] = block["tokens"][cut]
            labels[row] = block["labels"][cut]
        return tokens, labels

    def _places(self, position: int) -> list[tuple[int, int, int]]:
        first = position * self._blocks_per_step
        last = first + self._blocks_per_step
        if position < 0 or last > self._order.length:
            planned = self._order.length // self._blocks_per_step
            raise TrainingError(
                f"train.spike.action=rewind has left out more batches than the "
                f"{self._config.train.steps} steps of the run: batch {position} of {planned} "
                "planned was asked for; lower optimizer.learning_rate or raise "
                "train.spike.threshold"
            )
        return [self._order.place(number) for number in range(first, last)]

    def _rows(self, rank: int, size: int) -> list[int]:
        """Numbers, within the step, of the sequences that ``rank`` gets, in the order it does."""
        micro = self._config.batch.micro_batch_size
        sequences = self._config.batch.global_batch_size
        return [
            start + offset
            for start in range(rank * micro, sequences, micro * size)
            for offset in range(micro)
        ]

    def _open_epoch(self, corpus: int, epoch: int) -> "GPTDataset":
        return self._indices[corpus].open(epoch)


def _order(
    config: RunConfig, corpora: Sequence[Corpus], indices: Sequence[EpochIndex]
) -> BlockOrder:
    """The order over all steps of the run, and some more: rewinding past a spike skips steps."""
    rewinds = config.train.steps if config.train.spike.action == "rewind" else 0
    steps = config.train.steps + rewinds + 10
    return BlockOrder(
        [corpus.weight for corpus in corpora],
        [index.blocks_per_epoch for index in indices],
        steps * (config.tokens_per_step // config.data.block_size),
        cache_folder(corpora[0].folder, config),
    )
