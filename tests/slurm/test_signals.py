"""The warning signal at any moment: in training, in an evaluation, in a save, before the first
step, and where the nodes have no commands of Slurm's."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.slurm_jobs import Job, Jobs, own_cluster

# Half a minute of evaluation after step 20 of 22.
LONG_EVALUATION = (
    "evaluation.every=20", "train.steps=22", "schedule.total_steps=50",
    "evaluation.max_tokens=600000", "evaluation.tokens_per_batch=2048",
)  # fmt: skip


def warn_and_finish(jobs: Jobs, job: Job) -> None:
    jobs.cluster.signal_batch(job.job_id, "USR1")
    job.finish()
    assert len(job.journal("stopped")) == 1
    steps = [line["step"] for line in job.records("train")]
    assert steps == sorted(set(steps)), "a step was lost or done twice"


def test_in_an_evaluation(jobs: Jobs, expected: list[float]) -> None:
    """It does not wait for the end of the evaluation, which the next life makes up for."""
    job = jobs.launch("evaluating", *LONG_EVALUATION)
    job.reach(20)
    assert not job.records("evaluation")
    warn_and_finish(jobs, job)
    assert job.losses() == expected[:22]
    [stop] = [event for event in job.records("event") if event["event"] == "stop"]
    assert stop["step"] == 20
    assert [line["step"] for line in job.records("evaluation")] == [20, 22]


def test_in_a_save(jobs: Jobs, expected: list[float]) -> None:
    """With a checkpoint at every step there is always one under way."""
    job = jobs.launch("saving", "checkpoint.save_every=1", "checkpoint.keep_last=2")
    job.reach(12)
    warn_and_finish(jobs, job)
    assert job.losses() == expected


def test_before_the_first_step(jobs: Jobs, expected: list[float]) -> None:
    job = jobs.launch("starting")
    job.wait(lambda: job.journal("attempt"), "the ranks' start", 30)
    jobs.cluster.signal_batch(job.job_id, "USR1")
    job.finish()
    assert job.losses() == expected
    assert len(job.journal("life")) == 2


def test_chain_goes_on_where_nodes_have_no_commands(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    """Nor do the nodes' names resolve, and this Slurm cannot tell the nodes' own interfaces."""
    with own_cluster(client_commands_on_nodes=False, names="none") as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch(
            "chained", options=("--chain", "2"), commands_on_nodes=False
        )
        job.reach(12)
        cluster.signal_batch(job.job_id, "USR1")
        job.finish()
        assert job.losses() == expected
        assert [life["job"] for life in job.journal("life")] == ["1", "2"]
        cluster.wait_until(
            lambda: cluster.job("3")["JobState"] == "COMPLETED" or None, 30, "the chain's last job"
        )
        assert job.journal()[-1]["message"] == "the run is finished"
        assert job.slurm_state() == "FAILED"  # with code 75: not finished


@pytest.mark.parametrize("names", ["loopback", "none"])
def test_names_that_lead_nowhere(
    names: str, demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    with own_cluster(nodes=("alpha7", "gpu-b-02"), names=names) as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch("nameless")
        job.finish()
        assert job.losses() == expected


def test_cancelled_while_the_nodes_are_examined(jobs: Jobs) -> None:
    """The examination is a victim: no node is sick, and the run does not come back."""
    job = jobs.launch("examined")
    job.wait(lambda: job.journal("life"), "the first life", 30)
    jobs.cluster.run(["scancel", job.job_id])
    job.wait(lambda: job.slurm_state() == "CANCELLED", "CANCELLED")
    jobs.cluster.wait_until(
        lambda: not jobs.cluster.run(["squeue", "-h"]).stdout or None, 60, "empty queue"
    )
    assert len(job.journal("life")) == 1
    assert not job.journal("attempt")


def test_controller_away_when_the_run_wants_to_come_back(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    with own_cluster() as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch("patient")
        job.reach(12)
        cluster.stop_controller()
        [supervisor] = [
            pid for pid, command in cluster.processes("node1") if "launch.supervisor" in command
        ]
        os.kill(supervisor, signal.SIGUSR1)
        job.wait(lambda: job.journal("stopped"), "the stop", 60)
        time.sleep(2)
        assert not job.journal("leave")
        cluster.start_controller()
        job.finish(120)
        assert job.losses() == expected
        assert len(job.journal("life")) == 2
