"""Tensors to and from torch's DCP files through ``megatron.core.dist_checkpointing``: the part that
knows how those two work inside. Collective.
"""

import ctypes
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from distributed_lm.checkpoint.agreement import SaveError, answering, on_every_rank
from distributed_lm.checkpoint.blocks import Block
from distributed_lm.checkpoint.fork_queue import ForkQueue, end_with
from distributed_lm.checkpoint.manifest import FileRecord
from distributed_lm.errors import CheckpointError
from distributed_lm.process_groups import ProcessGroups

# torch's own is a BaseException.
DCP_ERRORS = (Exception, CheckpointException)


class Writing:
    """A forked process of each rank that writes its share of some tensors.

    On a CPU copy-on-write memory is the snapshot; from a GPU the tensors are copied first.

    Raises:
        SaveError: with the reason, on all ranks.
    """

    def __init__(self, folder: Path, blocks: list[Block], groups: ProcessGroups) -> None:
        self._groups = groups
        snapshot = on_every_rank(groups, lambda: _sharded(blocks, _snapshot))
        self._records, results = on_every_rank(groups, lambda: (ForkQueue(), ForkQueue()))
        self._request = _plan(folder, snapshot, results, groups)
        rank = groups.process.rank
        self._writer = on_every_rank(
            groups, lambda: _fork_writer(self._request, folder, rank, self._records)
        )

    def is_running(self) -> bool:
        """Whether this rank's process still writes."""
        return bool(self._writer.is_alive())

    def kill(self) -> None:
        """End this rank's process, as far as the kernel lets go of it."""
        self._writer.kill()
        self._writer.join(1.0)

    def finish(self) -> dict[str, FileRecord]:
        """Write what describes the tensors, once the processes of all ranks have ended.

        Returns:
            Sizes and hashes of the files that hold them, of all ranks, on all ranks.

        Raises:
            SaveError: with the reason, on all ranks.
        """
        self._writer.join()
        on_every_rank(self._groups, self._check_exit)
        with _agreeing_on_disk_errors(self._groups):
            for finalize in self._request.finalize_fns:
                finalize()
        parts = self._groups.gather(_taken(self._records))
        return {name: record for part in parts for name, record in part.items()}

    def _check_exit(self) -> None:
        if self._writer.exitcode:
            rank = self._groups.process.rank
            raise SaveError(f"the writer of rank {rank} ended with code {self._writer.exitcode}")


def read(folder: Path, blocks: list[Block]) -> None:
    """Fill the blocks from the tensors of those names, whatever layout wrote them.

    Raises:
        CheckpointError: if torch can make nothing of the files.
    """
    try:
        loaded = dist_checkpointing.load(
            _sharded(blocks, _scratch), str(folder), validate_access_integrity=False
        )
    except DCP_ERRORS as error:  # whatever torch makes of damaged files
        raise CheckpointError(
            f"{folder}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "if it is damaged, remove it to use the one before"
        ) from error
    with torch.no_grad():
        for index, block in enumerate(blocks):
            block.values.copy_(loaded[str(index)])


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint that is known to execute nothing.

    Raises:
        CheckpointError: if its ``.metadata`` is damaged.
    """
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    except DCP_ERRORS as error:
        raise CheckpointError(
            f"{folder}/.metadata: damaged ({type(error).__name__}); remove the folder to use the "
            "checkpoint before"
        ) from error
    return {key: tuple(tensor.global_shape) for key, tensor in stored.items()}


def _sharded(blocks: list[Block], data_of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        str(index): ShardedTensor(
            key=block.key,
            data=data_of(block.values),
            dtype=block.values.dtype,
            local_shape=tuple(block.values.shape),
            global_shape=block.global_shape,
            global_offset=block.offset,
            axis_fragmentations=None,  # rectangles of any size, not a regular grid
            replica_id=block.replica,
        )
        for index, block in enumerate(blocks)
    }


def _snapshot(values: Tensor) -> Tensor:
    """The tensor on the host, in a storage of just its size (torch would copy any other).

    On a CPU that is the live memory itself: the fork makes it a snapshot.
    """
    if values.is_cuda:
        return values.detach().to("cpu")
    size = values.numel() * values.element_size()
    if size == 0:
        return values.detach().clone()
    memory = (ctypes.c_char * size).from_address(values.data_ptr())
    return torch.frombuffer(memory, dtype=values.dtype).view(values.shape)


def _scratch(values: Tensor) -> Tensor:
    return torch.empty(values.shape, dtype=values.dtype)


def _plan(folder: Path, snapshot: dict[str, Any], results: ForkQueue, groups: ProcessGroups) -> Any:
    """Megatron's and torch's agreement between the ranks on who writes what, not yet written."""
    filesystem_async._results_queue = results  # instead of a server process; see ForkQueue
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    with _agreeing_on_disk_errors(groups):
        return dist_checkpointing.save(
            snapshot, str(folder), sharded_strategy=strategy, async_sharded_save=True
        )


def _fork_writer(request: Any, folder: Path, rank: int, records: ForkQueue) -> Any:
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    writer = multiprocessing.get_context("fork").Process(
        target=_write, args=(request, arguments, folder, rank, records, os.getpid())
    )
    writer.start()
    return writer


def _write(
    request: Any, arguments: list[Any], folder: Path, rank: int, records: ForkQueue, parent: int
) -> None:
    """In the forked process: write this rank's files and hash them."""
    end_with(parent)
    # Megatron's writer forks once more.
    os.register_at_fork(after_in_child=partial(end_with, os.getpid()))
    os.nice(5)  # training goes first
    if request.async_fn is not None:
        request.async_fn(*arguments, **request.async_fn_kwargs)
    records.put({path.name: FileRecord.of(path) for path in folder.glob(f"__{rank}_*.distcp")})


# Where Megatron's first rank writes a file between two collectives: ``.metadata``,
# ``metadata.json``, up to 0.16 ``common.pt`` and later its own manifest. Raising there would leave
# the other ranks waiting for it.
WRITES_ALONE: tuple[tuple[Any, str], ...] = tuple(
    (owner, name)
    for owner, name in (
        (FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
        (getattr(common, "TorchCommonSaveStrategy", None), "save_common"),
        (serialization, "save_integrity_manifest"),
    )
    if hasattr(owner, name)
)


@contextmanager
def _agreeing_on_disk_errors(groups: ProcessGroups) -> Iterator[None]:
    """Have what goes wrong in ``WRITES_ALONE`` raised at the end, and on all ranks.

    Raises:
        SaveError: with the disk's reason, or what Megatron makes of a writer's.
    """
    errors: list[Exception] = []
    originals = [getattr(owner, name) for owner, name in WRITES_ALONE]
    for (owner, name), original in zip(WRITES_ALONE, originals, strict=True):
        setattr(owner, name, _deferring(original, errors))
    try:
        yield
    except DCP_ERRORS as error:  # a writer's, which Megatron raises on every rank
        raise SaveError(_innermost(error)) from error
    finally:
        for (owner, name), original in zip(WRITES_ALONE, originals, strict=True):
            setattr(owner, name, original)
    on_every_rank(groups, lambda: _raise_first(errors))


def _deferring(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., None]:
    def call(*arguments: Any, **keywords: Any) -> None:
        try:
            answering(partial(function, *arguments, **keywords))
        except (OSError, RuntimeError) as error:  # the latter is torch.save's
            errors.append(error)

    return call


def _raise_first(errors: list[Exception]) -> None:
    if errors:
        raise errors[0]


def _taken(records: ForkQueue) -> dict[str, FileRecord]:
    try:
        return dict(records.get_nowait())
    except queue.Empty:  # it had nothing to write
        return {}


def _innermost(error: BaseException) -> str:
    """The disk's own words, out of what torch and Megatron have wrapped around them."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error" in line:
            return line.strip()
    return lines[0] if lines else type(error).__name__
