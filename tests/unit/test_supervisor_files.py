"""What the supervisor reads from its journal and the metrics, and that it waits for no write."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch.supervisor import comeback
from launch.supervisor.clock import Clock, slowest_save
from launch.supervisor.comeback import Allocation, come_back
from launch.supervisor.health import pairs
from launch.supervisor.job import Job
from launch.supervisor.journal import (
    Journal,
    SupervisorsJournal,
    best_step,
    is_finished,
    read_journal,
    waiting_jobs,
)
from launch.supervisor.outcome import failures_in_a_row, has_progressed
from launch.supervisor.step import whole_node_options
from launch.supervisor.supervisor import Supervisor


def event(name: str, job: str | None = "1", **values: Any) -> dict[str, Any]:
    return {"time": 0.0, "event": name, "message": "", "job": job, **values}


def job(run_dir: Path, **values: Any) -> Job:
    fields: dict[str, Any] = {
        "run_dir": str(run_dir), "code": "", "code_hash": "", "arguments": [], "nodes": 1,
        "spare_nodes": 0, "tasks_per_node": 1, "devices_per_node": 0, "legal_nodes": [1],
        "time_seconds": 3600, "lead_seconds": 180, "hang_timeout_seconds": 600,
        "max_restarts_without_progress": 3, "prefix": [], "srun_options": [], "python": "python3",
        "environment": {}, "network_interface": None, "health_check": True,
        "preemption_requeues": False, "minimum_disk_bytes": 0, "sbatch": ["run.sbatch"],
        "is_chained": False, "steps": 10,
    }  # fmt: skip
    return Job(**{**fields, **values})


class TestStandingFileSystem:
    """A FIFO that nobody reads: opening it for writing waits, as a mount does that went away."""

    def test_writes_do_not_wait_and_arrive_in_order(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        os.mkfifo(path)

        async def run() -> tuple[list[str], float, int]:
            journal = SupervisorsJournal(tmp_path, job="1", restart=0)
            began = time.monotonic()
            for number in range(3):
                journal.write("note", str(number))
            reading = asyncio.ensure_future(journal.after(lambda: None))
            turns = 0
            while time.monotonic() - began < 0.5:
                await asyncio.sleep(0.01)
                turns += 1
            waited = reading.done()
            lines: list[str] = []
            reader = threading.Thread(target=lambda: lines.extend(_lines(path, 3)))
            reader.start()
            await reading
            reader.join()
            assert not waited
            return lines, json.loads(lines[2])["time"] - began_at, turns

        began_at = time.time()
        lines, told_after, turns = asyncio.run(run())
        assert [json.loads(line)["message"] for line in lines] == ["0", "1", "2"]
        assert told_after < 0.3, "the time of the writing, not of what happened"
        assert turns > 10

    def test_what_is_read_has_all_that_was_written(self, tmp_path: Path) -> None:
        async def run() -> list[dict[str, Any]]:
            journal = SupervisorsJournal(tmp_path, job="1", restart=0)
            for number in range(50):
                journal.write("note", str(number))
            return await journal.read()

        assert [one["message"] for one in asyncio.run(run())] == [str(n) for n in range(50)]

    def test_what_the_disk_does_not_take_is_remembered(self, tmp_path: Path) -> None:
        (tmp_path / "slurm").write_text("no folder")

        async def run() -> list[dict[str, Any]]:
            journal = SupervisorsJournal(tmp_path / "slurm", job="1", restart=0)
            for _ in range(4):
                journal.write("crash")
            return await journal.read()

        assert failures_in_a_row(asyncio.run(run())) == 4.0


def _lines(path: Path, number: int) -> list[str]:
    """Of a FIFO whose writer closes it after each."""
    lines: list[str] = []
    while len(lines) < number:
        with path.open() as file:
            lines += file.readlines()
    return lines


class TestProgress:
    def test_only_the_last_launch_counts(self) -> None:
        """The run was launched anew after its checkpoints were removed."""
        events = [
            event("launch", step=0), event("crash"), event("progress", progress=40),
            event("crash"), event("crash"), event("launch", step=0), event("crash"),
        ]  # fmt: skip
        assert best_step(events) == 0
        assert has_progressed(events, 10)
        assert failures_in_a_row(events) == 1.0

    def test_what_was_there_at_the_launch_is_no_progress(self) -> None:
        assert not has_progressed([event("launch", step=40), event("crash")], 40)
        assert has_progressed([event("launch", step=40), event("crash")], 50)

    def test_stops_count_a_quarter(self) -> None:
        events = [event("progress", progress=1), event("crash"), *[event("stopped")] * 3]
        assert failures_in_a_row(events) == 1.75

    def test_finished_holds_until_the_next_launch(self) -> None:
        assert is_finished([event("launch"), event("finished")])
        assert not is_finished([event("launch"), event("finished"), event("launch")])


class TestChain:
    CHAIN = (event("launch", job=None), event("submitted", jobs=["7", "8", "9"]))

    def test_jobs_that_wait(self) -> None:
        lives = [event("life", "7"), event("leave", "7"), event("life", "8")]
        assert waiting_jobs([*self.CHAIN, event("life", "7")], "7") == ["8", "9"]
        assert waiting_jobs([*self.CHAIN, *lives], "8") == ["9"]
        assert waiting_jobs([*self.CHAIN, *lives, event("life", "9")], "9") == []
        assert waiting_jobs([event("launch", job=None)], "7") is None

    @pytest.mark.parametrize(
        ("job_id", "works", "words"),
        [("8", True, "job 9 of the chain"), ("9", False, "the last job of its chain")],
    )
    def test_last_one_knows_it(
        self, job_id: str, works: bool, words: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("PATH", str(tmp_path))  # no command of Slurm's
        chained = job(tmp_path, is_chained=True)
        Journal(chained.slurm_dir, job=None).record("launch")
        Journal(chained.slurm_dir, job="7").record("submitted", jobs=["7", "8", "9"])
        for life in ("7", "8", "9")[: int(job_id) - 6]:
            Journal(chained.slurm_dir, job=life).record("life")
        way = come_back(chained, Allocation(job_id, int(job_id), 0, ("node1",)), [])
        assert way.works is works
        assert words in way.message
        assert (
            comeback.chains_next(chained, Allocation(job_id, int(job_id), 0, ())) is None
        ) is not works


class TestLead:
    METRICS = (
        {"kind": "event", "event": "save", "save_seconds": 40.0},
        {"kind": "event", "event": "save", "save_seconds": 90.0},
        {"kind": "train", "loss": 1.0},
    )

    def test_earlier_lives_saves_count(self, tmp_path: Path) -> None:
        lines = [json.dumps(record) for record in self.METRICS]
        (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "event", "save_seco']))
        assert slowest_save(tmp_path) == 90.0
        assert slowest_save(tmp_path / "nowhere") == 0.0

    def test_last_call(self, tmp_path: Path) -> None:
        clock = Clock(job(tmp_path, time_seconds=850), began=time.time() - 600)
        assert clock.last_call() is None  # 250 s are left, 180 s are asked for
        clock.saved(90.0)  # three of it and half a minute
        left = clock.last_call()
        assert left == pytest.approx(250.0, abs=2.0)
        clock.suspended(100.0)
        assert clock.last_call() is None

    def test_clock_of_a_node_that_is_hours_ahead_ends_no_job(self, tmp_path: Path) -> None:
        assert Clock(job(tmp_path), began=time.time() - 7200).last_call() is None

    def test_no_limit_is_known(self, tmp_path: Path) -> None:
        assert Clock(job(tmp_path, time_seconds=None), began=0.0).last_call() is None


class TestPairs:
    @pytest.mark.parametrize("number", [2, 3, 4, 5, 8, 16])
    def test_in_as_many_rounds_as_there_are_partners_each_meets_every_other(
        self, number: int
    ) -> None:
        nodes = [f"node{index}" for index in range(number)]
        met = []
        for turn in range(number - 1 + number % 2):
            group = pairs(nodes, turn)
            names = [name for pair in group for name in pair]
            assert len(names) == len(set(names)) == number - number % 2
            met += [frozenset(pair) for pair in group]
        assert len(met) == len(set(met)) == number * (number - 1) // 2


def test_health_check_is_given_all_devices_of_a_node() -> None:
    options = ["--mpi=none", "--gpus-per-task=1", "--gpu-bind=closest", "--cpus-per-task=4"]
    assert whole_node_options(options) == ["--mpi=none", "--cpus-per-task=4"]


def test_journal_survives_a_torn_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, job="1")
    journal.record("life")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "to')
    journal.record("leave")
    assert [one["event"] for one in read_journal(tmp_path)] == ["life"]


def test_alerts_of_the_last_moment_are_sent(tmp_path: Path) -> None:
    """More of them than there are threads, and then the supervisor's work is over."""
    command, told = tmp_path / "alert.sh", tmp_path / "told"
    command.write_text(f'#!/bin/sh\nsleep 0.05; echo "$2: $3" >> {told}\n')
    command.chmod(0o755)
    supervisor = object.__new__(Supervisor)
    supervisor.job = job(tmp_path, alert_command=str(command))
    supervisor._tasks = set()
    messages = {f"spike: {number}" for number in range(60)}

    async def tell() -> None:
        for message in messages:
            supervisor._send_alert(*message.split(": "))

    asyncio.run(tell())
    assert set(told.read_text().splitlines()) == messages
