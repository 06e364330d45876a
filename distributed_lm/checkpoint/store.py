"""Write and read checkpoints: tensors in ``dist_checkpointing`` (torch DCP) format, ``state.json``
for everything else, ``manifest.json`` last. Everything here is collective: whatever goes wrong on
one rank is an error on all of them.
"""

import ctypes
import json
import multiprocessing
import os
import queue
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from distributed_lm.checkpoint.blocks import Block
from distributed_lm.checkpoint.folders import (
    FORMAT_VERSION,
    STATE_FILE,
    checkpoint_path,
    publish,
    saved_steps,
    unfinished_path,
)
from distributed_lm.checkpoint.foreign import check_executes_nothing
from distributed_lm.checkpoint.fork_queue import ForkQueue, end_with_parent
from distributed_lm.checkpoint.manifest import (
    FileRecord,
    read_manifest,
    verify,
    write_manifest,
    write_synced,
)
from distributed_lm.errors import CheckpointError
from distributed_lm.process_groups import ProcessGroups

Result = TypeVar("Result")

# torch's own is a BaseException.
DCP_ERRORS = (Exception, CheckpointException)


class SaveError(CheckpointError):
    """A checkpoint could not be written; what was there before still is."""

    exit_code = 1


class Save:
    """A checkpoint on its way to the disk. Collective: every rank makes one and calls the same.

    Making it takes a snapshot and returns; a forked process of each rank writes the files (on a CPU
    copy-on-write memory is the snapshot, from a GPU the tensors are copied first). ``finish``
    publishes, once all ranks are done.

    Args:
        state: JSON values, taken from the first rank.

    Raises:
        SaveError: with the reason; nothing that looks like a checkpoint is left.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        blocks: list[Block],
        state: dict[str, Any],
        groups: ProcessGroups,
    ) -> None:
        self.run_dir = run_dir
        self.step = step
        self.groups = groups
        self.started = time.perf_counter()
        self.folder = unfinished_path(run_dir, step, groups.gather(secrets.token_hex(4))[0])
        needed = sum(groups.gather(_bytes_to_write(blocks)))
        content = {"format_version": FORMAT_VERSION, "step": step, **state}
        with self._cleaning_up():
            _on_first_rank(groups, lambda: _begin(self.folder, needed, content))
            snapshot = _on_every_rank(groups, lambda: _sharded(blocks, _snapshot))
            self.records, results = _on_every_rank(groups, lambda: (ForkQueue(), ForkQueue()))
            self.request = _plan(self.folder, snapshot, results)
            rank = groups.process.rank
            self.writer = _on_every_rank(
                groups, lambda: _fork_writer(self.request, self.folder, rank, self.records)
            )
        self.stall_seconds = time.perf_counter() - self.started
        """What the snapshot took of the training's time."""

    def is_written(self) -> bool:
        """Whether the writers of all ranks have ended. Cheap: one small all-reduce."""
        busy = torch.tensor(int(self.writer.is_alive()), device=self.groups.device)
        dist.all_reduce(busy)
        return int(busy) == 0

    def finish(self) -> dict[str, float]:
        """Wait for the writers, publish, and return the seconds that the parts took.

        Raises:
            SaveError: with the reason; nothing that looks like a checkpoint is left.
        """
        self.writer.join()
        written = time.perf_counter()
        with self._cleaning_up():
            _finalize(self.request, self.groups)
            records = _merged(self.groups.gather(_taken(self.records)))
            _on_first_rank(self.groups, lambda: write_manifest(self.folder, self.step, records))
            _on_first_rank(self.groups, lambda: publish(self.run_dir, self.step, self.folder))
        return {
            "save_stall_seconds": self.stall_seconds,
            "save_seconds": written - self.started,
            "finalize_seconds": time.perf_counter() - written,
        }

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if self.groups.is_first_rank:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise SaveError(f"step {self.step} not saved in {self.run_dir}: {error}") from None


def newest_verified(run_dir: Path, groups: ProcessGroups) -> tuple[int, list[str]]:
    """The step to continue from, with every byte of it compared with its manifest.

    The first rank says which checkpoints there are; the ranks share the reading.

    Returns:
        The step, 0 if the run has no checkpoint; and what was wrong with newer ones.

    Raises:
        CheckpointError: if there are checkpoints and none is whole, or some rank does not see them.
    """
    problems: list[str] = []
    steps: list[int] = groups.gather(saved_steps(run_dir))[0]
    for step in reversed(steps):
        problem = find_damage(run_dir, step, groups)
        if problem is None:
            return step, problems
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"{run_dir}: no checkpoint is whole: {'; '.join(problems)}; restore one, or remove the "
            "run folder to start over"
        )
    return 0, problems


def find_damage(run_dir: Path, step: int, groups: ProcessGroups) -> str | None:
    """What of a checkpoint is not as its manifest says, if anything; the ranks share the reading.

    Raises:
        CheckpointError: if some rank does not see the folder.
    """
    folder = checkpoint_path(run_dir, step)
    _check_visible(folder, groups)
    found = [problem for problem in groups.gather(_problem(folder, groups)) if problem]
    return found[0] if found else None


def load(run_dir: Path, step: int, blocks: list[Block], groups: ProcessGroups) -> None:
    """Fill the blocks from a checkpoint, whatever layout wrote it. Executes nothing found in it.

    Raises:
        CheckpointError: if a tensor is missing, has another shape, or cannot be read.
    """
    folder = checkpoint_path(run_dir, step)
    problems = groups.gather(_problem_of(lambda: _check_loadable(folder, blocks)))
    if any(problems):
        raise CheckpointError(next(problem for problem in problems if problem))
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


def _on_every_rank(groups: ProcessGroups, action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank; what goes wrong on one is a SaveError on all of them."""
    results: list[Result] = []
    found = groups.gather(_problem_of(lambda: results.append(action())))
    if any(found):
        raise SaveError(next(problem for problem in found if problem))
    return results[0]


def _on_first_rank(groups: ProcessGroups, action: Callable[[], Any]) -> None:
    """The same for what the first rank does alone."""
    _on_every_rank(groups, action if groups.is_first_rank else lambda: None)


def _problem_of(action: Callable[[], Any]) -> str | None:
    """What the disk, the memory or a check has to say against ``action``, having tried it."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _begin(folder: Path, needed: int, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed:,} bytes needed, {free:,} free on that disk")
    write_synced(folder / STATE_FILE, json.dumps(content, indent=1))


def _plan(folder: Path, snapshot: dict[str, Any], results: ForkQueue) -> Any:
    """Megatron's and torch's agreement between the ranks on who writes what, not yet written."""
    filesystem_async._results_queue = results  # instead of a server process; see ForkQueue
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        return dist_checkpointing.save(
            snapshot, str(folder), sharded_strategy=strategy, async_sharded_save=True
        )
    except DCP_ERRORS as error:
        raise SaveError(_innermost(error)) from error


def _fork_writer(request: Any, folder: Path, rank: int, records: ForkQueue) -> Any:
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    writer = multiprocessing.get_context("fork").Process(
        target=_write, args=(request, arguments, folder, rank, records)
    )
    writer.start()
    return writer


def _write(request: Any, arguments: list[Any], folder: Path, rank: int, records: ForkQueue) -> None:
    """In the forked process: write this rank's files and hash them."""
    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)  # Megatron's writer forks once more
    os.nice(5)  # training goes first
    if request.async_fn is not None:
        request.async_fn(*arguments, **request.async_fn_kwargs)
    records.put(_own_records(folder, rank))


def _finalize(request: Any, groups: ProcessGroups) -> None:
    """Exchange the writers' results and write ``.metadata``."""
    errors: list[OSError] = []
    try:
        with _deferring_disk_errors(errors):
            for finalize in request.finalize_fns:
                finalize()
    except DCP_ERRORS as error:  # a writer's, which Megatron raises on every rank
        raise SaveError(_innermost(error)) from error
    _on_every_rank(groups, lambda: _raise_first(errors))


@contextmanager
def _deferring_disk_errors(errors: list[OSError]) -> Iterator[None]:
    """Megatron's first rank writes ``.metadata`` and ``metadata.json`` between two collectives:
    raising there would leave the other ranks waiting for it. So it is raised later, on all."""
    finish, save_config = FileSystemWriterAsync.finish, serialization.save_config

    def deferred(function: Callable[..., Any]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            try:
                function(*arguments, **keywords)
            except OSError as error:
                errors.append(error)

        return call

    FileSystemWriterAsync.finish = deferred(finish)
    serialization.save_config = deferred(save_config)
    try:
        yield
    finally:
        FileSystemWriterAsync.finish = finish
        serialization.save_config = save_config


def _raise_first(errors: list[OSError]) -> None:
    if errors:
        raise errors[0]


def _taken(records: ForkQueue) -> dict[str, FileRecord]:
    try:
        return dict(records.get_nowait())
    except queue.Empty:  # it had nothing to write, or could not hash: the first rank then does
        return {}


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


def _innermost(error: BaseException) -> str:
    """The disk's own words, out of what torch and Megatron have wrapped around them."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "Error" in line:
            return line.strip()
    return lines[0] if lines else type(error).__name__


def _own_records(folder: Path, rank: int) -> dict[str, FileRecord]:
    """Sizes and hashes of the files that this rank has written (DCP's ``__RANK_N.distcp``)."""
    return {path.name: FileRecord.of(path) for path in folder.glob(f"__{rank}_*.distcp")}


def _merged(records: list[dict[str, FileRecord]]) -> dict[str, FileRecord]:
    return {name: record for part in records for name, record in part.items()}


def _bytes_to_write(blocks: list[Block]) -> int:
    return sum(block.values.nbytes for block in blocks if not any(block.replica))


def _check_visible(folder: Path, groups: ProcessGroups) -> None:
    blind = groups.gather(None if folder.is_dir() else socket.gethostname())
    hosts = sorted({host for host in blind if host})
    if hosts:
        raise CheckpointError(
            f"{folder} cannot be seen on {', '.join(hosts)}; set output_dir to a folder that all "
            "nodes share"
        )


def _problem(folder: Path, groups: ProcessGroups) -> str | None:
    try:
        names = sorted(read_manifest(folder))
        verify(folder, names[groups.process.rank :: groups.process.world_size])
    except CheckpointError as error:
        return str(error)
    return None


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


def _check_loadable(folder: Path, blocks: list[Block]) -> None:
    """Raises CheckpointError if a file would execute something or a tensor is not as asked for."""
    check_executes_nothing(folder)
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    except DCP_ERRORS as error:
        raise CheckpointError(
            f"{folder}/.metadata: damaged ({type(error).__name__}); remove the folder to use the "
            "checkpoint before"
        ) from error
    for block in blocks:
        if block.key not in stored:
            raise CheckpointError(
                f"{folder}: holds no tensor {block.key}; the config asks for another model than "
                "the one saved here"
            )
        shape = tuple(stored[block.key].global_shape)
        if shape != block.global_shape:
            raise CheckpointError(
                f"{folder}: {block.key} has shape {shape}, the config asks for "
                f"{block.global_shape}; use the config in the run folder"
            )
