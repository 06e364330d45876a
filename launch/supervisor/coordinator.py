"""The store on the first node through which the ranks of a run agree to stop, and are watched.

Each rank's watchdog thread (``distributed_lm.supervision``) keeps one TCP connection to it, so all
of this works while the main threads are blocked in a collective. Messages are JSON, one per line.

How all ranks come to stop at the same boundary (a step, or a batch of an evaluation): the ranks
count boundaries alike. We propose number N; a rank that has not reached N promises to wait there;
one that is already there refuses. If all promise we commit, else we call it off and propose a later
one. So no rank ever passes a boundary that others stop at, whatever the network's delays.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import statistics
import time
from functools import partial
from typing import Any

from launch.ports import free_port
from launch.supervisor.member import Member, lost, straggler, who_lags

PING_SECONDS = 2.0
ANSWER_SECONDS = 20.0
STACKS_SECONDS = 1.0
# What the ranks' launchers get to come up, on a node that has to read its libraries over a network.
START_SECONDS = 600.0
# Of the newest step times, from which a hang is told.
STEPS_REMEMBERED = 50
# Without being run for so long, this process was suspended with its job, or its node stood still.
AWAY_SECONDS = 5.0


class Coordinator:
    """Serves one srun step at a time: ``open`` begins the next one with a new token."""

    def __init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.expected = 0
        self.token = ""
        self.signals: asyncio.Queue[str] = asyncio.Queue()
        """What Slurm or a user has sent to the ranks."""
        self.notes: dict[str, Any] = {}
        """Newest values that rank 0 has told: ``step``, ``saved_step``, ``save_seconds`` …"""
        self.alerts: list[str] = []
        """``KIND: MESSAGE``, of rank 0, not yet passed on."""
        self.ends: dict[int, tuple[int, float]] = {}
        """By rank: the exit code of a rank that has ended, and when."""
        self.master_port = 0
        self._addresses: dict[int, str] = {}
        self.absence = (0.0, -math.inf)
        """For how long this process was not run, last, and when that was noticed: no silence in it
        is the ranks'."""
        self._awake = time.monotonic()
        self._opened = time.monotonic()
        self._step_seconds: list[float] = []
        self._server: asyncio.base_events.Server | None = None
        self._committed = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Listen on all interfaces; returns the port."""
        self._server = await asyncio.start_server(self._serve, "0.0.0.0", 0)
        self._awake = time.monotonic()
        self._spawn(self._ping())
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        """Listen no more, and hang up."""
        for member in self.members.values():
            member.writer.close()
        if self._server is not None:
            self._server.close()

    def open(self, expected: int, master_port: int) -> str:
        """Forget the ranks of the step before and wait for ``expected`` new ones.

        Returns:
            The token that they must show: a rank that outlived its step has an older one.
        """
        for member in self.members.values():
            member.writer.close()
        self.members, self.notes, self.ends, self._addresses = {}, {}, {}, {}
        self._opened = time.monotonic()
        self.expected, self.master_port = expected, master_port
        self.token = secrets.token_hex(8)
        self._committed = False
        return self.token

    @property
    def is_finished(self) -> bool:
        """Whether rank 0 has said that there is nothing left to do."""
        first = self.members.get(0)
        return first is not None and first.last_word == "finished"

    @property
    def is_stopped(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return self._committed

    @property
    def is_falling_apart(self) -> bool:
        """Whether some rank has ended without being asked to."""
        gone = [member for member in self.members.values() if member.gone]
        return bool(self.ends) or any(member.last_word is None for member in gone)

    async def agree_to_stop(self, reason: str) -> bool:
        """Make all ranks stop at one boundary and save; False if some rank does not answer."""
        margin = 1
        while not self._committed:
            here = [member for member in self.members.values() if not member.gone]
            if not here:
                return False
            boundary = max(member.boundary for member in here) + margin
            margin = min(2 * margin, 1024)
            for member in here:
                member.answer = None
            await self._tell(here, {"propose": boundary})
            if not await self._wait(partial(_all_answered, here), ANSWER_SECONDS):
                await self._tell(here, {"abort": boundary})
                return False
            if all(member.answer or member.gone for member in here):
                self._committed = True
                await self._tell(here, {"commit": boundary, "reason": reason})
            else:
                await self._tell(here, {"abort": boundary})
        return True

    async def end_ranks(self, why: str) -> None:
        """Have every rank leave at once; those whose watchdog is dead do not hear it."""
        await self._tell(list(self.members.values()), {"die": why})

    async def introduce(self, ranks: list[int], seconds: float) -> None:
        """Tell the health tasks of some nodes where to meet, at the first of them, and for how
        long to try."""
        # Free on this node; most likely on the others too.
        first, port = self.members[ranks[0]], free_port()
        for rank, number in enumerate(ranks):
            member = self.members[number]
            address = first.address
            if address.startswith("127."):
                address = str(member.writer.get_extra_info("sockname")[0])
            meet = {"rank": rank, "world_size": len(ranks), "address": address, "port": port}
            await self._tell([member], {"meet": {**meet, "seconds": seconds}})

    async def dump_stacks(self) -> None:
        """Have every rank write where it is into its log."""
        await self._tell(list(self.members.values()), {"dump": True})
        await asyncio.sleep(STACKS_SECONDS)

    def hang(self, minimum_seconds: float) -> str | None:
        """Why the run is taken to hang, naming the ranks that lag; None if it moves.

        Args:
            minimum_seconds: no shorter silence counts; in training also not one shorter than
                twenty median steps; once all ranks have come up, while some do other things, as
                build the model or save, not one shorter than ten times the minimum.
        """
        self.look_up()
        members = self.members.values()
        silence = time.monotonic() - max([self._opened, *(member.moved for member in members)])
        limit = minimum_seconds
        if len(members) == self.expected:
            if any(member.phase != "train" for member in members if not member.gone):
                limit *= 10.0
            elif self._step_seconds:
                limit = max(limit, 20.0 * statistics.median(self._step_seconds))
        if silence < limit:
            return None
        laggards = who_lags(self.members, self.expected, 3 * PING_SECONDS)
        return f"no rank has moved for {silence:.0f} s; {laggards}"

    def lost(self) -> str | None:
        """Which ranks have ended unasked or fallen silent without srun's noticing; None = none."""
        self.look_up()
        return lost(self.members, self.ends)

    def straggler(self) -> tuple[int, str, float] | None:
        """Rank, host and relative slowness of the rank whose own work takes longest."""
        found = straggler(self.members.values())
        return None if found is None else (found[0].rank, found[0].host, found[1])

    def look_up(self) -> None:
        """Do not take our own absence for the ranks' silence."""
        now = time.monotonic()
        away, self._awake = now - self._awake, now
        if away < AWAY_SECONDS:
            return
        self.absence = away, now
        self._opened += away
        for member in self.members.values():
            member.moved = min(now, member.moved + away)
            member.heard = min(now, member.heard + away)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(asyncio.current_task())
        member = None
        with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
            member = await self._greet(reader, writer)
            while member is not None and (line := await reader.readline()):
                self._take(member, json.loads(line))
        if member is not None:
            member.gone, member.heard = True, time.monotonic()
        writer.close()

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Member | None:
        hello = json.loads(await asyncio.wait_for(reader.readline(), ANSWER_SECONDS))
        if hello.get("token") != self.token:
            return None
        address = writer.get_extra_info("peername")[0]
        rank, address = int(hello["rank"]), str(writer.get_extra_info("peername")[0])
        if "ended" in hello:  # a rank's launcher, after the rank
            self.ends[rank] = (int(hello["ended"]), time.time())
            return None
        if hello.get("ask") == "master":  # the same, before there is a rank
            self._addresses[rank] = address
            await self._tell_master(writer)
            return None
        member = Member(rank, str(hello["host"]), writer, address=address)
        self.members[rank] = member
        return member

    async def _tell_master(self, writer: asyncio.StreamWriter) -> None:
        token = self.token
        await self._wait(lambda: 0 in self._addresses or token != self.token, START_SECONDS)
        if token != self.token or 0 not in self._addresses:
            return
        address = self._addresses[0]
        if address.startswith("127."):  # rank 0 is on this node: what the asker calls this node
            address = str(writer.get_extra_info("sockname")[0])
        message = {"master": {"address": address, "port": self.master_port}}
        writer.write((json.dumps(message) + "\n").encode())
        await writer.drain()

    def _take(self, member: Member, message: dict[str, Any]) -> None:
        now = time.monotonic()
        member.heard = now
        if "boundary" in message and message["boundary"] != member.boundary:
            passed = message["boundary"] - member.boundary
            if member.rank == 0 and member.phase == "train" and member.boundary > 0:
                self._step_seconds.append((now - member.moved) / passed)
                del self._step_seconds[:-STEPS_REMEMBERED]
            member.boundary, member.moved = message["boundary"], now
        if "phase" in message and message["phase"] != member.phase:
            member.phase, member.moved = str(message["phase"]), now
        member.work_seconds = message.get("work_seconds", member.work_seconds)
        if "promise" in message:
            member.answer = bool(message["promise"])
        if "signal" in message:
            self.signals.put_nowait(f"{message['signal']} to rank {member.rank}")
        if "last_word" in message:
            member.last_word = str(message["last_word"])
        if "report" in message:
            clock = message.get("clock")
            skew = {} if clock is None else {"clock_skew_seconds": clock - time.time()}
            member.report = {**(member.report or {}), **message["report"], **skew}
        if member.rank == 0:
            self.notes.update(message.get("notes", {}))
            self.alerts += message.get("alerts", [])

    async def _tell(self, members: list[Member], message: dict[str, Any]) -> None:
        line = (json.dumps(message) + "\n").encode()
        for member in members:
            with contextlib.suppress(OSError):
                member.writer.write(line)
        for member in members:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(member.writer.drain(), PING_SECONDS)

    async def _ping(self) -> None:
        """So that a rank cut off from us notices, and leaves."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            self.look_up()
            await self._tell([m for m in self.members.values() if not m.gone], {"ping": True})

    @staticmethod
    async def _wait(condition: Any, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                return False
            await asyncio.sleep(0.02)
        return True

    def _spawn(self, work: Any) -> None:
        """Keep a task from being collected while it runs."""
        task = work if isinstance(work, asyncio.Task) else asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _all_answered(members: list[Member]) -> bool:
    return all(member.answer is not None or member.gone for member in members)
