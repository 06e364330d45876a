"""Where checkpoints lie and what is kept. Imports no torch.

``RUN/checkpoints/step_00000200/`` exists only whole: it is written as ``.step_00000200.tmp`` and
renamed when everything, the manifest last, is on disk. Deleting renames first, too.
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from distributed_lm.checkpoint.manifest import STATE_FILE, sync_file
from distributed_lm.config import CheckpointConfig, RunConfig
from distributed_lm.errors import CheckpointError

FORMAT_VERSION = 1
REPLACED = "replaced"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def unfinished_path(run_dir: Path, step: int, attempt: str) -> Path:
    """Where a checkpoint is before it is published and after it is given up.

    Args:
        attempt: another one each time, so that a writer that outlives a killed run for a moment
            cannot reach into the next one's files.
    """
    return run_dir / "checkpoints" / f".step_{step:08d}.{attempt}.tmp"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps with a published checkpoint, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(folder.name[5:]) for folder in folders if folder.is_dir())


def has_initial_weights(run_dir: Path) -> bool:
    """Whether a run starts from an imported model, which is its checkpoint of step 0."""
    return checkpoint_path(run_dir, 0).is_dir()


def leftovers(run_dir: Path) -> list[Path]:
    """What a killed save or deletion has left."""
    return sorted((run_dir / "checkpoints").glob(".step_*.tmp"))


def publish(run_dir: Path, step: int, unfinished: Path) -> None:
    """Give a finished checkpoint its name; after this it survives a power cut.

    A checkpoint of that step that is there already (a run rewound past it) is replaced.
    """
    final = checkpoint_path(run_dir, step)
    if final.exists():
        replaced = unfinished_path(run_dir, step, REPLACED)
        os.rename(final, replaced)
        try:
            os.rename(unfinished, final)
        except OSError:
            os.rename(replaced, final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)  # if not now, then at the next start
    else:
        os.rename(unfinished, final)
    try:
        sync_file(final.parent)
        sync_file(run_dir)
    except OSError:
        os.rename(final, unfinished)
        raise
    with contextlib.suppress(OSError):  # the folder of all runs, which may be somebody else's
        sync_file(run_dir.parent)


def restore_replaced(run_dir: Path) -> list[str]:
    """Undo the first half of a replacement whose second half a kill has prevented.

    Returns:
        What a reader of the log should know.
    """
    notes = []
    for folder in leftovers(run_dir):
        final = folder.with_name(folder.name.removeprefix(".").split(".")[0])
        if folder.name.endswith(f".{REPLACED}.tmp") and not final.exists():
            os.rename(folder, final)
            notes.append(f"{final}: restored; the run was killed while replacing it")
    return notes


def remove(run_dir: Path, step: int) -> None:
    """Delete one checkpoint so that a kill leaves nothing that looks like one."""
    discard(run_dir, step, checkpoint_path(run_dir, step))


def discard(run_dir: Path, step: int, folder: Path) -> None:
    """Delete a folder, having renamed it, so that nobody still at work can publish what is left."""
    removed = unfinished_path(run_dir, step, f"removed-{time.time_ns()}")
    os.rename(folder, removed)
    shutil.rmtree(removed)


def prune(config: RunConfig, newest_whole: int) -> list[str]:
    """Delete what retention gives up, now that a newer checkpoint is known to be whole.

    Returns:
        What could not be deleted, and why.
    """
    problems = []
    for step in superseded(saved_steps(config.run_dir), config.checkpoint, newest_whole):
        try:
            remove(config.run_dir, step)
        except FileNotFoundError:
            continue  # a removal given up on, as the disk was silent, came through after all
        except OSError as error:
            path = checkpoint_path(config.run_dir, step)
            problems.append(f"{path}: not deleted ({error.strerror})")
    return problems


def superseded(steps: list[int], checkpoint: CheckpointConfig, newest_whole: int) -> list[int]:
    """Which of the published ``steps`` (oldest first) retention gives up.

    Never ``newest_whole``; and what is newer than that is damaged, and neither counts nor goes.
    """
    if checkpoint.keep_last == 0:
        return []
    older = [step for step in steps if step <= newest_whole]
    kept = set(older[-checkpoint.keep_last :])
    if checkpoint.keep_every:
        kept |= {step for step in older if step % checkpoint.keep_every == 0}
    return [step for step in older if step not in kept]


def read_state(run_dir: Path, step: int) -> dict[str, Any]:
    """What is in a checkpoint beside tensors.

    Raises:
        CheckpointError: if there is no such checkpoint, or another version of us wrote it.
    """
    path = checkpoint_path(run_dir, step) / STATE_FILE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = state.get("format_version")
    except FileNotFoundError:
        known = ", ".join(map(str, saved_steps(run_dir))) or "none"
        raise CheckpointError(
            f"{path.parent}: no checkpoint of step {step}; there are: {known}"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); remove the folder to use the one before"
        ) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}; use the "
            "version of distributed_lm that wrote it"
        )
    return state
