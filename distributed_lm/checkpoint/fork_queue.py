"""What a forked process needs to live with its parent.

A result goes back without a third process.

Megatron's writer hands its results over through a ``multiprocessing.Manager``: a server process of
200 MB per rank that outlives a rank that is killed. An unnamed file, whose descriptor a fork
inherits, does the same and goes away with its last holder.
"""

import ctypes
import os
import pickle
import queue
import signal
import tempfile
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """In a forked process on Linux: be killed when the parent dies, however it dies.

    Args:
        parent: its process id, taken before the fork.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os.kill(os.getpid(), signal.SIGKILL)


class ForkQueue:
    """Holds at most one value: put by the child, taken by the parent once the child has ended."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the queue is)

    def put(self, value: Any) -> None:
        self._file.seek(0)
        self._file.truncate()
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Raises queue.Empty if there is nothing."""
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        if not content:
            raise queue.Empty
        return pickle.loads(content)
