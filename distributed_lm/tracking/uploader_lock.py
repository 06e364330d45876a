"""Who sends a run to W&B: one process at a time, the run itself or ``python -m launch sync``.

Two would number the same points, and W&B keeps one of two that have the same number.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from distributed_lm.run_lock import LOCK_FILE, Life, run_lock


@contextlib.contextmanager
def sole_uploader(run_dir: Path, is_training: bool) -> Iterator[None]:
    """Be the one that sends the run while the context is open.

    The run and a sync each have a lock of their own, take it, and only then look at the other's, so
    that never both go on.

    Args:
        is_training: this process holds the run folder, so what an earlier life has left of its own
            lock is a dead one's, even if its machine cannot be asked and it was touched just now.

    Raises:
        ConfigError: if a living process sends the run.
    """
    mine, others = run_dir / "wandb" / "sync", run_dir / "wandb" / "training"
    if is_training:
        mine, others = others, mine
        (mine / LOCK_FILE).unlink(missing_ok=True)
    # Without a job: nobody waits for the other, who may go on for days.
    with run_lock(mine, Life(None)):
        if (others / LOCK_FILE).exists():
            with run_lock(others, Life(None)):
                pass
        yield
