"""One rank as a child process: its output, its signals, its end."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from distributed_lm.processes import die_with_parent
from launch.failure import Failure

# How a rank's last words begin. Rank 0's are kept off the terminal until it is known whether it
# was the rank at fault: its traceback about a lost peer would bury the message that matters.
LAST_WORDS = re.compile(
    rb"^(\[rank\d+\]: ?)?(Traceback \(most recent call last\):|error: )", re.MULTILINE
)
# A rank that lives on this long after such a line had only logged it: show it after all. On a busy
# machine a failed rank with its libraries takes many seconds to end.
HOLD_SECONDS = 20.0
TAIL_BYTES = 64 * 1024


class RankProcess:
    """Starts one rank. Rank 0 keeps the terminal; the others write to their log file only.

    Every rank has a session of its own, so that Ctrl-C reaches it once, from the launcher, and
    not a second time from the terminal.
    """

    def __init__(
        self, rank: int, command_line: Sequence[str], environment: Mapping[str, str], log_path: Path
    ) -> None:
        self.rank = rank
        self.log_path = log_path
        self.stopped_by_us = False
        self._ended_at: float | None = None
        self._relay: Relay | None = None
        self._log = log_path.open("ab", buffering=0)
        self._log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} starts\n".encode())
        self._log_start = self._log.tell()
        self._process = subprocess.Popen(
            command_line,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else self._log,
            stderr=subprocess.PIPE if rank == 0 else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )

    @property
    def failed(self) -> bool:
        return self._process.returncode not in (None, 0)

    def start_relay(self) -> None:
        """Begin to copy standard error to the terminal and the log file."""
        assert self._process.stderr is not None
        self._relay = Relay(self._process.stderr, self._log)

    def poll(self) -> int | None:
        """Return code once the process has ended, else None; notes the time of the end."""
        return_code = self._process.poll()
        if return_code is not None and self._ended_at is None:
            self._ended_at = time.monotonic()
        return return_code

    def send_signal(self, signal_number: int) -> None:
        """Pass on a signal; one that comes too late is lost."""
        if self._process.poll() is None:
            self._process.send_signal(signal_number)

    def terminate(self) -> None:
        self.stopped_by_us = True
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process, if it still runs, and everything it started and left behind."""
        if self._process.poll() is None:
            self.stopped_by_us = True
        with contextlib.suppress(ProcessLookupError):  # none of its group is left
            os.killpg(self._process.pid, signal.SIGKILL)

    def finish(self) -> None:
        """Wait for the end of the process and of its output."""
        self._process.wait()
        self.poll()
        if self._relay is not None:
            self._relay.finish()
        self._log.close()

    def release_held_output(self) -> None:
        """Show what looked like last words and were not."""
        if self._relay is not None:
            self._relay.release()

    def failure(self) -> Failure:
        """How this rank ended, with the end of what it wrote in this life."""
        with self.log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            output = log.read().decode(errors="replace")
        assert self._ended_at is not None
        return Failure(self.rank, self._process.returncode, self._ended_at, output, self.log_path)


class Relay:
    """Copies a rank's standard error to the log and the terminal, holding back last words."""

    def __init__(self, source: IO[bytes], log: IO[bytes]) -> None:
        self._source = source
        self._log = log
        self._held = b""
        self._held_since = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all is copied; a grandchild that keeps the pipe open is not waited for."""
        self._ending.set()
        self._thread.join(timeout=5.0)

    def release(self) -> None:
        held, self._held = self._held, b""
        self._show(held)

    def _copy(self) -> None:
        descriptor = self._source.fileno()
        while True:
            readable, _, _ = select.select([descriptor], [], [], 0.2)
            if readable:
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    return
                self._log.write(chunk)
                self._sort(chunk)
            elif self._ending.is_set():
                return
            if self._held and time.monotonic() - self._held_since > HOLD_SECONDS:
                self.release()

    def _sort(self, chunk: bytes) -> None:
        """Show what is before the last words, keep the rest."""
        if self._held:
            self._held += chunk
            return
        match = LAST_WORDS.search(chunk)
        border = match.start() if match else len(chunk)
        self._show(chunk[:border])
        if match:
            self._held, self._held_since = chunk[border:], time.monotonic()

    @staticmethod
    def _show(text: bytes) -> None:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()
