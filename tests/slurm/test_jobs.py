"""Runs as real jobs: what ends them, and that they come back to the same end."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.goodput import goodput
from tests.support.slurm_jobs import Job, Jobs, own_cluster, ranks_on, send

# Of the losses of 50 steps that were partly done on one rank: rounding, which training amplifies.
OTHER_LAYOUT = 1e-3


def test_run_comes_to_its_end(jobs: Jobs, expected: list[float]) -> None:
    job = jobs.launch("plain")
    job.finish()
    assert job.losses() == expected
    assert [event["event"] for event in job.journal() if event["event"] != "submitted"] == [
        "launch", "life", "health", "attempt", "finished",
    ]  # fmt: skip
    job.wait(lambda: job.slurm_state() == "COMPLETED", "COMPLETED")


def test_users_own_position_method_is_found_by_the_ranks(jobs: Jobs) -> None:
    """It lies beside the launcher here, and not in the copy of the code that the ranks have."""
    own = "tests.support.custom_position:LogarithmicBias"
    job = jobs.launch("own", f"model.position={own}", "train.steps=2", "schedule.total_steps=50")
    job.finish()
    assert len(job.losses()) == 2


def test_warning_signal_saves_and_requeues(jobs: Jobs, expected: list[float]) -> None:
    job = jobs.launch("warned")
    job.reach(12)
    jobs.cluster.signal_batch(job.job_id, "USR1")
    jobs.cluster.signal_batch(job.job_id, "USR1")  # signals come twice
    job.finish()
    assert job.losses() == expected
    stopped = job.journal("stopped")
    assert len(stopped) == 1
    [stop] = [event for event in job.records("event") if event["event"] == "stop"]
    assert stop["step"] >= 12
    steps = [line["step"] for line in job.records("train")]
    assert steps == sorted(set(steps)), "a step was lost or done twice"
    assert {event["restart"] for event in job.journal("life")} == {0, 1}
    assert_time_is_accounted_for(job)


def assert_time_is_accounted_for(job: Job) -> None:
    """Of a run that was queued again once: all its seconds, each once."""
    events, steps = job.journal(), job.records("train")
    spent = goodput([*steps, *job.records("event"), *job.records("evaluation")], events)
    assert spent.total == events[-1]["time"] - events[0]["time"]
    assert spent.training == pytest.approx(sum(line["step_seconds"] for line in steps))
    assert spent.repeated == 0.0
    assert spent.saving > 0.0
    [leave] = job.journal("leave")
    first, second = job.journal("life")
    waited = first["time"] - events[0]["time"] + second["time"] - leave["time"]
    assert spent.queueing == pytest.approx(waited)
    assert second["time"] - leave["time"] > 3.0, "Slurm lets a credential expire first"
    # Health checks and imports, of both lives.
    assert spent.starting > sum(event["seconds"] for event in job.journal("health"))
    parts = ("training", "repeated", "saving", "evaluating", "queueing", "starting")
    assert sum(getattr(spent, part) for part in parts) == pytest.approx(spent.total)


def alert_command(folder: Path) -> tuple[tuple[str, str], Path]:
    """Options of a launch with a command for its alerts, and the file that they end up in."""
    command, told = folder / "alert.sh", folder / "alerts"
    command.write_text(f'#!/bin/sh\necho "$2: $3" >> {told}\n')
    command.chmod(0o755)
    return ("--alert", str(command)), told


def test_crashed_rank_restarts_inside_the_allocation(
    jobs: Jobs, tmp_path: Path, expected: list[float]
) -> None:
    """And somebody is told, of this and of what the training loop finds."""
    options, told = alert_command(tmp_path)
    spikes = ("train.spike.threshold=0.0001", "train.spike.window=2")
    job = jobs.launch("crashed", *spikes, options=options)
    job.reach(12)
    [pid] = ranks_on(jobs.cluster, "node2")
    send(pid, signal.SIGKILL)
    job.finish()
    assert job.losses() == expected
    assert len(job.journal("life")) == 1
    assert len(job.journal("attempt")) == 2
    [crash] = job.journal("crash")
    assert "rank 1" in crash["message"]
    assert "crash: " in told.read_text()
    found = [line for line in job.records("event") if line["event"] == "spike"]
    assert found
    job.wait(lambda: told.read_text().count("spike: ") == len(job.journal("alert")), "alerts")
    assert {one["message"] for one in job.journal("alert")} <= {
        f"spike: {line['message']}" for line in found
    }


def test_rank_whose_end_slurm_does_not_notice(jobs: Jobs, expected: list[float]) -> None:
    """Its node's slurmstepd stands still: neither is srun told that the rank is gone, nor can it
    have the step ended there."""
    job = jobs.launch("unnoticed")
    job.reach(12)
    [pid] = ranks_on(jobs.cluster, "node2")
    daemons = jobs.cluster.step_daemons("node2")
    for daemon in daemons:
        send(daemon, signal.SIGSTOP)
    send(pid, signal.SIGKILL)
    job.wait(lambda: job.journal("crash"), "the crash")
    for daemon in daemons:
        send(daemon, signal.SIGCONT)
    job.finish()
    assert job.losses() == expected
    [crash] = job.journal("crash")
    assert crash["message"].endswith(
        "rank 1 ended with exit code 137, and srun did not end the step"
    )
    assert len(job.journal("life")) == 1


def test_users_scancel_is_respected(jobs: Jobs) -> None:
    job = jobs.launch("cancelled")
    job.reach(3)
    jobs.cluster.run(["scancel", job.job_id])
    job.wait(lambda: job.slurm_state().startswith("CANCELLED"), "CANCELLED")
    [leave] = job.journal("leave")
    assert "cancelled by its user" in leave["message"]
    assert len(job.journal("life")) == 1


@pytest.mark.parametrize("mode", ["REQUEUE", "CANCEL"])
def test_preempted_run_comes_back(
    mode: str, demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    """CANCEL kills the job for good: it submits itself again."""
    with own_cluster(preempt_mode=mode, kill_wait_seconds=6) as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch("preempted", exclusive=True)
        job.reach(12)
        cluster.submit(
            "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"
        )
        job.finish()
        assert job.losses() == expected
        assert len({(life["job"], life["restart"]) for life in job.journal("life")}) == 2
        assert job.journal("leave")[0]["message"].startswith("preempt")


def test_hanging_rank_is_named_and_the_run_goes_on(jobs: Jobs, expected: list[float]) -> None:
    # Without saves on the way: in one, ranks are given longer than this.
    overrides = ("supervision.hang_timeout_seconds=15", "checkpoint.save_every=1000")
    job = jobs.launch("hung", *overrides)
    job.reach(12)
    [pid] = ranks_on(jobs.cluster, "node2")
    send(pid, signal.SIGSTOP)
    job.finish()
    assert job.losses() == expected
    [hang] = job.journal("hang")
    assert "rank 1 on node2" in hang["message"]
    assert "Thread 0x" in (job.run_dir / "logs" / "rank_0.log").read_text(), "no stacks"
    assert len(job.journal("life")) == 1


def test_crash_at_every_start_ends_in_a_loop_break(jobs: Jobs, tmp_path: Path) -> None:
    options, told = alert_command(tmp_path)
    job = jobs.launch(
        "looping",
        "supervision.max_restarts_without_progress=4",
        options=options,
        environment={"GLOO_SOCKET_IFNAME": {"value": "nothere", "reason": "to crash"}},
        health_check=False,
    )
    job.wait(lambda: job.journal("loop"), "the loop breaker", 120)
    job.wait(lambda: job.slurm_state() == "FAILED", "FAILED")
    assert len(job.journal("attempt")) == 5
    assert "5 failures in a row without a new checkpoint" in job.journal("loop")[0]["message"]
    assert "loop:" in told.read_text()
    assert len(job.journal("life")) == 1


def test_users_mistake_is_not_tried_again(jobs: Jobs) -> None:
    job = jobs.launch("mistaken", "evaluation.max_tokens=32")
    job.wait(lambda: job.slurm_state() == "FAILED", "FAILED")
    [mistake] = job.journal("mistake")
    assert "evaluation.lengths" in mistake["message"]
    assert jobs.cluster.job(job.job_id)["ExitCode"] == "2:0"
    # This cluster keeps no accounts: sacct is there, and says so.
    said = jobs.cluster.run([sys.executable, "-m", "launch", "status", job.run_dir]).stdout
    assert "queue: no job of this run; no accounting to ask" in said


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_power_cut_of_a_node(
    node: str, demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    with own_cluster() as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch("cut")
        job.reach(12)
        cluster.power_off(node)
        cluster.wait_until(lambda: "DOWN" in cluster.node(node)["State"] or None, 60, "DOWN")
        cluster.power_on(node)
        job.finish(120)
        np.testing.assert_allclose(job.losses(), expected, rtol=OTHER_LAYOUT)
        # The batch script lives on the first node: the job is queued again. On the second it goes
        # on inside the allocation, at once and on one node.
        assert len(job.journal("life")) == (2 if node == "node1" else 1)
