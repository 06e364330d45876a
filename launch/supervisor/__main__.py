"""``python -m launch.supervisor JOB_FILE``: all that a batch script does."""

from __future__ import annotations

import os
import signal
import sys

# Set by the batch script's traps while it makes its environment.
EARLY_SIGNAL = "DISTRIBUTED_LM_EARLY_SIGNAL"


def main() -> None:
    early = _remember_signals()
    # Only now: on a busy file system reading the libraries may take seconds.
    from launch.supervisor.life import live

    sys.exit(live(sys.argv[1], early))


def _remember_signals() -> list[str]:
    """Names of the signals that come before anybody listens; it grows."""
    early: list[str] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: early.append(signal.Signals(number).name))
    if EARLY_SIGNAL in os.environ:
        early.append(os.environ.pop(EARLY_SIGNAL))
    return early


if __name__ == "__main__":
    main()
