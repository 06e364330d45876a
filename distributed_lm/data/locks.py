"""A lock file, so that processes beside each other do a piece of work once."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the system lets go of it if the process is killed.

    Only saves double work: some network file systems have no locks, and there every process goes
    on at once. So what is done under it must also be right without it (write elsewhere, rename).
    """
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
