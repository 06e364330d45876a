"""A study as job arrays: what tuning has chosen gets into runs that were submitted before."""

import sys
from pathlib import Path

import pytest
import yaml

from distributed_lm.study.choice import Choice
from distributed_lm.study.schema import load_study
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import CLUSTER, Job
from tests.support.studies import claim, tiny_study, write_study

ARM = "alibi-16"


@pytest.mark.timeout(400)
def test_a_study_from_tuning_to_report(
    slurm: SlurmCluster, demo_data: Path, tmp_path: Path
) -> None:
    values = tiny_study(
        tmp_path / "runs",
        demo_data,
        arms=[{"name": ARM, "position": "alibi", "length": 16}],
        seeds=[1],
        speed=None,
        scorings=[{"lengths": [16, 32]}],
        claims=[claim("told by one run", (ARM, 32), (ARM, 16), less_than=5.0)],
    )
    study = load_study(write_study(tmp_path / "tiny.yaml", values))
    cluster = {**yaml.safe_load(CLUSTER.read_text()), "nodes": 1, "health_check": False}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    command = [
        sys.executable, "-m", "distributed_lm", "study", str(study.path),
        "--launcher", "slurm", "--cluster", str(tmp_path / "cluster.yaml"),
    ]  # fmt: skip
    submitted = slurm.run(command, cwd=Path.cwd(), check=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    slurm.wait_until(
        lambda: not slurm.run(["squeue", "-h"]).stdout.split() or None, 300, "empty queue"
    )
    tuned = Choice.read(study.folder).tuned[ARM]
    assert tuned.rate == 1e-2, "the smaller rate was the placeholder of the submitted config"
    run = Job(slurm, study.folder / f"{ARM}-seed1", "")
    assert max(record["learning_rate"] for record in run.records("train")) == tuned.rate
    report = (study.folder / "report.md").read_text()
    assert "? cannot tell: one pair of runs" in report
    assert "| alibi-16 | 16 |" in report
    # Again: nothing is left to do but the report.
    again = slurm.run(command, cwd=Path.cwd(), check=False)
    assert again.stdout.count("left out") >= 2, again.stdout
