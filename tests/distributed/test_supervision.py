"""Ranks and their supervisor: agreement on where to stop, hangs, stragglers, strays."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from launch.supervisor import coordinator as coordinating
from launch.supervisor import member as judging
from launch.supervisor.coordinator import Coordinator

# One rank: counts boundaries at its own pace, as far as the others let it, who must all be there.
RANK = """
import sys, time
from distributed_lm import supervision as module
from distributed_lm.supervision import supervision

address, rank, world_size, pace, folder = sys.argv[1:6]
if len(sys.argv) > 6:
    module.CUT_OFF_SECONDS, module.AWAY_SECONDS = 2.0, 1.0
line = supervision(address, int(rank))
if pace == "never":
    time.sleep(60)
line.begin()
line.phase("train")
for boundary in range(1, 2000):
    time.sleep(float(pace))
    line.worked(float(pace))
    open(f"{folder}/{rank}.{boundary}", "w").close()
    while not all(__import__("os").path.exists(f"{folder}/{r}.{boundary}")
                  for r in range(int(world_size))):
        time.sleep(0.0005)
    if line.should_stop():
        print(f"stopped {boundary}")
        line.leave("stopped")
        break
"""


class Ranks:
    """Processes of the script above, watched by a coordinator."""

    def __init__(self, coordinator: Coordinator, address: str, folder: Path) -> None:
        self.coordinator = coordinator
        self.address = address
        self.folder = folder
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self, *paces: str, more: tuple[str, ...] = ()) -> None:
        for rank, pace in enumerate(paces):
            arguments = [self.address, str(rank), str(len(paces)), pace, str(self.folder), *more]
            self.processes.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, "-c", RANK, *arguments, stdout=-1, stderr=-1
                )
            )
        await self.reach(lambda: len(self.coordinator.members) == len(paces))

    async def reach(self, condition: Callable[[], Any], seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.coordinator.members
            await asyncio.sleep(0.01)

    async def outputs(self) -> list[str]:
        return [(await process.communicate())[0].decode() for process in self.processes]

    async def errors(self) -> list[str]:
        return [(await process.communicate())[1].decode() for process in self.processes]


def watched(tmp_path: Path, script: Callable[[Ranks], Awaitable[None]], expected: int = 3) -> None:
    """Run ``script`` beside a coordinator of ``expected`` ranks."""

    async def run() -> None:
        coordinator = Coordinator()
        port = await coordinator.start()
        ranks = Ranks(coordinator, f"127.0.0.1:{port}:{coordinator.open(expected, 1)}", tmp_path)
        try:
            await script(ranks)
        finally:
            for process in ranks.processes:
                if process.returncode is None:
                    process.kill()
                await process.wait()
            coordinator.close()

    asyncio.run(run())


@pytest.mark.parametrize("pace", ["0", "0.002", "0.05"])
def test_all_ranks_stop_at_one_boundary(pace: str, tmp_path: Path) -> None:
    """However fast they are: at 0 they pass many while a proposal is on its way."""

    async def script(ranks: Ranks) -> None:
        await ranks.start(pace, "0", "0.001")
        await ranks.reach(lambda: ranks.coordinator.members[0].boundary > 3)
        assert await ranks.coordinator.agree_to_stop("test")
        outputs = await ranks.outputs()
        assert len(set(outputs)) == 1
        assert outputs[0].startswith("stopped ")
        assert ranks.coordinator.is_stopped

    watched(tmp_path, script)


def test_ranks_before_their_first_step_leave_at_once(tmp_path: Path) -> None:
    async def script(ranks: Ranks) -> None:
        await ranks.start("never", "never", "never")
        assert await ranks.coordinator.agree_to_stop("test")
        await ranks.outputs()
        assert [process.returncode for process in ranks.processes] == [75, 75, 75]

    watched(tmp_path, script)


def test_rank_that_does_not_answer_is_no_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinating, "ANSWER_SECONDS", 0.5)

    async def script(ranks: Ranks) -> None:
        await ranks.start("0.01", "0.01", "0.01")
        await ranks.reach(lambda: ranks.coordinator.members[0].boundary > 3)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        assert not await ranks.coordinator.agree_to_stop("test")
        ranks.processes[1].send_signal(signal.SIGCONT)
        # The others were let go on.
        before = ranks.coordinator.members[0].boundary
        await ranks.reach(lambda: ranks.coordinator.members[0].boundary > before + 3)

    watched(tmp_path, script)


def test_signal_to_a_rank_reaches_the_supervisor_while_it_is_blocked(tmp_path: Path) -> None:
    async def script(ranks: Ranks) -> None:
        await ranks.start("30", "0", "0")
        ranks.processes[0].send_signal(signal.SIGUSR1)
        heard = await asyncio.wait_for(ranks.coordinator.signals.get(), 5.0)
        assert heard == "SIGUSR1 to rank 0"
        assert ranks.processes[0].returncode is None

    watched(tmp_path, script)


def test_hang_names_the_rank_behind_and_dumps_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinating, "PING_SECONDS", 0.2)

    async def script(ranks: Ranks) -> None:
        await ranks.start("0.01", "0.01", "0.01")
        await ranks.reach(lambda: ranks.coordinator.members[2].boundary > 3)
        assert ranks.coordinator.hang(2.0) is None
        ranks.processes[2].send_signal(signal.SIGSTOP)
        await ranks.reach(lambda: ranks.coordinator.hang(2.0) is not None)
        hang = ranks.coordinator.hang(2.0)
        assert hang is not None
        assert "not answering at all: rank 2 on " in hang
        await ranks.coordinator.dump_stacks()
        ranks.processes[2].kill()
        await ranks.coordinator.end_ranks("test")
        errors = await ranks.errors()
        assert all("most recent call first" in error for error in errors[:2])
        assert [process.returncode for process in ranks.processes] == [76, 76, -9]

    watched(tmp_path, script)


def test_rank_that_never_comes_up_is_waited_for_no_longer_than_for_a_step(tmp_path: Path) -> None:
    """The others wait for it in their start, which is given ten times as long."""

    async def script(ranks: Ranks) -> None:
        await ranks.start("never", "never")
        assert ranks.coordinator.hang(1.0) is None
        await asyncio.sleep(1.2)
        hang = ranks.coordinator.hang(1.0)
        assert hang is not None
        assert hang.endswith("never came up: rank 2")
        ranks.coordinator.expected = 2
        assert ranks.coordinator.hang(1.0) is None

    watched(tmp_path, script)


def test_rank_whose_line_is_cut_is_lost_after_a_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "GRACE_SECONDS", 0.5)

    async def script(ranks: Ranks) -> None:
        await ranks.start("0.01", "0.01", "0.01")
        ranks.processes[2].kill()
        await ranks.reach(lambda: ranks.coordinator.members[2].gone)
        assert ranks.coordinator.lost() is None
        await ranks.reach(lambda: ranks.coordinator.lost() is not None, 2.0)
        lost = ranks.coordinator.lost()
        assert lost is not None
        assert lost.startswith(f"rank 2 on {socket.gethostname()} hung up ")
        assert ";" not in lost

    watched(tmp_path, script)


def test_silent_rank_is_lost_and_one_that_was_stopped_as_agreed_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinating, "PING_SECONDS", 0.2)
    monkeypatch.setattr(judging, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(judging, "SILENT_SECONDS", 1.5)

    async def script(ranks: Ranks) -> None:
        await ranks.start("0.01", "0.01", "0.01")
        await ranks.reach(lambda: ranks.coordinator.members[0].boundary > 3)
        assert await ranks.coordinator.agree_to_stop("test")
        await ranks.outputs()
        await asyncio.sleep(0.5)
        assert ranks.coordinator.lost() is None
        ranks.coordinator.open(1, 1)
        ranks.processes.clear()
        ranks.address = f"{ranks.address.rpartition(':')[0]}:{ranks.coordinator.token}"
        await ranks.start("5")
        ranks.processes[0].send_signal(signal.SIGSTOP)
        await ranks.reach(lambda: ranks.coordinator.lost() is not None, 5.0)
        assert "has not been heard for " in str(ranks.coordinator.lost())

    watched(tmp_path, script)


@pytest.mark.parametrize(("code", "is_lost"), [(1, True), (137, True), (75, False), (0, False)])
def test_rank_whose_end_was_told(
    code: int, is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "GRACE_SECONDS", 0.2)

    async def script(ranks: Ranks) -> None:
        host, port, token = ranks.address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write((json.dumps({"token": token, "rank": 1, "ended": code}) + "\n").encode())
        await ranks.reach(lambda: ranks.coordinator.ends)
        assert ranks.coordinator.lost() is None
        await asyncio.sleep(0.4)
        assert (ranks.coordinator.lost() is not None) is is_lost
        writer.close()

    watched(tmp_path, script)


def test_suspended_job_is_neither_cut_off_nor_taken_to_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it stands still: the ranks, and the supervisor that would have pinged them."""
    monkeypatch.setattr(coordinating, "PING_SECONDS", 0.5)
    monkeypatch.setattr(coordinating, "AWAY_SECONDS", 1.0)

    async def script(ranks: Ranks) -> None:
        coordinator = ranks.coordinator
        await ranks.start("0.01", "0.01", more=("impatient",))
        await ranks.reach(lambda: coordinator.members[0].boundary > 3)
        for process in ranks.processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(4.0)
        for process in ranks.processes:
            process.send_signal(signal.SIGCONT)
        assert coordinator.hang(3.0) is None
        assert coordinator.absence[0] == pytest.approx(4.0, abs=1.0)
        before = coordinator.members[0].boundary
        await ranks.reach(lambda: coordinator.members[0].boundary > before + 3)
        assert await coordinator.agree_to_stop("test")
        await ranks.outputs()

    watched(tmp_path, script, expected=2)


def test_straggler_is_named(tmp_path: Path) -> None:
    async def script(ranks: Ranks) -> None:
        await ranks.start("0.01", "0.03", "0.01")
        members = ranks.coordinator.members
        await ranks.reach(lambda: all(member.work_seconds for member in members.values()))
        found = ranks.coordinator.straggler()
        assert found is not None
        rank, host, ratio = found
        assert (rank, host) == (1, socket.gethostname())
        assert ratio == pytest.approx(3.0)

    watched(tmp_path, script)


def test_stray_of_an_earlier_step_is_turned_away(tmp_path: Path) -> None:
    """And leaves, as every rank does whose supervisor hangs up."""

    async def script(ranks: Ranks) -> None:
        await ranks.start("0.01")
        ranks.coordinator.open(1, 1)
        assert await ranks.processes[0].wait() == 76
        assert not ranks.coordinator.members
        host, port, _ = ranks.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write((json.dumps({"token": "old", "rank": 0, "host": "x"}) + "\n").encode())
        assert await reader.read() == b""
        assert not ranks.coordinator.members
        writer.close()

    watched(tmp_path, script, expected=1)


def test_rank_outlives_no_supervisor(tmp_path: Path) -> None:
    """The supervisor's process is killed: its socket closes."""
    code = (
        "import asyncio, sys\n"
        "from launch.supervisor.coordinator import Coordinator\n"
        "async def run():\n"
        "    coordinator = Coordinator()\n"
        "    port = await coordinator.start()\n"
        "    print(port, coordinator.open(1, 1), flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(run())\n"
    )

    async def run() -> None:
        supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=-1)
        assert supervisor.stdout is not None
        port, token = (await supervisor.stdout.readline()).decode().split()
        rank = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RANK, f"127.0.0.1:{port}:{token}", "0", "1", "0.01",
            str(tmp_path), stderr=-1,
        )  # fmt: skip
        while not os.path.exists(tmp_path / "0.3"):
            await asyncio.sleep(0.01)
        supervisor.kill()
        await supervisor.wait()
        _, error = await asyncio.wait_for(rank.communicate(), 10.0)
        assert rank.returncode == 76
        assert b"cut off" in error

    asyncio.run(run())
