"""Write and read checkpoints: tensors in ``dist_checkpointing`` (torch DCP) format, ``state.json``
for everything else, ``manifest.json`` last. Everything here is collective: whatever goes wrong on
one rank is an error on all of them.
"""

import json
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distributed_lm.checkpoint import dcp
from distributed_lm.checkpoint.agreement import (
    SaveError,
    answering,
    on_first_rank,
    problem_of,
)
from distributed_lm.checkpoint.blocks import Block
from distributed_lm.checkpoint.folders import (
    FORMAT_VERSION,
    checkpoint_path,
    discard,
    publish,
    saved_steps,
    unfinished_path,
)
from distributed_lm.checkpoint.foreign import check_executes_nothing
from distributed_lm.checkpoint.manifest import (
    STATE_FILE,
    read_manifest,
    verify,
    write_manifest,
    write_synced,
)
from distributed_lm.errors import CheckpointError
from distributed_lm.process_groups import ProcessGroups


class Save:
    """A checkpoint on its way to the disk. Collective: every rank makes one and calls the same.

    Making it takes a snapshot and returns; a forked process of each rank writes the files.
    ``finish`` publishes, once all ranks are done.

    Args:
        state: JSON values, taken from the first rank.
        timeout_seconds: what the writers get.

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
        timeout_seconds: float,
    ) -> None:
        self.run_dir = run_dir
        self.step = step
        self.groups = groups
        self.started = time.perf_counter()
        self.timeout_seconds = timeout_seconds
        self.attempt: str = groups.gather(secrets.token_hex(4))[0]
        self.folder = unfinished_path(run_dir, step, self.attempt)
        needed = sum(groups.gather(_bytes_to_write(blocks)))
        content = {"format_version": FORMAT_VERSION, "save": self.attempt, "step": step, **state}
        with self._cleaning_up():
            on_first_rank(groups, lambda: _begin(self.folder, needed, content))
            self.writing = dcp.Writing(self.folder, blocks, groups)
        self.stall_seconds = time.perf_counter() - self.started
        """What the snapshot took of the training's time."""

    def is_writing(self) -> bool:
        """Whether the writers of some rank are at work, and within their time. Cheap: one small
        all-reduce."""
        expired = time.perf_counter() - self.started > self.timeout_seconds
        found = torch.tensor([self.writing.is_running(), expired], dtype=torch.int32)
        found = found.to(self.groups.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        busy, expired = found.tolist()
        return bool(busy and not expired)

    def finish(self) -> dict[str, float]:
        """Wait for the writers, publish, and return the seconds that the parts took.

        Raises:
            SaveError: with the reason; nothing that looks like a checkpoint is left.
        """
        waited_from = time.perf_counter()
        while self.is_writing():
            time.sleep(0.02)
        written = time.perf_counter()
        with self._cleaning_up():
            self._end_hung_writers()
            records = self.writing.finish()
            on_first_rank(
                self.groups, lambda: write_manifest(self.folder, self.step, records, self.attempt)
            )
            on_first_rank(self.groups, lambda: publish(self.run_dir, self.step, self.folder))
        published = time.perf_counter()
        return {
            "save_stall_seconds": self.stall_seconds + published - waited_from,
            "save_seconds": written - self.started,
            "finalize_seconds": published - written,
        }

    def _end_hung_writers(self) -> None:
        hung = self.groups.gather(self.writing.is_running())
        if not any(hung):
            return
        self.writing.kill()
        raise SaveError(
            f"the writer of rank {hung.index(True)} was at it for more than "
            f"checkpoint.save_timeout_seconds={self.timeout_seconds:.0f}; is the file system slow "
            "or gone?"
        )

    def _discard(self) -> None:
        discard(self.run_dir, self.step, self.folder)

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if self.groups.is_first_rank:
                problem_of(lambda: answering(self._discard))
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
    problems = groups.gather(problem_of(lambda: _check_loadable(folder, blocks)))
    if any(problems):
        raise CheckpointError(next(problem for problem in problems if problem))
    dcp.read(folder, blocks)


def _begin(folder: Path, needed: int, content: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed:,} bytes needed, {free:,} free on that disk")
    write_synced(folder / STATE_FILE, json.dumps(content, indent=1))


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


def _check_loadable(folder: Path, blocks: list[Block]) -> None:
    """Raises CheckpointError if a file would execute something or a tensor is not as asked for."""
    check_executes_nothing(folder)
    stored = dcp.stored_shapes(folder)
    for block in blocks:
        if block.key not in stored:
            raise CheckpointError(
                f"{folder}: holds no tensor {block.key}; the config asks for another model than "
                "the one saved here"
            )
        if stored[block.key] != block.global_shape:
            raise CheckpointError(
                f"{folder}: {block.key} has shape {stored[block.key]}, the config asks for "
                f"{block.global_shape}; use the config in the run folder"
            )
