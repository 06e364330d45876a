"""What runs in the rehearsal's processes. Each function imports the engines when it runs, so that
the process that asks for it need not."""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

from distributed_lm.config import RunConfig
from distributed_lm.errors import UserError
from distributed_lm.rehearsal.views import RankView, Script


def begin() -> None:
    """Once in every process."""
    import torch

    from distributed_lm.rehearsal import preload  # noqa: F401

    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    torch.set_num_threads(1)
    # What is imported stays: the engines ask for many collections, and a third of the time would
    # go into looking at it again.
    gc.freeze()


def _end_with_parent() -> None:
    """This process is the fork server's child, and would outlive a killed parent with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def prepare(config: RunConfig, world_size: int) -> Script:
    """``world.prepare``."""
    from distributed_lm.rehearsal.world import prepare as run

    return run(config, world_size)


def build(script: Script, rank: int) -> RankView | str:
    """One rank, or a sentence on what kept it from being built.

    Raises:
        UserError: if that was the user's mistake.
    """
    from distributed_lm.rehearsal.world import build_view

    try:
        return build_view(script, rank)
    except UserError:
        raise
    except Exception as error:  # our own and the engines' assertions find broken layouts, too
        lines = str(error).strip().splitlines() or [""]
        return f"rank {rank}: cannot be built: {type(error).__name__}: {lines[0]}"
