"""Watches over one life of a job: starts the ranks, brings them to a stop in time, starts them
again after a crash or a hang, and has the job come back until the run is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch.failure import last_words
from launch.ports import UNTRIED_PORTS
from launch.supervisor import alerts, health
from launch.supervisor.clock import Clock, slowest_save
from launch.supervisor.comeback import (
    Allocation,
    ComeBack,
    chains_next,
    come_back,
    requeues_by_itself,
    slurms_reason,
    succeed,
    was_cancelled,
)
from launch.supervisor.coordinator import Coordinator
from launch.supervisor.job import Job
from launch.supervisor.journal import (
    CANCELLED,
    SupervisorsJournal,
    is_finished,
    newest_step,
)
from launch.supervisor.member import EXIT_STOPPED
from launch.supervisor.outcome import Outcome, failures_in_a_row, has_progressed, judge
from launch.supervisor.predecessors import Unfinished, come_back_after, find_unfinished
from launch.supervisor.step import Step, srun_command, task_environment

LOOK_SECONDS = 0.5
# A rank that is this much slower than the median rank is named.
STRAGGLER_RATIO = 1.3
STRAGGLER_SECONDS = 300.0
# What it takes to notice that a rank has ended.
NOTICE_SECONDS = 1.0
# What Slurm gets to end a job that it has been asked to requeue.
REQUEUE_SECONDS = 120.0
AGREEMENTS = 3
# How long Slurm is asked again that does not answer, and how often.
PATIENCE_SECONDS, RETRY_SECONDS = 900.0, 15.0


class Supervisor:
    """One per life of a job.

    Its loop answers the ranks, which leave when they hear nothing for half a minute: so it must
    not wait for the shared file system or for a command, and has threads for both.
    """

    def __init__(self, job: Job, allocation: Allocation, early_signals: Sequence[str] = ()) -> None:
        """
        Args:
            early_signals: names of those that came before ``run`` listens; read only then.
        """
        self.job = job
        self.allocation = allocation
        self.early_signals = early_signals
        self.journal = SupervisorsJournal(
            job.slurm_dir, job=allocation.job_id, restart=allocation.restart
        )
        self.coordinator = Coordinator()
        self.clock = Clock(job, allocation.times.get("began"))
        self.port = 0
        self.attempts = 0
        self.stop_reason: str | None = None
        self.stop_asked = asyncio.Event()
        self.terminated = asyncio.Event()
        """Slurm is ending this script."""
        self.successor: ComeBack | None = None
        """The job that goes on, if it had to be submitted before the ranks had saved."""
        self.provision: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Future[None]] = set()

    async def run(self) -> int:
        """Returns the batch script's exit code: that of the training.

        What nobody has thought of must not end a run of two weeks: it is a crash like any other.
        """
        try:
            return await self._run()
        except Exception:
            self.journal.write("crash", f"of the supervisor: {traceback.format_exc()}")
            return await self._come_back("the supervisor crashed", [], 1)

    async def _run(self) -> int:
        nodes = list(self.allocation.nodes)
        self._listen()
        self.journal.write("life", f"on {', '.join(nodes)}", nodes=nodes, **self.allocation.times)
        if await self._is_over():
            return 0
        unfinished = await asyncio.to_thread(find_unfinished, self.job.after)
        if unfinished is not None:
            return await self._leave_to(unfinished)
        self.clock.saved(await asyncio.to_thread(slowest_save, self._run_dir()))
        if self.stop_asked.is_set():
            return await self._come_back_untrained()
        self.port = await self.coordinator.start()
        self._keep(self._listen_to_ranks())
        nodes, sick = await self._healthy_nodes()
        if self.stop_asked.is_set():  # and the examination may be a victim of its reason
            return await self._come_back_untrained()
        if sick and len(nodes) < self.job.nodes and shutil.which("sbatch"):
            return await self._come_back(f"sick: {', '.join(sick)}", sick, EXIT_STOPPED)
        return await self._attempt_until_done(nodes, sick)

    async def _come_back_untrained(self) -> int:
        self.journal.write("stopped", "before the ranks were started")
        return await self._come_back(self.stop_reason or "", [], EXIT_STOPPED)

    async def _attempt_until_done(self, nodes: list[str], excluded: list[str]) -> int:
        while True:
            chosen = self._choose(nodes)
            if not chosen:
                message = f"no legal layout on the healthy nodes: {', '.join(nodes) or 'none'}"
                return await self._come_back(message, excluded, 1)
            outcome = await self._attempt(chosen)
            self.journal.write(outcome.kind, outcome.message, code=outcome.code)
            if outcome.kind == "finished":
                return 0
            if outcome.kind != "stopped":
                await asyncio.to_thread(alerts.send, self.job, outcome.kind, outcome.message)
            if outcome.kind == "mistake":
                return outcome.code
            if self.stop_asked.is_set():
                return await self._come_back(self.stop_reason or "", [], EXIT_STOPPED)
            if await self._is_loop():
                return outcome.code
            nodes, sick = await self._healthy_nodes()
            excluded += [node for node in sick if node not in excluded]

    async def _attempt(self, nodes: list[str]) -> Outcome:
        """Run the ranks on ``nodes`` until they end, or have to be ended."""
        job = self.job
        tasks = len(nodes) * job.tasks_per_node
        self.attempts += 1
        token = self.coordinator.open(tasks, self._master_port())
        output = str(job.log_dir / "rank_%t.log")
        command = srun_command(
            job, nodes, job.tasks_per_node, output, "launch.task", *job.arguments
        )
        environment = task_environment(job, self.port, token, nodes)
        message = f"{tasks} ranks on {', '.join(nodes)}; logs: {job.log_dir}/rank_N.log"
        self.journal.write("attempt", message, attempt=self.attempts, nodes=nodes)
        began = time.monotonic()
        step = await Step.start(command, environment, job.log_dir, tasks)
        ended = asyncio.ensure_future(step.wait())
        failure = await self._watch(step, ended)
        code, seconds = await ended, time.monotonic() - began
        if failure is not None and not (self.coordinator.is_finished and code == 0):
            return failure
        events, is_asked = await self.journal.read(), self.stop_asked.is_set()
        return await asyncio.to_thread(
            judge, job, self.coordinator, step, code, seconds, is_asked, events
        )

    async def _watch(self, step: Step, ended: asyncio.Future[int]) -> Outcome | None:
        """Until the step has ended. Returns why we ended it, if we did."""
        next_look_at_speed = time.monotonic() + STRAGGLER_SECONDS
        told_to_stop = False
        while not ended.done():
            await asyncio.wait([ended], timeout=LOOK_SECONDS)
            self.coordinator.look_up()
            self._look_at_the_clock()
            self._pass_on_alerts()
            if self.stop_asked.is_set() and not told_to_stop and not ended.done():
                told_to_stop = True
                await self._stop_ranks(step)
            if ended.done():
                break
            hang = self.coordinator.hang(self.job.hang_timeout_seconds)
            if hang is not None:
                await self.coordinator.dump_stacks()
                await self._end(step, "taken to hang")
                return Outcome("hang", 1, hang)
            lost = self.coordinator.lost()
            if lost is not None:
                message = await self._last_words(step, lost)
                await self._end(step, lost)
                return Outcome("crash", 1, message)
            if time.monotonic() > next_look_at_speed:
                next_look_at_speed += STRAGGLER_SECONDS
                self._name_straggler()
        return None

    async def _end(self, step: Step, why: str) -> None:
        await self.coordinator.end_ranks(why)
        await step.end()

    async def _last_words(self, step: Step, lost: str) -> str:
        """Of the rank that ended first, if one has said that it did."""
        ends = dict(self.coordinator.ends)  # before the others follow it
        if not any(code for code, _ in ends.values()):
            return lost
        failure = await asyncio.to_thread(step.why, 0, ends, 0.0)
        return "\n".join([*last_words(failure.output), lost])

    async def _stop_ranks(self, step: Step) -> None:
        reason = self.stop_reason or ""
        self.journal.write("stopping", reason)
        for _ in range(AGREEMENTS):
            if await self.coordinator.agree_to_stop(reason):
                return
        self.journal.write("note", "not every rank answers: ending them as they are")
        await self._end(step, "asked to stop, and some rank does not answer")

    async def _provide_for_the_end(self) -> None:
        """Slurm ends the job, perhaps before the ranks have saved: what goes on must be in the
        queue by then."""
        await asyncio.sleep(NOTICE_SECONDS)  # until slurmstepd has said why
        job, allocation = self.job, self.allocation
        cause = await asyncio.to_thread(slurms_reason, job, allocation)
        if cause not in ("preemption", "time limit"):
            return
        if await asyncio.to_thread(chains_next, job, allocation) is not None:
            return
        if cause == "preemption" and await asyncio.to_thread(requeues_by_itself, job, allocation):
            return
        self.successor = await asyncio.to_thread(succeed, job, allocation)
        if self.successor.works:
            self.journal.write("submitted", self.successor.message, jobs=[self.successor.job])

    async def _come_back(self, reason: str, excluded: list[str], code: int) -> int:
        job, allocation = self.job, self.allocation
        if self.provision is not None:
            await asyncio.wait([self.provision])
        if await asyncio.to_thread(was_cancelled, job, allocation):
            return await self._leave(
                ComeBack(False, "cancelled by its user: not coming back"), code
            )
        if await self._is_loop():
            return code
        cause = await asyncio.to_thread(slurms_reason, job, allocation)
        if self.successor is not None and self.successor.works:
            return await self._leave(self.successor, code, cause or reason)
        if cause == "preemption" and await asyncio.to_thread(requeues_by_itself, job, allocation):
            return await self._leave(
                ComeBack(True, "Slurm requeues the job by itself"), code, cause
            )
        way = await self._find_a_way(partial(come_back, job, allocation, excluded))
        return await self._leave(way, code, cause or reason)

    async def _leave_to(self, others: Unfinished) -> int:
        """Before this job's work can begin: it comes back after ``others``, if they go on."""
        if not others.jobs:
            return await self._leave(ComeBack(False, others.message), 1)
        chain = await asyncio.to_thread(chains_next, self.job, self.allocation)
        if chain is not None:  # that link looks again
            return await self._leave(chain, EXIT_STOPPED, others.message)
        way = await self._find_a_way(partial(come_back_after, self.job, others.jobs))
        return await self._leave(way, EXIT_STOPPED if way.works else 1, others.message)

    async def _find_a_way(self, ask: Callable[[], ComeBack]) -> ComeBack:
        """The controller may be away for a while, and this is the run's only chance."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            way = await asyncio.to_thread(ask)
            if way.works or not way.may_work_later or time.monotonic() > until:
                return way
            await asyncio.sleep(RETRY_SECONDS)

    async def _leave(self, way: ComeBack, code: int, reason: str = "") -> int:
        message = f"{reason}; {way.message}" if reason else way.message
        jobs = {} if way.job is None else {"jobs": [way.job]}
        self.journal.write("leave", message, code=code, goes_on=way.works, **jobs)
        if not way.works and not (self.job.slurm_dir / CANCELLED).exists():
            await asyncio.to_thread(alerts.send, self.job, "lost", message)
        if way.is_requeued:  # to end this script before Slurm does could complete the job
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.terminated.wait(), REQUEUE_SECONDS)
        return code

    async def _is_over(self) -> bool:
        """Whether there is nothing to do any more: the chain's next job finds out here."""
        if is_finished(await self.journal.read()):
            self.journal.write("leave", "the run is finished")
            return True
        if await asyncio.to_thread(was_cancelled, self.job, self.allocation):
            self.journal.write("leave", "the run was cancelled")
            return True
        return await self._is_loop()

    async def _is_loop(self) -> bool:
        """Whether too many attempts in a row have ended without a new checkpoint."""
        events = await self.journal.read()
        saved = await asyncio.to_thread(newest_step, self._run_dir())
        if has_progressed(events, saved):
            self.journal.write("progress", f"checkpoint of step {saved}", progress=saved)
            return False
        count, limit = failures_in_a_row(events), self.job.max_restarts_without_progress
        if count <= limit:
            return False
        message = (
            f"{count:g} failures in a row without a new checkpoint; the run stops until it is "
            f"launched again (max_restarts_without_progress={limit})"
        )
        self.journal.write("loop", message)
        await asyncio.to_thread(alerts.send, self.job, "loop", message)
        return True

    async def _healthy_nodes(self) -> tuple[list[str], list[str]]:
        """Nodes that can be used, and those that failed the check, with the reasons journalled."""
        nodes = list(self.allocation.nodes)
        if not self.job.health_check:
            return nodes, []
        began = time.monotonic()
        reports = await health.examine(self.job, self.coordinator, self.port, nodes)
        sick = {node: problem for node, problem in reports.problems.items() if problem}
        for node, problem in sick.items():
            self.journal.write("sick", f"{node}: {problem}", node=node)
        if len(sick) > len(nodes) / 2:
            # Not so many at once: it is something that they share, and the ranks will tell.
            self.journal.write("note", "more than half of the nodes: none is left out")
            sick = {}
        elif sick:
            self.journal.write("unfit", f"without {', '.join(sick)}")
        good = [node for node in nodes if node not in sick]
        seconds = time.monotonic() - began
        self.journal.write(
            "health", f"{reports.summary} ({seconds:.1f} s)", seconds=seconds,
            gigabytes_per_second=reports.gigabytes_per_second,
        )  # fmt: skip
        return good, list(sick)

    def _choose(self, nodes: list[str]) -> list[str]:
        """As many nodes as the run wants, or the largest number on which it can go on."""
        for number in self.job.legal_nodes:
            if number <= min(len(nodes), self.job.nodes):
                return nodes[:number]
        return []

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGCONT, self._on_continue)
        for name in self.early_signals:
            self._on_signal(name)

    async def _listen_to_ranks(self) -> None:
        """Slurm can be told to warn the ranks and not us. But SIGTERM is also what srun ends the
        others with when one has failed, and by then we know of that one."""
        while True:
            name = await self.coordinator.signals.get()
            if name.startswith("SIGTERM"):
                await asyncio.sleep(NOTICE_SECONDS)
                if self.coordinator.is_falling_apart:
                    continue
            self._on_signal(name)

    def _on_signal(self, name: str) -> None:
        """Signals come twice and from all sides; the first one counts."""
        if name == "SIGTERM":
            self.terminated.set()
        # Also of ranks that have been asked to stop: their time is up before they are done.
        if name.startswith("SIGTERM") and self.provision is None:
            self.provision = asyncio.ensure_future(self._provide_for_the_end())
        self._ask_to_stop(name)

    def _ask_to_stop(self, reason: str) -> None:
        if not self.stop_asked.is_set():
            self.stop_reason = reason
            self.stop_asked.set()

    def _on_continue(self) -> None:
        """After a suspension, and before SIGTERM."""
        self.coordinator.look_up()
        away, noticed = self.coordinator.absence
        if away and time.monotonic() - noticed < LOOK_SECONDS:
            self.coordinator.absence = (0.0, noticed)  # the signal comes twice
            self.clock.suspended(away)
            self.journal.write("note", f"the job was suspended for {away:.0f} s")

    def _look_at_the_clock(self) -> None:
        """Stop in time by ourselves: Slurm looks at time limits, and warns, once in 30 s only."""
        if time.monotonic() - self.coordinator.absence[1] < LOOK_SECONDS:
            return  # SIGCONT may not have reached us yet
        self.clock.saved(float(self.coordinator.notes.get("save_seconds", 0.0)))
        left = self.clock.last_call()
        if left is not None:
            self._ask_to_stop(f"the allocation ends in {left:.0f} s")

    def _pass_on_alerts(self) -> None:
        """What rank 0 wants somebody to know: a spike, a save that failed."""
        while self.coordinator.alerts:
            kind, _, message = self.coordinator.alerts.pop(0).partition(": ")
            self.journal.write("alert", f"{kind}: {message}")
            self._send_alert(kind, message)

    def _send_alert(self, kind: str, message: str) -> None:
        # Not as a task, which the end of the job would cancel: a thread that is waited for then.
        asyncio.get_running_loop().run_in_executor(None, alerts.send, self.job, kind, message)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """A task that nobody waits for; from being collected while it runs."""
        self._tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(self._tasks.discard)

    def _name_straggler(self) -> None:
        found = self.coordinator.straggler()
        if found is not None and found[2] > STRAGGLER_RATIO:
            rank, host, ratio = found
            self.journal.write("straggler", f"rank {rank} on {host} takes {ratio:.1f} × the median")

    def _master_port(self) -> int:
        """Of the ranks' rendezvous: no survivor of an earlier life or attempt listens there."""
        seed = self.allocation.number * 31 + self.allocation.restart * 7 + self.attempts
        return UNTRIED_PORTS[seed % len(UNTRIED_PORTS)]

    def _run_dir(self) -> Path:
        return Path(self.job.run_dir)
