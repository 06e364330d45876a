"""Save, find and load checkpoints.

``RUN/checkpoints/step_00000200/`` holds the tensors in ``dist_checkpointing`` (torch DCP) format
and ``state.json`` with everything else: step, data position, ledger, config, versions. It is
written under a temporary name and renamed when whole.
"""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from distributed_lm.checkpoint.blocks import Block
from distributed_lm.checkpoint.fork_queue import ForkQueue
from distributed_lm.errors import CheckpointError
from distributed_lm.process_groups import ProcessGroups

STATE_FILE = "state.json"
FORMAT_VERSION = 1


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps with a whole checkpoint, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(folder.name[5:]) for folder in folders if (folder / STATE_FILE).is_file())


def newest_step(run_dir: Path, groups: ProcessGroups) -> int:
    """The step to continue from, 0 for none: as the first rank sees it. Collective.

    Raises:
        CheckpointError: on every rank, if some rank does not see that checkpoint.
    """
    step = groups.gather((saved_steps(run_dir) or [0])[-1])[0]
    sees_it = step == 0 or (checkpoint_path(run_dir, step) / STATE_FILE).is_file()
    blind = [host for host in groups.gather(None if sees_it else socket.gethostname()) if host]
    if blind:
        raise CheckpointError(
            f"{checkpoint_path(run_dir, step)} cannot be seen on {', '.join(sorted(set(blind)))}; "
            "set output_dir to a folder that all nodes share"
        )
    return int(step)


def save(run_dir: Path, step: int, blocks: list[Block], state: dict[str, Any]) -> Path:
    """Write one checkpoint and publish it. Collective: every rank gives its blocks.

    Args:
        state: JSON values, taken from rank 0.

    Returns:
        The folder. One that is already there stays as it is.
    """
    final = checkpoint_path(run_dir, step)
    temporary = final.with_name(f".{final.name}.tmp")
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    filesystem_async._results_queue = ForkQueue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(_sharded(blocks), str(temporary), sharded_strategy=strategy)
    if is_writer:
        content = {"format_version": FORMAT_VERSION, "step": step, **state}
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        if not (final / STATE_FILE).is_file():
            os.replace(temporary, final)
    dist.barrier()
    return final


def read_state(run_dir: Path, step: int) -> dict[str, Any]:
    """What ``save`` was given as ``state``.

    Raises:
        CheckpointError: if there is no such checkpoint, or another version of us wrote it.
    """
    path = checkpoint_path(run_dir, step) / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(map(str, saved_steps(run_dir))) or "none"
        raise CheckpointError(
            f"{path.parent}: no checkpoint of step {step}; there are: {known}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete the folder to use the one before"
        ) from None
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {state.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}; use the version of distributed_lm that wrote it"
        )
    return state


def load(run_dir: Path, step: int, blocks: list[Block]) -> None:
    """Fill the blocks from a checkpoint, whatever layout wrote it. Collective.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """
    folder = checkpoint_path(run_dir, step)
    _check_shapes(folder, blocks)
    try:
        loaded = dist_checkpointing.load(
            _sharded(blocks), str(folder), validate_access_integrity=False
        )
    except Exception as error:  # whatever torch makes of damaged files
        raise CheckpointError(
            f"{folder}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "if it is damaged, remove it to use the one before"
        ) from error
    with torch.no_grad():
        for index, block in enumerate(blocks):
            block.values.copy_(loaded[str(index)])


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
    except Exception as error:
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
