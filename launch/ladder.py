"""``python -m launch check --cluster NAME``: the ladder to climb on a new cluster.

Before the real run, a short training goes rung by rung through the same submission as a real one:
on one device, on one node, on two. Each is compared with the first. The last one is then killed,
and warned and queued again, and has to go on as if nothing had been.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from distributed_lm.config import WHOLE_MODEL_LAYOUT, RunConfig, load_config
from distributed_lm.errors import ConfigError, UserError
from distributed_lm.tracking.metrics_file import read_records
from launch import verdicts
from launch.cancel import cancel
from launch.cluster import Cluster, load_cluster, seconds_of
from launch.environment import environment_without_slurm
from launch.plan import Submission, plan_submission
from launch.queue import ACTIVE_STATES
from launch.script import Wishes
from launch.submit import submit
from launch.supervisor.journal import job_ids, newest_step, read_journal
from launch.verdicts import Finding

T = TypeVar("T")
SMOKE = Path("configs/runs/smoke.yaml")
STEPS = 20
# Of the training that is interrupted: two to interrupt it at, the rest to have time for it.
CHECKPOINTS = 6
POLL_SECONDS = 0.5
QUEUE_SECONDS = 5.0
COMMAND_SECONDS = 30.0
# No job of the run in the queue, and no word that it is finished: files can be late, jobs cannot.
GONE_SECONDS = 15.0


class LadderError(UserError):
    """A rung did not hold."""

    exit_code = 1


@dataclass(frozen=True)
class Rung:
    """One size of run."""

    number: int
    name: str
    nodes: int
    devices: int
    """Per node."""
    lacking: str | None = None
    """Why this cluster does not have it."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices


def check(
    cluster: Annotated[
        str, typer.Option(metavar="NAME", help="File in configs/clusters, or its path.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="Config to shorten, by default the smoke run, and fields of it to change.",
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes to use. Default: as in the cluster file.")
    ] = None,
    timeout: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="For all rungs, with their queueing.")
    ] = 900,
    window: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="Of training in which to interrupt it.")
    ] = 30,
) -> None:
    """Try a cluster out: one device, one node, two nodes; parity, bandwidth, kill and resume."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not here; run this on a login node of the cluster")
    given = list(arguments or [])
    path = Path(given.pop(0)) if given and "=" not in given[0] else SMOKE
    config = load_config(path, given)
    file = load_cluster(cluster)
    name = re.sub(r"\W", "_", Path(cluster).stem)
    folder = Path(config.output_dir) / f"ladder-{name}-{datetime.now():%Y%m%d-%H%M%S}"
    rungs = rungs_of(file, config, nodes or file.nodes)
    ladder = Ladder(path, given, file, rungs, folder, time.monotonic() + timeout, window)
    typer.echo(f"{path} on {cluster}; run folders: {folder}/rung_N")
    ladder.climb()


def rungs_of(cluster: Cluster, config: RunConfig, nodes: int) -> list[Rung]:
    """The ladder's three rungs, with those that this cluster or config lacks marked."""
    devices = cluster.devices_per_node
    split = config.parallel.tensor * config.parallel.pipeline
    lacking: dict[int, str] = {}
    if nodes < 2:
        lacking[3] = "there is one node to use; raise nodes in the cluster file, or --nodes"
    for number, ranks in ((2, devices), (3, 2 * devices)):
        if ranks % split:
            lacking.setdefault(
                number, f"{ranks} devices are not a multiple of the model's parts, {split}"
            )
    if devices == 1:
        lacking[2] = "a node has one device: it is rung 1"
    return [
        Rung(1, "one device", 1, 1),
        Rung(2, "one node", 1, devices, lacking.get(2)),
        Rung(3, "two nodes", 2, devices, lacking.get(3)),
    ]


def shortened(config: RunConfig, rungs: Sequence[Rung]) -> list[str]:
    """Overrides that make any run one of seconds, the same on every rung."""
    length, parallel = config.data.sequence_length, config.parallel
    split = parallel.tensor * parallel.pipeline
    rounds = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    parts = [1, *(rung.ranks // split for rung in rungs if rung.number > 1)]
    batch = math.lcm(
        config.data.block_size // length,
        *(config.batch.micro_batch_size * part * rounds for part in parts),
    )
    return [
        f"train.steps={STEPS}", "train.log_every=1", "train.spike.action=log",
        "train.profile.start_step=0", f"batch.global_batch_size={batch}",
        # Not of train.steps, which grows for the interruptions; and no steps that change nothing.
        "schedule.kind=constant", "schedule.warmup_steps=5", "schedule.total_steps=null",
        "schedule.decay_steps=null", "schedule.period_steps=null", "schedule.period_multiplier=1",
        "schedule.period_shrink=1", "schedule.warmup_start_ratio=0",
        "evaluation.every=0", f"evaluation.lengths=[{length}]",
        f"evaluation.max_tokens={32 * length}",
        f"checkpoint.save_every={STEPS // 2}", "checkpoint.keep_last=2", "checkpoint.keep_every=0",
        "tracking.wandb=disabled",
    ]  # fmt: skip


class Ladder:
    """Climbs the rungs in turn, and says how each of them was."""

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str],
        cluster: Cluster,
        rungs: Sequence[Rung],
        folder: Path,
        deadline: float,
        window_seconds: float,
    ) -> None:
        self.path = path
        self.cluster = cluster
        self.rungs = rungs
        self.folder = folder
        self.deadline = deadline
        self.window_seconds = window_seconds
        climbed = [rung for rung in rungs if rung.lacking is None]
        self.last = climbed[-1]
        self.overrides = [*shortened(load_config(path, overrides), climbed), *overrides]
        for rung in climbed:  # before the first one is queued
            self._plan(rung)

    def climb(self) -> None:
        """Raises LadderError at the first rung that does not hold."""
        expected: dict[int, float] = {}
        for rung in self.rungs:
            if rung.lacking is not None:
                typer.echo(f"rung {rung.number}, {rung.name}: not there: {rung.lacking}")
                continue
            started = time.monotonic()
            typer.echo(
                f"rung {rung.number}, {rung.name}: nodes × devices = {rung.nodes} × {rung.devices}"
            )
            try:
                problem = self._climb_one(rung, expected)
            except LadderError as error:
                problem = str(error)
            seconds = f"{time.monotonic() - started:.0f} s"
            if problem is not None:
                typer.echo(f"  failed in {seconds}: {problem}")
                raise LadderError(
                    f"rung {rung.number}, {rung.name}, does not hold; its logs are in "
                    f"{self.folder}/rung_{rung.number}/logs"
                )
            typer.echo(f"  passed in {seconds}")
        climbed = [str(rung.number) for rung in self.rungs if rung.lacking is None]
        typer.echo(f"the ladder holds: rungs {', '.join(climbed)} of {len(self.rungs)}")

    def _climb_one(self, rung: Rung, expected: dict[int, float]) -> str | None:
        """Returns why it failed, if it did."""
        launch = Launch(self._plan(rung), self.deadline)
        launch.finish()
        found, config = verdicts.losses(launch.metrics()), launch.submission.config
        steps = config.train.steps
        if rung.number == 1:
            expected.update(found)
            parity = verdicts.judge_reference(found, steps)
        else:
            parity = verdicts.judge_parity(found, expected, steps, config.precision)
        findings = [parity, verdicts.judge_bandwidth(launch.journal(), rung.nodes)]
        findings.append(verdicts.judge_speed(launch.metrics()))
        problem = report(findings)
        if problem is None and rung is self.last:
            launch.leave_queue()
            return report(self._interrupt(rung, verdicts.step_seconds(launch.metrics())))
        return problem

    def _interrupt(self, rung: Rung, step_seconds: float) -> list[Finding]:
        """Have the rung's run go on; kill all its ranks, then warn the job as before its limit."""
        more = max(2 * STEPS, math.ceil(self.window_seconds / step_seconds))
        submission = self._plan(rung, more)
        launch = Launch(submission, self.deadline, provoked=("crash",))
        run_dir = submission.config.run_dir

        def saved_after(step: int) -> Callable[[], bool]:
            return lambda: newest_step(run_dir) > step

        try:
            launch.wait(saved_after(newest_step(run_dir)), "a checkpoint")
            launch.kill_ranks()
            launch.wait(lambda: launch.count("crash") == 1, "the end of the killed ranks")
            launch.wait(saved_after(newest_step(run_dir)), "a checkpoint after the kill")
            launch.warn()
            launch.finish()
        finally:
            launch.cancel_unless_finished()
        metrics = launch.metrics()
        return [
            verdicts.judge_kill(metrics, submission.config.precision),
            verdicts.judge_requeue(metrics, launch.journal()),
        ]

    def _plan(self, rung: Rung, more_steps: int = 0) -> Submission:
        sized = {"nodes": rung.nodes, "devices_per_node": rung.devices}
        cluster = self.cluster.model_copy(update=sized)
        layout = WHOLE_MODEL_LAYOUT if rung.number == 1 else ()
        last = [f"output_dir={self.folder}", f"name=rung_{rung.number}"]
        overrides = [*self.overrides, *layout, *last]
        if more_steps:
            steps = load_config(self.path, overrides).train.steps + more_steps
            every = max(STEPS // 2, more_steps // CHECKPOINTS)
            overrides += [f"train.steps={steps}", f"checkpoint.save_every={every}"]
        chain = 1 if more_steps and not cluster.commands_on_nodes else 0
        wishes = Wishes(nodes=rung.nodes, time=self._job_time(), chain=chain)
        return plan_submission(self.path, overrides, cluster, wishes)

    def _job_time(self) -> str:
        """No more than the ladder needs: short jobs find a place sooner."""
        limit = seconds_of(self.cluster.time) or math.inf
        left = max(60.0, self.deadline - time.monotonic())
        needed = left + 2 * self.cluster.lead_seconds
        return self.cluster.time if limit <= needed else str(math.ceil(needed / 60))


class Launch:
    """One submission, and what can be done to it from the login node."""

    def __init__(
        self, submission: Submission, deadline: float, provoked: Sequence[str] = ()
    ) -> None:
        """Args:
        provoked: events that are not this run's own trouble.
        """
        self.submission = submission
        self.deadline = deadline
        self.provoked = provoked
        self._slurm_dir = submission.job.slurm_dir
        self._metrics_path = submission.config.run_dir / "metrics.jsonl"
        # A run folder can hold an earlier launch.
        self._first_event = len(read_journal(self._slurm_dir))
        self._first_line = len(read_records(self._metrics_path))
        self._in_queue = time.monotonic()
        self._next_look = 0.0
        self._queue = ""
        typer.echo(f"  job {submit(submission)}, {submission.config.train.steps} steps")

    def journal(self) -> list[dict[str, Any]]:
        return read_journal(self._slurm_dir)[self._first_event :]

    def metrics(self) -> list[dict[str, Any]]:
        return read_records(self._metrics_path)[self._first_line :]

    def count(self, event: str) -> int:
        return sum(one["event"] == event for one in self.journal())

    def finish(self) -> None:
        """Wait for the end of the run; whatever else happens, no job is left behind."""
        try:
            self.wait(lambda: self.count("finished"), "the end of the run")
        finally:
            self.cancel_unless_finished()

    def leave_queue(self) -> None:
        """Wait until Slurm, too, has done with the job, so that the run can be launched again."""
        self._next_look = 0.0
        self._look_at_the_queue()
        while self._queue and time.monotonic() < self.deadline:
            time.sleep(POLL_SECONDS)
            self._next_look = 0.0
            self._look_at_the_queue()

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Until it is true.

        Raises:
            LadderError: if the run gets into trouble, leaves the queue, or takes too long.
        """
        while not condition():
            trouble = verdicts.trouble(self.journal(), self.provoked)
            if trouble is not None:
                raise LadderError(trouble)
            if self.count("finished"):
                raise LadderError(f"the run was over before {what}; try a longer --window")
            self._look_at_the_queue()
            if time.monotonic() > self.deadline:
                queue = self._queue or "no answer"
                raise LadderError(f"no time left to wait for {what} (queue: {queue}): --timeout")
            time.sleep(POLL_SECONDS)

    def kill_ranks(self) -> None:
        """As a crash of all of them at once: SIGKILL to the step of ranks, not to the job."""
        listed = _slurm("squeue", "--steps", "--noheader", "--format=%i", self._jobs_option())
        steps = [step for step in (listed or "").split() if re.fullmatch(r"\d+\.\d+", step)]
        if not steps or _slurm("scancel", "--signal=KILL", *steps) is None:
            raise LadderError(f"squeue and scancel do not do their part: steps are {steps}")

    def warn(self) -> None:
        """As Slurm does before the end of the allocation."""
        _slurm("scancel", "--batch", "--signal=USR1", str(self.journal()[-1]["job"]))

    def cancel_unless_finished(self) -> None:
        if not self.count("finished"):
            cancel(self.submission.config.run_dir)

    def _jobs_option(self) -> str:
        return f"--jobs={','.join(job_ids(self.journal()))}"

    def _look_at_the_queue(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + QUEUE_SECONDS
        answer = _slurm("squeue", "--noheader", "--format=%i %T %r", self._jobs_option())
        lines = [line for line in (answer or "").splitlines() if line.strip()]
        self._queue = "; ".join(line for line in lines if line.split()[1] in ACTIVE_STATES)
        if self._queue or answer is None:
            self._in_queue = now
        elif now - self._in_queue > GONE_SECONDS:
            last = self.journal()[-1]
            said = verdicts.first_line(last["message"])
            raise LadderError(
                f"no job of the run is in the queue; last word: {last['event']}: {said}"
            )


def report(findings: Sequence[Finding]) -> str | None:
    """Print them; returns what is bad about the first bad one."""
    for finding in findings:
        typer.echo(f"  {finding.name:<11} {finding.text}")
    bad = [finding for finding in findings if not finding.is_good]
    return f"{bad[0].name}: {bad[0].text}" if bad else None


def _slurm(*command: str) -> str | None:
    """What a command of Slurm's says; None if it does not answer."""
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS,
            env=environment_without_slurm(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout if asked.returncode == 0 or asked.stdout else None
