"""Which rank failed first, and its last words: one message instead of one traceback per rank."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# When a rank dies, its peers' collectives fail with one of these: consequences, not causes.
LOST_PEER = re.compile(
    r"connection (closed by peer|reset by peer|refused|was likely closed)|broken pipe"
    r"|closed by peer|DistNetworkError|DistStoreError|DistBackendError|ncclRemoteError"
    r"|gloo/transport|recvValue failed|failed to recv|failed to connect to|socket timeout"
    r"|timed out (after|waiting)|watchdog caught collective",
    re.IGNORECASE,
)
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
TRACEBACK_HEAD = "Traceback (most recent call last):"
# C++ log lines, such as torch's warning at exit about process groups left open, start like this.
LOG_LINE = re.compile(r"^(\[?[WEIF]\d{4}[ :]|\[rank\d+\]:\[|\[20\d\d-|wandb: |sys:1: )")
MAX_LINES = 60
LINES_WITHOUT_TRACEBACK = 10


@dataclass(frozen=True)
class Failure:
    """The end of one rank that failed by itself."""

    rank: int
    return_code: int
    """As ``subprocess`` gives it: −n if signal n killed the process."""
    ended_at: float
    """Seconds on the launcher's clock."""
    output: str
    """The end of what the rank wrote."""
    log_path: Path


def report(failures: Sequence[Failure], num_ranks: int, seconds: float) -> tuple[str, int]:
    """The message for the user and the exit code of the whole launch."""
    failure = root_cause(failures)
    words = last_words(failure.output)
    code = failure.return_code
    if code < 0:
        ending = f"was killed by {_signal_name(-code)}"
        if -code == signal.SIGKILL:
            ending += " (by hand, or by the system for lack of memory)"
    else:
        ending = f"failed with exit code {code}"
    where = (
        f"launch: rank {failure.rank} of {num_ranks} {ending} after {seconds:.0f} s; "
        f"its log: {failure.log_path}"
    )
    return "\n".join([*words, where]), code if code > 0 else 128 - code


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that explains the others: the earliest among those with the best evidence."""
    return min(failures, key=lambda failure: (_suspicion(failure), failure.ended_at))


def last_words(output: str) -> list[str]:
    """The lines of an output that say why it ended.

    That is its last ``error:`` sentence or traceback, whichever is later, else its last lines.
    """
    lines = [RANK_PREFIX.sub("", line) for line in output.splitlines()]
    for start in reversed(range(len(lines))):
        if lines[start].startswith("error: "):
            return [lines[start]]
        if lines[start] == TRACEBACK_HEAD:
            return _shortened(_traceback(lines[start:]))
    return [line for line in lines if line.strip()][-LINES_WITHOUT_TRACEBACK:]


def _suspicion(failure: Failure) -> int:
    """0 for a rank with a reason of its own, 1 for one without a word, 2 for a lost peer."""
    words = last_words(failure.output)
    explained = bool(words) and words[0].startswith(("error: ", TRACEBACK_HEAD))
    # The source lines of a traceback may mention anything; its exception is what happened.
    exception = "\n".join(line for line in words if not line.startswith("  "))
    if explained and LOST_PEER.search(exception):
        return 2
    if explained or failure.return_code < 0:
        return 0
    return 1


def _traceback(lines: Sequence[str]) -> list[str]:
    """A traceback at the start of ``lines``: its frames, and its exception to the last line."""
    frames = 1
    while frames < len(lines) and (lines[frames].startswith(" ") or not lines[frames].strip()):
        frames += 1
    end = frames
    while end < len(lines) and not LOG_LINE.match(lines[end]):
        end += 1
    return list(lines[:end])


def _shortened(lines: list[str]) -> list[str]:
    """Both ends of a long text; the end has the exception."""
    if len(lines) <= MAX_LINES:
        return lines
    half = MAX_LINES // 2
    return [*lines[:half], f"  … {len(lines) - 2 * half} lines left out …", *lines[-half:]]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
