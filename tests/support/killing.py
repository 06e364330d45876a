"""Ranks that are killed, or whose disk fails them, in the middle of writing a checkpoint."""

import os
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distributed_lm.config import RunConfig
from launch.ports import free_port
from tests.support.ranks import CONTEXT, become_rank

# What a save does to the disk, as Python's audit events; fsync has none and is wrapped instead.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
# What an operation is part of: the snapshot, up to the fork; a forked writer's files; any fsync;
# what describes the tensors; the name; deleting an older checkpoint.
PHASES = ("copy", "write", "fsync", "manifest", "rename", "prune")


def on_disk(react: Callable[[str, str], None]) -> None:
    """From now on in this process, call ``react(event, path)`` before what is done to the disk.

    Of a rename it is told the new name.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            react(event, str(arguments[1] if event == "os.rename" else arguments[0]))

    sys.addaudithook(hook)


class Kill(NamedTuple):
    """When ranks die."""

    rank: int
    operation: int
    """Of that rank, counted from 1."""
    is_power_cut: bool = False
    """All ranks die, not that one alone."""


class Fuse:
    """Counts the operations under ``folder`` by phase, and kills at the fatal one.

    Args:
        fatal: the operation, counted from 1; None = none.
        victims: process ids of the ranks that die with this one.
    """

    def __init__(self, folder: Path, fatal: int | None, victims: Any) -> None:
        self.folder = str(folder)
        self.fatal = fatal
        self.victims = victims
        self.main = os.getpid()
        self.phase = "copy"
        # Shared with the forked writer, whose operations count too.
        self.count = CONTEXT.Value("i", 0)
        self.seen = CONTEXT.Array("b", 10_000, lock=False)
        self.real_fsync = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._audit)
        os.register_at_fork(
            before=self._tick, after_in_parent=self._forked, after_in_child=self._born
        )

    def phases(self) -> list[str]:
        """Of each operation so far."""
        return [PHASES[index] for index in self.seen[: self.count.value]]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.folder not in _path(event, arguments):
            return
        if os.getpid() == self.main:
            self._follow(event, arguments)
        self._tick()

    def _follow(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Where in a save the rank itself is."""
        if event == "os.mkdir":
            self.phase = "copy"
        elif event == "shutil.rmtree":
            self.phase = "prune"
        elif event == "os.rename":
            name = Path(arguments[1]).name
            if ".removed-" in name:
                self.phase = "prune"
            elif name.startswith("step_"):
                self.phase = "rename"

    def _forked(self) -> None:
        if os.getpid() == self.main:
            self.phase = "manifest"  # what comes next

    def _born(self) -> None:
        self.phase = "write"
        self._tick()

    def _fsync(self, descriptor: Any) -> None:
        self._tick("fsync")
        self.real_fsync(descriptor)

    def _tick(self, phase: str | None = None) -> None:
        with self.count.get_lock():
            self.seen[self.count.value] = PHASES.index(phase or self.phase)
            self.count.value += 1
            if self.count.value == self.fatal:
                # Its own rank last: killing that kills the writer that may be running this.
                for victim in sorted(self.victims, key=self.main.__eq__):
                    os.kill(victim, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)


def _path(event: str, arguments: tuple[Any, ...]) -> str:
    """Of the file; ``shutil.rmtree`` names those in its folder relative to a descriptor of it."""
    descriptor = arguments[1] if event in ("os.remove", "os.rmdir") else -1
    folder = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor >= 0 else ""
    return os.path.join(folder, str(arguments[0]))


def train_with_fuse(config: RunConfig) -> list[str]:
    """Train. Returns the phase of each operation that the saves of this rank made."""
    from distributed_lm.train import train

    fuse = Fuse(config.run_dir / "checkpoints", fatal=None, victims=())
    train(config)
    return fuse.phases()


def train_and_watch_syncs(config: RunConfig) -> tuple[int, list[str]]:
    """Train. Returns how many checkpoints got their names, and what was not on disk in time.

    SIGKILL leaves what the kernel holds; a power cut does not. So each file must have been synced
    before the rename, and the rename itself before the save is said to be done.
    """
    from distributed_lm.train import train

    checkpoints = config.run_dir / "checkpoints"
    # Inodes, by this process and its forked writers, which share the open file.
    synced, real_fsync = tempfile.TemporaryFile(buffering=0), os.fsync  # noqa: SIM115
    late: list[str] = []
    renames: list[int] = []

    def inodes() -> list[int]:
        content = os.pread(synced.fileno(), 1_000_000, 0)
        return [number for (number,) in struct.iter_unpack("Q", content)]

    def fsync(descriptor: Any) -> None:
        real_fsync(descriptor)
        synced.write(struct.pack("Q", os.stat(descriptor).st_ino))

    def check(event: str, path: str) -> None:
        if event == "os.rename" and Path(path).parent.name == "checkpoints":
            [unfinished] = checkpoints.glob(f".{Path(path).name}.*.tmp")
            files = [unfinished, *unfinished.iterdir()]
            late.extend(file.name for file in files if file.stat().st_ino not in inodes())
            renames.append(len(inodes()))

    os.fsync = fsync
    on_disk(check)
    train(config)
    if checkpoints.stat().st_ino not in inodes()[renames[-1] :]:
        late.append("the last name")
    return len(renames), late


def _dying_main(
    rank: int, world_size: int, port: int, config: RunConfig, kill: Kill, processes: Any, seen: Any
) -> None:
    from distributed_lm.train import train

    become_rank(rank, world_size, port)
    processes[rank] = os.getpid()  # before the ranks first meet, so in time
    victims = processes if kill.is_power_cut else [os.getpid()]
    fatal = kill.operation if rank == kill.rank else None
    fuse = Fuse(config.run_dir / "checkpoints", fatal, victims)
    if fatal is not None:
        fuse.seen = seen
    train(config)
    os._exit(0)


def run_to_death(config: RunConfig, world_size: int, kill: Kill) -> str | None:
    """Start ranks of which one dies, or all at once; end the others as a launcher would.

    Returns:
        The phase of the fatal operation; None if nobody died.
    """
    port = free_port()
    seen = CONTEXT.Array("b", 10_000, lock=False)
    shared = (config, kill, CONTEXT.Array("i", world_size, lock=False), seen)
    processes = [
        CONTEXT.Process(target=_dying_main, args=(rank, world_size, port, *shared))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    dying = processes if kill.is_power_cut else [processes[kill.rank]]
    for process in dying:
        process.join(timeout=60)
    died = all(process.exitcode == -signal.SIGKILL for process in dying)
    for process in processes:
        if not died:
            process.join(timeout=60)
        process.kill()
        process.join()
    return PHASES[seen[kill.operation - 1]] if died else None
