"""``distributed-lm checkpoints``: list, verify and prune a run's checkpoints. Imports no torch."""

import time
from enum import Enum
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distributed_lm.checkpoint.folders import (
    checkpoint_path,
    leftovers,
    read_state,
    remove,
    saved_steps,
    superseded,
)
from distributed_lm.checkpoint.manifest import verify
from distributed_lm.config import load_config
from distributed_lm.errors import CheckpointError
from distributed_lm.run_lock import Life, RunLock, run_lock


class Action(str, Enum):
    """What to do with the checkpoints of a run."""

    list = "list"
    verify = "verify"
    prune = "prune"


def checkpoints(run_dir: Path, action: Action) -> None:
    """Print a table of a run's checkpoints; ``verify`` reads every byte of them, ``prune`` deletes
    what ``checkpoint.keep_last`` and ``keep_every`` of the run's config give up, and is refused
    while the run is at work, which deletes, too.

    Raises:
        CheckpointError: if there are none, or verifying found damage.
        ConfigError: if the folder is to be pruned and is in use.
    """
    if not saved_steps(run_dir):
        raise CheckpointError(f"{run_dir}: no checkpoints in this folder; give a run folder")
    if action is Action.prune:
        # No life of a job, whatever shell this is: never a reason to take a training's lock.
        with run_lock(run_dir, Life(job=None)) as lock:
            _show(run_dir, action, lock)
    else:
        _show(run_dir, action, None)


def _show(run_dir: Path, action: Action, lock: RunLock | None) -> None:
    steps = saved_steps(run_dir)
    console = Console()
    damage = {step: _damage(checkpoint_path(run_dir, step), action) for step in steps}
    console.print(_table(run_dir, damage, action))
    for folder in leftovers(run_dir):
        console.print(f"{folder}: an unfinished save; the next start of the run removes it")
    if lock is not None:
        if lock.taken_over:
            console.print(lock.taken_over)
        _prune(run_dir, steps, lock, console)
    found = [problem for problem in damage.values() if problem]
    if found:
        raise CheckpointError("; ".join(found))


def _damage(folder: Path, action: Action) -> str | None:
    """What is wrong with a checkpoint; whole files are read only for ``verify``."""
    try:
        verify(folder, None if action is Action.verify else [])
    except CheckpointError as error:
        return str(error)
    return None


def _table(run_dir: Path, damage: dict[int, str | None], action: Action) -> Table:
    table = Table(title=str(run_dir), title_justify="left")
    for column in ("step", "size", "age", "layout", "verified"):
        table.add_column(column, justify="right" if column in ("step", "size") else "left")
    for step, problem in damage.items():
        folder = checkpoint_path(run_dir, step)
        size = sum(path.stat().st_size for path in folder.iterdir())
        verdict = "yes" if action is Action.verify else "not read"
        table.add_row(
            str(step),
            f"{size / 1e6:,.1f} MB",
            _age(time.time() - folder.stat().st_mtime),
            _layout(run_dir, step),
            "damaged" if problem else verdict,
        )
    return table


def _layout(run_dir: Path, step: int) -> str:
    try:
        return str(read_state(run_dir, step)["layout"])
    except (CheckpointError, KeyError):
        return "?"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _prune(run_dir: Path, steps: list[int], lock: RunLock, console: Console) -> None:
    """Retention, but the newest checkpoint that is whole stays, whatever is newer."""
    newest_whole = next(
        (
            step
            for step in reversed(steps)
            if _damage(checkpoint_path(run_dir, step), Action.verify) is None
        ),
        None,
    )
    if newest_whole is None:
        return
    for step in superseded(steps, load_config(run_dir).checkpoint, newest_whole):
        lock.check()
        remove(run_dir, step)
        console.print(f"removed step {step}")
