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
from distributed_lm.data.sequences import StepSequences

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
    order = step_sequences(config, corpora).order
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
        self._sequence_length = config.data.sequence_length
        self._indices = [EpochIndex(corpus, config) for corpus in corpora]
        self._sequences = step_sequences(config, corpora)
        # An epoch is left for good once its last block is read; blends straddle a boundary.
        self._open = functools.lru_cache(maxsize=2 * len(corpora))(self._open_epoch)

    def blocks(self, position: int) -> list[tuple[int, int, int]]:
        """(corpus, epoch, block of that epoch) of each block of step ``position`` (from 0).

        The same at any layout and any sequence length.

        Raises:
            TrainingError: if ``position`` lies beyond what was planned for the run.
        """
        places = self._sequences.places(position)
        return [
            (corpus, epoch, int(self._open(corpus, epoch).shuffle_index[place]))
            for corpus, epoch, place in places
        ]

    def batch(
        self, position: int, data_parallel_rank: int, data_parallel_size: int
    ) -> tuple[Tensor, Tensor]:
        """One data-parallel rank's part of step ``position`` (from 0).

        Which sequences those are: ``sequences.py``.

        Returns:
            tokens and labels, each int64 [global_batch_size / data_parallel_size,
            sequence_length], microbatch after microbatch; labels are the next tokens.

        Raises:
            TrainingError: if ``position`` lies beyond what was planned for the run.
        """
        mine = self._sequences.of_rank(position, data_parallel_rank, data_parallel_size)
        shape = (len(mine), self._sequence_length)
        tokens = torch.empty(shape, dtype=torch.int64)
        labels = torch.empty(shape, dtype=torch.int64)
        read = None
        for row, (*place, part) in enumerate(mine):
            if place != read:
                corpus, epoch, number = place
                block, read = self._open(corpus, epoch)[number], place
            cut = slice(part * self._sequence_length, (part + 1) * self._sequence_length)
            tokens[row] = block["tokens"][cut]
            labels[row] = block["labels"][cut]
        return tokens, labels

    def _open_epoch(self, corpus: int, epoch: int) -> "GPTDataset":
        return self._indices[corpus].open(epoch)


def step_sequences(config: RunConfig, corpora: Sequence[Corpus]) -> StepSequences:
    """Of a run over these data sets. Reads nothing."""
    return StepSequences(
        config,
        [corpus.weight for corpus in corpora],
        [corpus.blocks_per_epoch(config.data.block_size) for corpus in corpora],
        cache_folder(corpora[0].folder, config),
    )
