"""What the ranks of a step have told, and what it says about them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# EX_TEMPFAIL of sysexits.h: stopped in time, saved, and to be continued.
EXIT_STOPPED = 75
# What srun gets to end a step of which a rank has ended, before we do.
GRACE_SECONDS = 10.0
# A rank that is cut off ends itself after 30 s (CUT_OFF_SECONDS of distributed_lm.supervision):
# nothing is waited for any more that may not be there.
SILENT_SECONDS = 45.0


@dataclass
class Member:
    """What a rank has told."""

    rank: int
    host: str
    writer: asyncio.StreamWriter
    boundary: int = 0
    """Boundaries it has passed."""
    phase: str = "start"
    moved: float = field(default_factory=time.monotonic)
    """When it last passed a boundary or changed its phase."""
    heard: float = field(default_factory=time.monotonic)
    """When it last said anything, or hung up."""
    work_seconds: float | None = None
    """Its own part of a step, without waiting for others."""
    answer: bool | None = None
    """To the proposal that is open."""
    report: dict[str, Any] | None = None
    """On its node's health."""
    address: str = ""
    """Where its connection came from."""
    last_word: str | None = None
    """``finished``, ``stopped`` or an error, said before leaving."""
    gone: bool = False

    @property
    def name(self) -> str:
        return f"{self.rank} on {self.host}"


def who_lags(members: Mapping[int, Member], expected: int, silent_seconds: float) -> str:
    """Of a run that does not move.

    Args:
        silent_seconds: without a word, after which a rank does not answer.
    """
    now = time.monotonic()
    here = [member for member in members.values() if not member.gone]
    silent = [member for member in here if now - member.heard > silent_seconds]
    missing = sorted(set(range(expected)) - set(members))
    furthest = max((member.boundary for member in here), default=0)
    behind = [member for member in here if member.boundary < furthest]
    for what, ranks in (
        ("not answering at all", [member.name for member in silent]),
        ("never came up", [str(rank) for rank in missing]),
        ("behind the others", [member.name for member in behind]),
    ):
        if ranks:
            return f"{what}: rank {', '.join(ranks)}"
    phases = ", ".join(sorted({member.phase for member in here}))
    return f"all ranks are at the same boundary, in phase {phases}"


def lost(members: Mapping[int, Member], ends: Mapping[int, tuple[int, float]]) -> str | None:
    """Which ranks have ended unasked or fallen silent, and for how long the step has stood without
    them; None while it can go on.

    Args:
        ends: by rank, its exit code and when it ended (seconds since the epoch).
    """
    now, found = time.monotonic(), []
    for rank, (code, ended_at) in sorted(ends.items()):
        if code not in (0, EXIT_STOPPED) and time.time() - ended_at > GRACE_SECONDS:
            found.append(f"rank {rank} ended with exit code {code}")
    for member in members.values():
        if member.last_word is not None or member.rank in ends:
            continue
        silence = now - member.heard
        if member.gone and silence > GRACE_SECONDS:
            found.append(f"rank {member.name} hung up {silence:.0f} s ago")
        elif silence > SILENT_SECONDS:
            found.append(f"rank {member.name} has not been heard for {silence:.0f} s")
    return f"{'; '.join(found)}, and srun did not end the step" if found else None


def straggler(members: Iterable[Member]) -> tuple[Member, float] | None:
    """The rank whose own work takes longest, and its time over the median's."""
    timed = [(member.work_seconds, member) for member in members if member.work_seconds]
    if len(timed) < 2:
        return None
    slowest, member = max(timed, key=lambda pair: pair[0])
    return member, slowest / statistics.median(seconds for seconds, _ in timed)
