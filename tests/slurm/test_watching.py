"""``status``, ``logs`` and ``cancel``: with Slurm at hand, and from files alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.goodput import goodput
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import Jobs


def launch(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "launch", *map(str, arguments)]


def test_a_run_is_watched_and_cancelled(
    slurm: SlurmCluster, demo_data: Path, tmp_path: Path
) -> None:
    job = Jobs(slurm, demo_data, tmp_path).launch("watched", "train.steps=2000")
    job.reach(12)
    said = slurm.run(launch("status", job.run_dir)).stdout
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert f"queue: {job.job_id} RUNNING" in lines["state"]
    assert int(lines["step"].split(" of ")[0]) >= 12
    assert lines["step"].endswith(" of 2000")
    assert lines["checkpoint"] == "step 10"
    assert lines["nodes"] == f"node1, node2 (job {job.job_id}, life 1)"
    assert lines["time"].startswith("training ")
    log = slurm.run(launch("logs", job.run_dir)).stdout
    assert "step 12/2000 loss" in log
    assert "rank 1 of 2 on node2" in slurm.run(launch("logs", job.run_dir, "--rank", 1)).stdout
    assert slurm.run(launch("cancel", job.run_dir)).stdout.startswith(f"cancelled job {job.job_id}")
    job.wait(lambda: job.slurm_state() == "CANCELLED", "CANCELLED")
    slurm.wait_until(lambda: not slurm.run(["squeue", "-h"]).stdout or None, 60, "empty queue")
    assert len(job.journal("life")) == 1
    assert "cancelled" in slurm.run(launch("status", job.run_dir)).stdout
    # Where there is no Slurm the files still tell, and the user is told what is missing.
    bare = {**os.environ, "PATH": str(tmp_path)}
    alone = subprocess.run(
        launch("status", job.run_dir), env=bare, capture_output=True, text=True, check=True
    ).stdout
    assert "checkpoint     step " in alone
    spent = goodput(job.records("train"), job.journal())
    assert spent.training > 0
    refused = subprocess.run(
        launch("cancel", job.run_dir), env=bare, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "scancel is not here" in refused.stderr


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_folder_that_is_no_run(command: str, tmp_path: Path) -> None:
    said = subprocess.run(launch(command, tmp_path), capture_output=True, text=True)
    assert said.returncode == 2
    assert said.stderr.startswith("error: ")
    assert len(said.stderr.splitlines()) == 1
