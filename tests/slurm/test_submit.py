"""What Slurm makes of the scripts of ``launch slurm``, and that one run has one job."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.supervisor.journal import read_journal
from tests.support.runs import SMOKE
from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import CLUSTER


class Launcher:
    """Types ``python -m launch`` on the head node."""

    def __init__(self, slurm: SlurmCluster, data: Path, folder: Path) -> None:
        self.slurm = slurm
        self.folder = folder
        self.fixed = [f"data.path={data}", f"output_dir={folder}", "tracking.wandb=disabled"]

    def submit(self, *options: str, **fields: Any) -> subprocess.CompletedProcess[str]:
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(CLUSTER.read_text()), **fields}))
        return self("slurm", SMOKE, *self.fixed, "--cluster", str(path), *options)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *arguments]
        return self.slurm.run(command, cwd=Path.cwd(), check=False)


@pytest.fixture
def launch(slurm: SlurmCluster, demo_data: Path, tmp_path: Path) -> Launcher:
    return Launcher(slurm, demo_data, tmp_path)


def test_run_in_the_queue_is_not_launched_again(launch: Launcher) -> None:
    first = launch.submit(sbatch_options=["--hold"])
    assert first.returncode == 0, first.stderr
    [_, event] = read_journal(launch.folder / "smoke/slurm")
    job_id = event["job"]
    second = launch.submit()
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == (
        f"error: {launch.folder}/smoke: job {job_id} PENDING already works on this run; wait for "
        f"it, or cancel it with: python -m launch cancel {launch.folder}/smoke\n"
    )
    assert launch("cancel", f"{launch.folder}/smoke").returncode == 0
    third = launch.submit(sbatch_options=["--hold"])
    assert third.returncode == 0, third.stderr
    launch("cancel", f"{launch.folder}/smoke")


def test_slurm_reads_the_directives_as_they_are_meant(launch: Launcher) -> None:
    attack = "x\n#SBATCH --comment=attacked\n"
    options = ["--hold", "--comment=ours/it"]
    done = launch.submit(
        "--time=1:00:00",
        sbatch_options=options,
        cpus_per_task=2,
        exclusive=True,
        environment={"VALUE": {"value": attack, "reason": "to be quoted"}},
    )
    assert done.returncode == 0, done.stderr
    [_, event] = read_journal(launch.folder / "smoke/slurm")
    job = launch.slurm.job(event["job"])
    launch.slurm.run(["scancel", event["job"]])
    expected = {
        "JobName": "smoke", "Partition": "debug", "TimeLimit": "01:00:00", "Requeue": "1",
        "NumNodes": "2-2", "NtasksPerN:B:S:C": "1:0:*:*", "CPUs/Task": "2", "OverSubscribe": "NO",
        "Comment": "ours/it", "StdOut": f"{launch.folder}/smoke/logs/slurm-{event['job']}.log",
    }  # fmt: skip
    assert {name: job.get(name) for name in expected} == expected
    assert job["WorkDir"].startswith(f"{launch.folder}/smoke/code/")


def test_dry_run_asks_slurm(launch: Launcher) -> None:
    good = launch.submit("--dry-run")
    assert "# sbatch --test-only: sbatch: Job " in good.stdout.splitlines()[-1]
    bad = launch.submit("--dry-run", partition="nowhere")
    verdict = bad.stdout.splitlines()[-1]
    assert verdict.startswith("# sbatch --test-only: ")
    assert "invalid partition" in verdict
    assert not (launch.folder / "smoke").exists()
