"""Ranks that are killed in the middle of writing a checkpoint."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from distributed_lm.config import RunConfig
from tests.support.ranks import CONTEXT, become_rank, free_port

# What a save does to the disk, as Python's audit events; fsync has none and is wrapped instead.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


class Fuse:
    """Counts the operations under ``folder`` and kills this rank at the ``fatal``-th."""

    def __init__(self, folder: Path, fatal: int | None) -> None:
        self.folder = str(folder)
        self.fatal = fatal
        self.main = os.getpid()
        # Shared with the forked writer, whose operations count too.
        self.count = CONTEXT.Value("i", 0)
        self.real_fsync = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and self.folder in str(arguments[0]):
            self._tick()

    def _fsync(self, descriptor: Any) -> None:
        self._tick()
        self.real_fsync(descriptor)

    def _tick(self) -> None:
        with self.count.get_lock():
            self.count.value += 1
            if self.count.value == self.fatal:
                os.kill(self.main, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)


def train_with_fuse(config: RunConfig, fatal_rank: int | None, fatal: int | None) -> int:
    """Train; on ``fatal_rank`` die at operation ``fatal``. Returns the operations counted."""
    from distributed_lm.train import train

    is_fatal = fatal_rank is not None and int(os.environ["RANK"]) == fatal_rank
    fuse = Fuse(config.run_dir / "checkpoints", fatal if is_fatal else None)
    train(config)
    return int(fuse.count.value)


def _dying_main(rank: int, world_size: int, port: int, arguments: tuple[Any, ...]) -> None:
    become_rank(rank, world_size, port)
    train_with_fuse(*arguments)
    os._exit(0)


def run_to_death(config: RunConfig, world_size: int, fatal_rank: int, fatal: int) -> bool:
    """Start ranks of which one dies; end the others as a launcher would. True if it did die."""
    port = free_port()
    processes = [
        CONTEXT.Process(
            target=_dying_main, args=(rank, world_size, port, (config, fatal_rank, fatal))
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    processes[fatal_rank].join(timeout=60)
    died = processes[fatal_rank].exitcode == -signal.SIGKILL
    for process in processes:
        if not died:
            process.join(timeout=60)
        process.kill()
        process.join()
    return died
