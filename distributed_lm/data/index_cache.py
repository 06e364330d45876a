"""The shuffle indices of Megatron's ``GPTDataset``, one folder per corpus and epoch.

Built before torch.distributed starts, because afterwards Megatron lets only global rank 0 build
them, and the other nodes may not see its disk. Each epoch is built under a private name and
renamed, so a folder with the right name is complete, and processes without a common lock at worst
do the same work twice.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from distributed_lm.config import RunConfig
from distributed_lm.data.cache_files import building, load_plain
from distributed_lm.data.corpora import Corpus
from distributed_lm.data.locks import lock_file
from distributed_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

# Longer than the attribute caches of network file systems, which hide new files for a while.
_VISIBLE_WITHIN_SECONDS = 5.0


class EpochIndex:
    """Opens the blocks of one corpus in the shuffled order of any one epoch.

    Args:
        corpus: the data set.
        config: gives the block length, the seed and the cache folder.
    """

    def __init__(self, corpus: Corpus, config: RunConfig) -> None:
        self._corpus = corpus
        self._block_length = config.data.block_size
        self._seed = config.seed
        self._cache = cache_folder(corpus.folder, config)
        self._prefix = str(corpus.folder / "train")
        self._tokens: IndexedDataset | None = None
        self.blocks_per_epoch = corpus.blocks_per_epoch(self._block_length)
        if self.blocks_per_epoch < 1:
            raise DataError(
                f"{corpus.folder}: its train split has {corpus.train.tokens} tokens, fewer than "
                f"one block of data.block_length={self._block_length} and a label; set a smaller "
                "data.block_length or prepare more text"
            )

    def path(self, epoch: int) -> Path:
        """Folder of one epoch's indices, named by all that they follow from.

        Megatron's version too: another may name or make them otherwise, and would then want to
        build them when only global rank 0 is allowed to.
        """
        parts = (
            self._corpus.manifest.corpus_hash[:16],
            f"block{self._block_length}",
            f"seed{self._seed}",
            f"megatron{version('megatron-core')}",
            f"epoch{epoch}",
        )
        return self._cache / "-".join(parts)

    def build(self, epoch: int) -> None:
        """Make one epoch's indices, unless they are there."""
        if not self.path(epoch).is_dir():
            with building(self.path(epoch)) as temporary:
                self._dataset(epoch, temporary)

    def open(self, epoch: int) -> "GPTDataset":
        """One epoch of shuffled blocks.

        Raises:
            DataError: if its indices are missing, damaged, or hold anything but numbers.
        """
        folder = self.path(epoch)
        # Megatron loads the indices with allow_pickle=True: a foreign file could run code.
        for array in ("document_index", "sample_index", "shuffle_index"):
            load_plain(self._only(folder, array))
        dataset = self._dataset(epoch, folder)
        if len(dataset) != self.blocks_per_epoch:
            raise DataError(
                f"{folder}: lists {len(dataset)} blocks, expected {self.blocks_per_epoch}; "
                "remove this folder and start again"
            )
        return dataset

    def _dataset(self, epoch: int, folder: Path) -> "GPTDataset":
        from megatron.core.datasets.gpt_dataset import GPTDataset
        from megatron.core.datasets.utils import Split

        settings = self._settings(epoch, folder)
        if self._tokens is None:
            self._tokens = GPTDataset.build_low_level_dataset(self._prefix, settings)
        documents = np.arange(self._corpus.train.documents, dtype=np.int32)
        # The "path" only goes into the cache's name: the identity of the tokens, not their place.
        name = self._corpus.manifest.corpus_hash
        return GPTDataset(self._tokens, name, documents, None, Split.train, settings)

    def _settings(self, epoch: int, folder: Path) -> "GPTDatasetConfig":
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        manifest = self._corpus.manifest
        # All that Megatron asks of a tokenizer here.
        tokenizer = SimpleNamespace(
            vocab_size=manifest.vocab_size,
            eod=manifest.end_of_document,
            unique_identifiers={"fingerprint": manifest.tokenizer.fingerprint},
        )
        return GPTDatasetConfig(
            random_seed=self._seed + epoch,
            sequence_length=self._block_length,
            blend=([self._prefix], None),
            split="1,0,0",  # our splits are files: all of this one is for training
            path_to_cache=str(folder),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

    def _only(self, folder: Path, array: str) -> Path:
        """The file whose name ends in ``array``; Megatron puts a hash of its own before it."""
        files = sorted(folder.glob(f"*-{array}.npy"))
        return files[0] if len(files) == 1 else folder / f"{array}.npy"


def cache_folder(corpus: str | Path, config: RunConfig) -> Path:
    """Where the indices of the data set in folder ``corpus`` lie."""
    return Path(config.data.cache_path or Path(corpus) / "index_cache")


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache folder; errors of the disk become a sentence.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / ".lock"):
            yield
    except OSError as error:
        raise ConfigError(
            f"data.cache_path: the shuffle indices cannot be written to {folder} "
            f"({error.strerror or error}); set data.cache_path to a folder that can be written"
        ) from None


def check_shared_cache(
    config: RunConfig, is_first_rank: bool, barrier: Callable[[], None]
) -> str | None:
    """Whether this process sees the same cache folder as the first rank; all ranks call it.

    Not sharing it is no error, since each node then has built its own, but costs each node the
    work, and disk, again.

    Returns:
        None if it is shared, else a sentence that names the folder and this host.
    """
    folders = {cache_folder(entry.path, config) for entry in config.data.corpora}
    hidden = [
        folder for folder in sorted(folders) if not _is_shared(folder, is_first_rank, barrier)
    ]
    if not hidden:
        return None
    return (
        f"data.cache_path: {', '.join(map(str, hidden))} on {socket.gethostname()} is not the "
        "folder that the first rank sees, so this node builds its own shuffle indices; set "
        "data.cache_path to a folder on a shared file system to build them once"
    )


def _is_shared(folder: Path, is_first_rank: bool, barrier: Callable[[], None]) -> bool:
    token = folder / ".seen-by-first-rank"
    # A token left by a killed run must first be seen to go away, else it would vouch for us.
    if is_first_rank:
        with contextlib.suppress(OSError):
            token.unlink(missing_ok=True)
    barrier()
    stale = not is_first_rank and not _becomes(lambda: not token.exists())
    barrier()
    if is_first_rank:
        with contextlib.suppress(OSError):  # a read-only folder: see below
            token.touch()
    barrier()
    # Nothing was built, so nothing twice, in a folder that this process cannot write.
    trivial = is_first_rank or not os.access(folder, os.W_OK)
    seen = trivial or (not stale and _becomes(token.exists))
    barrier()
    if is_first_rank:
        with contextlib.suppress(OSError):
            token.unlink(missing_ok=True)
    return seen


def _becomes(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _VISIBLE_WITHIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
