"""A rank's line to the supervisor of its job, if it has one: a watchdog thread that lives on while
the main thread is blocked in a collective.

It says where the rank is, carries signals to the supervisor, writes the stacks of all threads when
asked, and takes part in the agreement on where to stop (``launch/supervisor/coordinator.py`` has
the protocol). A rank that is cut off from its supervisor ends itself: its job goes on elsewhere.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

TICK_SECONDS = 0.2
# Without a word from the supervisor, which pings every two seconds.
CUT_OFF_SECONDS = 30.0
# Longer than this between two looks at the line, and this process was suspended with its job.
AWAY_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# EX_TEMPFAIL of sysexits.h: stopped as asked; start again to go on.
EXIT_STOPPED = 75
EXIT_CUT_OFF = 76


class StopEvaluation(Exception):
    """All ranks have agreed to stop between two batches of an evaluation."""


class Supervision(Protocol):
    """What training and evaluation say and ask; ``Unsupervised`` where nobody listens."""

    def begin(self) -> None:
        """From here on there is something to save: no longer leave at once when asked to stop."""

    def phase(self, name: str) -> None:
        """Say what the rank does: ``start``, ``train``, ``evaluate`` or ``save``."""

    def should_stop(self) -> bool:
        """Pass a boundary, one that all ranks pass; whether they have agreed to stop at it."""

    def note(self, **values: Any) -> None:
        """Tell figures of the run."""

    def alert(self, kind: str, message: str) -> None:
        """Have somebody told, if the job was launched with an alert command or a mail address."""

    def worked(self, seconds: float) -> None:
        """Say how long this rank's own part of a step took, without waiting for others."""

    def leave(self, last_word: str) -> None:
        """Say how it ended: ``finished`` or ``stopped``."""


class Unsupervised:
    """A process that nobody watches over."""

    def begin(self) -> None: ...

    def phase(self, name: str) -> None: ...

    def should_stop(self) -> bool:
        return False

    def note(self, **values: Any) -> None: ...

    def alert(self, kind: str, message: str) -> None: ...

    def worked(self, seconds: float) -> None: ...

    def leave(self, last_word: str) -> None: ...


@dataclass(frozen=True)
class Address:
    """Where the supervisor listens, and what it wants to be shown."""

    host: str
    port: int
    token: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """From ``HOST:PORT:TOKEN``."""
        host, port, token = text.rsplit(":", 2)
        return cls(host, int(port), token)


def supervision(
    address: str | None, rank: int, dump: Callable[[], None] = lambda: None
) -> Supervision:
    """The line of this rank to the supervisor at ``address``; to be called on the main thread.

    Args:
        dump: writes down what else helps to understand a hang, beside the stacks.
    """
    return Unsupervised() if address is None else Watchdog(Address.parse(address), rank, dump)


class Watchdog:
    """The thread and what it shares with the main thread."""

    def __init__(self, address: Address, rank: int, dump: Callable[[], None]) -> None:
        self._extra_dump = dump
        self._lock = threading.Condition()
        self._boundary = 0
        self._hold_at: int | None = None
        self._stop_at: int | None = None
        self._begun = False
        self._news: dict[str, Any] = {"boundary": 0}
        self._said = threading.Event()
        self._socket = socket.create_connection((address.host, address.port), timeout=30.0)
        hello = {"token": address.token, "rank": rank, "host": socket.gethostname()}
        self._socket.sendall((json.dumps(hello) + "\n").encode())
        self._wakeup, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # The C handler writes the signal's number there at once; Python's own has nothing to do.
        for number in SIGNALS:
            signal.signal(number, _ignore)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self) -> None:
        with self._lock:
            self._lock.wait_for(lambda: self._hold_at is None)  # a commit ends us
            self._begun = True

    def phase(self, name: str) -> None:
        self._post(phase=name)

    def note(self, **values: Any) -> None:
        with self._lock:
            self._news.setdefault("notes", {}).update(values)

    def alert(self, kind: str, message: str) -> None:
        with self._lock:
            self._news.setdefault("alerts", []).append(f"{kind}: {message}")

    def worked(self, seconds: float) -> None:
        self._post(work_seconds=seconds)

    def should_stop(self) -> bool:
        with self._lock:
            self._boundary += 1
            self._news["boundary"] = self._boundary
            self._lock.wait_for(lambda: self._hold_at is None or self._hold_at > self._boundary)
            return self._stop_at == self._boundary

    def leave(self, last_word: str) -> None:
        self._said.clear()
        self._post(last_word=last_word)
        self._said.wait(5.0)

    def _post(self, **news: Any) -> None:
        with self._lock:
            self._news.update(news)

    def _watch(self) -> None:
        heard, buffer = time.monotonic(), b""
        try:
            while True:
                waited = time.monotonic()
                ready = self._wait()
                if (away := time.monotonic() - waited) > AWAY_SECONDS:
                    heard += away  # the supervisor was, too
                if self._wakeup in ready:
                    self._pass_on_signals()
                if self._socket in ready:
                    received = self._socket.recv(1 << 16)
                    if not received:
                        raise OSError("the supervisor has ended")
                    heard = time.monotonic()
                    *lines, buffer = (buffer + received).split(b"\n")
                    for line in lines:
                        self._obey(json.loads(line))
                self._send_news()
                if time.monotonic() - heard > CUT_OFF_SECONDS:
                    raise OSError(f"no word from the supervisor for {CUT_OFF_SECONDS:.0f} s")
        except OSError as error:
            self._end(f"cut off: {error}; leaving", EXIT_CUT_OFF)

    def _wait(self) -> list[Any]:
        sources: list[Any] = [self._socket, self._wakeup]
        return select.select(sources, [], [], TICK_SECONDS)[0]

    def _pass_on_signals(self) -> None:
        for number in os.read(self._wakeup, 64):
            if number in SIGNALS:  # Python's other handlers use the pipe too
                self._send({"signal": signal.Signals(number).name})

    def _send_news(self) -> None:
        with self._lock:
            news, self._news = self._news, {}
        if news:
            self._send(news)
        if "last_word" in news:
            self._said.set()

    def _send(self, message: dict[str, Any]) -> None:
        self._socket.settimeout(CUT_OFF_SECONDS)
        self._socket.sendall((json.dumps(message) + "\n").encode())

    def _obey(self, message: dict[str, Any]) -> None:
        if "ping" in message:
            self._send({"pong": True})
        elif "propose" in message:
            self._send({"promise": self._promise(message["propose"])})
        elif "commit" in message:
            self._commit(message["commit"], message["reason"])
        elif "abort" in message:
            with self._lock:
                self._hold_at = None
                self._lock.notify_all()
        elif "die" in message:
            self._end(message["die"], EXIT_CUT_OFF)
        elif "dump" in message:
            self._dump()

    def _dump(self) -> None:
        """Where every thread is, and with NCCL which collectives were the last."""
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(Exception):  # the watchdog must not die of it
            self._extra_dump()

    def _promise(self, boundary: int) -> bool:
        with self._lock:
            if self._begun and self._boundary >= boundary:
                return False
            self._hold_at = boundary
            return True

    def _commit(self, boundary: int, reason: str) -> None:
        with self._lock:
            if not self._begun:
                self._end(f"stopped before the first step: {reason}", EXIT_STOPPED)
            self._stop_at, self._hold_at = boundary, None
            self._lock.notify_all()

    def _end(self, why: str, code: int) -> None:
        """Leave at once, whatever the main thread is blocked in."""
        sys.stderr.write(f"supervision: {why}\n")
        sys.stderr.flush()
        os._exit(code)


def _ignore(number: int, frame: Any) -> None:
    """The watchdog has read it from the pipe."""
