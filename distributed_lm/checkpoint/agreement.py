"""What goes wrong with the disk on one rank is an error on all of them, and so is silence: a mount
that hangs must not hold the training.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from distributed_lm.errors import CheckpointError
from distributed_lm.process_groups import ProcessGroups

Result = TypeVar("Result")

# What the file system gets for a small file or a rename. The other ranks wait for it in a
# collective, so it is well below parallel.timeout_seconds.
ANSWER_SECONDS = 60.0


class SaveError(CheckpointError):
    """A checkpoint could not be written; what was there before still is."""

    exit_code = 1


def on_every_rank(groups: ProcessGroups, action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank; what goes wrong on one is a SaveError on all of them."""
    results: list[Result] = []
    found = groups.gather(problem_of(lambda: results.append(action())))
    if any(found):
        raise SaveError(next(problem for problem in found if problem))
    return results[0]


def on_first_rank(groups: ProcessGroups, action: Callable[[], Any]) -> None:
    """The same for what the first rank does alone on the disk, within ``ANSWER_SECONDS``."""
    on_every_rank(groups, lambda: answering(action) if groups.is_first_rank else None)


def problem_of(action: Callable[[], Any]) -> str | None:
    """What the disk, the memory or a check has to say against ``action``, having tried it."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def answering(action: Callable[[], Any]) -> None:
    """Do something on the disk, or give up waiting for it.

    A thread that a hung mount holds stays behind, and does what it was at when the mount is back;
    that is harmless, since every save has a folder of its own.

    Raises:
        OSError: if it is not done within ``ANSWER_SECONDS``; else what ``action`` raises.
    """
    raised: list[BaseException] = []

    def act() -> None:
        try:
            action()
        except BaseException as error:  # raised below, in the thread that asked
            raised.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if thread.is_alive():
        raise OSError(f"the file system did not answer within {ANSWER_SECONDS:.0f} s")
    if raised:
        raise raised[0]
