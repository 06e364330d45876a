"""Write and read checkpoints: tensors in ``dist_checkpointing`` (torch DCP) format, ``state.json``
for everything else, ``manifest.json`` last. Everything here is collective: whatever goes wrong on
one rank is an error on all of them.
"""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
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
from distributed_lm.checkpoint.fork_queue import ForkQueue
from distributed_lm.checkpoint.manifest import (
    FileRecord,
    read_manifest,
    verify,
    write_manifest,
    write_synced,
)
from distributed_lm.errors import CheckpointError
from distributed_lm.process_groups import ProcessGroups

# torch's own is a BaseException.
DCP_ERRORS = (Exception, CheckpointException)


class SaveError(CheckpointError):
    """A checkpoint could not be written; what was there before still is."""

    exit_code = 1


def save(
    run_dir: Path, step: int, blocks: list[Block], state: dict[str, Any], groups: ProcessGroups
) -> Path:
    """Write one checkpoint and publish it.

    Args:
        state: JSON values, taken from the first rank.

    Returns:
        The folder.

    Raises:
        SaveError: with the reason; nothing that looks like a checkpoint is left.
    """
    folder = unfinished_path(run_dir, step)
    needed = sum(groups.gather(_bytes_to_write(blocks)))
    content = {"format_version": FORMAT_VERSION, "step": step, **state}
    try:
        _on_first_rank(groups, lambda: _begin(folder, needed, content))
        _write_tensors(folder, blocks)
        records = _merged(groups.gather(_own_records(folder, groups.process.rank)))
        _on_first_rank(groups, lambda: write_manifest(folder, step, records))
        _on_first_rank(groups, lambda: publish(run_dir, step))
    except SaveError as error:
        if groups.is_first_rank:
            shutil.rmtree(folder, ignore_errors=True)
        raise SaveError(f"{folder}: not saved: {error}") from None
    return checkpoint_path(run_dir, step)


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


def load(run_dir: Path, step: int, blocks: list[Block]) -> None:
    """Fill the blocks from a checkpoint, whatever layout wrote it. Executes nothing found in it.

    Raises:
        CheckpointError: if a tensor is missing, has another shape, or cannot be read.
    """
    folder = checkpoint_path(run_dir, step)
    check_executes_nothing(folder)
    _check_shapes(folder, blocks)
    try:
        loaded = dist_checkpointing.load(
            _sharded(blocks), str(folder), validate_access_integrity=False
        )
    except DCP_ERRORS as error:  # whatever torch makes of damaged files
        raise CheckpointError(
            f"{folder}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "if it is damaged, remove it to use the one before"
        ) from error
    with torch.no_grad():
        for index, block in enumerate(blocks):
            block.values.copy_(loaded[str(index)])


def _on_first_rank(groups: ProcessGroups, action: Callable[[], Any]) -> None:
    """Run ``action`` on the first rank; what the disk refuses is a SaveError on every rank."""
    problem = None
    if groups.is_first_rank:
        try:
            action()
        except OSError as error:
            problem = f"{error.strerror or error}"
    problem = groups.gather(problem)[0]
    if problem is not None:
        raise SaveError(problem)


def _begin(folder: Path, needed: int, content: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed:,} bytes needed, {free:,} free on that disk")
    write_synced(folder / STATE_FILE, json.dumps(content, indent=1))


def _write_tensors(folder: Path, blocks: list[Block]) -> None:
    filesystem_async._results_queue = ForkQueue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        dist_checkpointing.save(_sharded(blocks), str(folder), sharded_strategy=strategy)
    except DCP_ERRORS as error:  # the writer's, which Megatron raises on every rank
        raise SaveError(_innermost(error)) from error


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


def _sharded(blocks: list[Block]) -> dict[str, Any]:
    return {
        str(index): ShardedTensor(
            key=block.key,
            data=block.values.detach().to("cpu", copy=True),  # a GPU has no room for another
            dtype=block.values.dtype,
            local_shape=tuple(block.values.shape),
            global_shape=block.global_shape,
            global_offset=block.offset,
            axis_fragmentations=None,  # rectangles of any size, not a regular grid
            replica_id=block.replica,
        )
        for index, block in enumerate(blocks)
    }


def _check_shapes(folder: Path, blocks: list[Block]) -> None:
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
