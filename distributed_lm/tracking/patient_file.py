"""A log file on a disk that may be full, gone, or hanging for a while: nobody waits for it."""

import os
import sys
import threading
import time
from collections import deque
from pathlib import Path

from distributed_lm.errors import TrainingError

# What a line may hold up its writer; usually it is on disk when ``write`` returns.
PATIENCE_SECONDS = 2.0
RETRY_SECONDS = 1.0
CLOSE_SECONDS = 60.0
MAX_WAITING_LINES = 100_000


class PatientFile:
    """Appends lines from a thread, in order; what the disk does not take is kept and tried again.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Unbuffered and appending: one write per line, which a kill cannot cut in Python.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting: deque[bytes] = deque()
        self._problem: str | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Append a line, now or when the disk takes it.

        Raises:
            TrainingError: if more lines wait than memory should hold.
        """
        with self._changed:
            if len(self._waiting) >= MAX_WAITING_LINES:
                raise TrainingError(self._describe())
            self._waiting.append(line)
            self._changed.notify_all()
            if self._problem is not None:
                return
            self._changed.wait_for(lambda: not self._waiting or self._problem, PATIENCE_SECONDS)
            if self._waiting:
                self._problem = self._problem or "it does not answer"
                sys.stderr.write(f"{self._describe()}; going on\n")

    def close(self) -> None:
        """Wait for the lines that are not on disk yet, for a minute at most. Idempotent.

        Raises:
            TrainingError: if some never got there.
        """
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if self._waiting:
            raise TrainingError(self._describe())
        os.close(self._descriptor)

    def _work(self) -> None:
        give_up = float("inf")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                line = self._waiting[0]
                if self._closing:
                    give_up = min(give_up, time.monotonic() + CLOSE_SECONDS)
            problem = self._append(line)
            if problem is not None and time.monotonic() > give_up:
                return

    def _append(self, line: bytes) -> str | None:
        """Write a line, or as much of it as the disk takes. Returns its excuse."""
        try:
            written = os.write(self._descriptor, line)
            problem = None
        except OSError as error:
            written, problem = 0, error.strerror or str(error)
        with self._changed:
            if written == len(line):
                self._waiting.popleft()
            else:
                self._waiting[0] = line[written:]
            self._problem = problem
            self._changed.notify_all()
            if problem is not None:
                self._changed.wait(RETRY_SECONDS)
        return problem

    def _describe(self) -> str:
        return f"{self._path}: {len(self._waiting)} lines cannot be written ({self._problem})"
