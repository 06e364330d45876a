"""Folders of arrays that are complete or absent, and loading them without running their code."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distributed_lm.errors import DataError


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A private folder that becomes ``target`` at the end, so that ``target`` is never half done.

    Right without any lock: of two processes that build the same, the second finds the first's.
    """
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_plain(file: Path) -> np.ndarray:
    """A memory map of an array of numbers.

    Raises:
        DataError: if the file is missing, damaged, or a pickle, which could run code when read.
    """
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{file}: not a readable array of numbers ({reason}); remove {file.parent} and start "
            "again, which builds it anew"
        ) from None
    return array
