"""The allocation's end, for good and for a while: time limits, early signals, suspension."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.slurm_jobs import Jobs, own_cluster, ranks_on, send

MODULE = "() {  sleep 3\n}"


def test_time_limit_that_ends_the_job_before_it_has_saved(
    demo_data: Path, tmp_path: Path, expected: list[float]
) -> None:
    """A rank does not answer, as in a save that takes longer than Slurm's KillWait."""
    with own_cluster(kill_wait_seconds=8) as cluster:
        job = Jobs(cluster, demo_data, tmp_path).launch(
            "limited", options=("--time", "1"), lead_seconds=10
        )
        job.reach(12)
        [pid] = ranks_on(cluster, "node2")
        send(pid, signal.SIGSTOP)
        job.wait(lambda: job.journal("submitted")[1:], "the job that goes on", 120)
        [stopping] = job.journal("stopping")
        # By our own clock or by Slurm's warning, which comes up to half a minute early or late.
        assert stopping["message"].startswith(("the allocation ends in ", "SIGUSR1"))
        job.finish()
        assert job.losses() == expected
        assert cluster.job("1")["JobState"] == "TIMEOUT"
        assert [life["job"] for life in job.journal("life")] == ["1", "2"]


def test_signal_before_anybody_listens(
    jobs: Jobs, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the batch script loads its environment modules."""
    monkeypatch.setenv("BASH_FUNC_module%%", MODULE)
    job = jobs.launch("early", modules=["slow"])
    job.wait(lambda: job.slurm_state() == "RUNNING", "RUNNING")
    time.sleep(0.5)
    assert not job.journal("life")
    jobs.cluster.signal_batch(job.job_id, "USR1")
    job.reach(5)
    # The script ignores them for the moment in which nobody listens; what it starts does not.
    started = [pid for pid, command in jobs.cluster.processes("node1") if "srun" in command]
    for pid in [*started, *ranks_on(jobs.cluster, "node2")]:
        assert not ignored(pid) & {signal.SIGUSR1, signal.SIGTERM}
    job.finish()
    assert job.losses() == expected
    assert [event["restart"] for event in job.journal("life")] == [0, 1]
    [stopped], [leave] = job.journal("stopped"), job.journal("leave")
    assert stopped["message"] == "before the ranks were started"
    assert leave["message"] == f"SIGUSR1; requeued job {job.job_id}"


def ignored(pid: int) -> set[int]:
    """Signals that a process ignores."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigIgn:")[2].split()[0], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_suspended_job_goes_on_where_it_was(jobs: Jobs, expected: list[float]) -> None:
    """For longer than it would take to be a hang."""
    job = jobs.launch("suspended", "supervision.hang_timeout_seconds=15")
    job.reach(12)
    jobs.cluster.run(["scontrol", "suspend", job.job_id])
    time.sleep(18)
    jobs.cluster.run(["scontrol", "resume", job.job_id])
    job.finish()
    assert job.losses() == expected
    assert len(job.journal("attempt")) == 1
    [note] = job.journal("note")
    assert note["message"].startswith("the job was suspended for 1")
