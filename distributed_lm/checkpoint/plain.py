"""Read a checkpoint in one process, without a process group or a model: whole tensors by name."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distributed_lm.checkpoint.foreign import check_executes_nothing
from distributed_lm.checkpoint.manifest import verify


class PlainCheckpoint:
    """The tensors of one checkpoint folder, read one at a time. Executes nothing found in it.

    Raises:
        CheckpointError: if the folder is not whole, or would import code when read.
    """

    def __init__(self, folder: Path) -> None:
        verify(folder)
        check_executes_nothing(folder)
        self._reader = dcp.FileSystemReader(folder)
        stored = self._reader.read_metadata().state_dict_metadata
        self._tensors = {
            name: entry
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> Tensor:
        """One whole tensor, whatever layout has cut it, on the CPU."""
        entry = self._tensors[name]
        values = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():  # torch notes that there is no process group: on purpose
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({name: values}, storage_reader=self._reader, no_dist=True)
        return values
