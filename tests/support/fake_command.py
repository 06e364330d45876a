"""Stands in for ``python -m distributed_lm`` where a test is about how ranks end, not what they do.

``fake_command.py COMMAND CONFIG [key=value ...] BEHAVIOUR``; the rank is in ``RANK``.
"""

import os
import signal
import sys
import time
from pathlib import Path

LOST_PEER = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2345"
PATIENCE_SECONDS = 60


def speak(rank: int) -> None:
    print(f"rank {rank} speaks")
    print(f"rank {rank} warns", file=sys.stderr)


def one_fault(rank: int) -> None:
    """Rank 1 fails for a reason; its peers lose it, and one of them says so sooner."""
    if rank == 1:
        time.sleep(0.4)
        raise ValueError("the loss of rank 1")
    time.sleep(0.2 * rank)
    raise RuntimeError(LOST_PEER)


def rank_0_fault(rank: int) -> None:
    if rank == 0:
        raise ValueError("the loss of rank 0")
    raise RuntimeError(LOST_PEER)


def mistake(rank: int) -> None:
    """Every rank finds the same mistake of the user."""
    print(f"error: data/x: no such data set (rank {rank})", file=sys.stderr)
    sys.exit(2)


def one_fault_others_hang(rank: int) -> None:
    if rank == 1:
        sys.exit(3)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank inside a collective
    time.sleep(PATIENCE_SECONDS)


def one_fault_others_wait(rank: int) -> None:
    if rank == 1:
        while not signals_file(0).exists():
            time.sleep(0.02)
        sys.exit(3)
    wait_for_signals(rank)


def killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    raise RuntimeError(LOST_PEER)


def logs_a_traceback(rank: int) -> None:
    """A rank that meets an exception and goes on."""
    print("Traceback (most recent call last):\nValueError: survived", file=sys.stderr)


def wait_for_signals(rank: int) -> None:
    """Notes every signal in a file; SIGTERM ends it well, SIGINT as Python does."""
    notes = signals_file(rank)

    def note(number: int, frame: object) -> None:
        with notes.open("a") as file:
            file.write(f"{signal.Signals(number).name}\n")
        if number == signal.SIGTERM:
            sys.exit(0)
        if number == signal.SIGINT:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    notes.write_text("ready\n")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.05)


def signals_file(rank: int) -> Path:
    return Path(sys.argv[2]).parent / f"signals_{rank}"


BEHAVIOURS = {
    function.__name__: function
    for function in (
        speak,
        one_fault,
        rank_0_fault,
        mistake,
        one_fault_others_hang,
        one_fault_others_wait,
        killed,
        logs_a_traceback,
        wait_for_signals,
    )
}

if __name__ == "__main__":
    BEHAVIOURS[sys.argv[-1]](int(os.environ["RANK"]))
