"""``python -m launch check`` climbs its ladder on a real cluster, and says what does not hold."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import CLUSTER


def check(
    slurm: SlurmCluster, data: Path, folder: Path, *options: str, **fields: Any
) -> subprocess.CompletedProcess[str]:
    """Climb on the head node; ``fields`` are put over those of the cluster file."""
    path = folder / "this.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(CLUSTER.read_text()), **fields}))
    command = [
        sys.executable, "-m", "launch", "check", "--cluster", str(path),
        f"data.path={data}", f"output_dir={folder}", *options,
    ]  # fmt: skip
    return slurm.run(command, cwd=Path.cwd(), check=False, timeout_seconds=280)


def no_jobs(slurm: SlurmCluster) -> bool:
    slurm.wait_until(lambda: not slurm.run(["squeue", "-h"]).stdout or None, 30, "empty queue")
    return True


def test_it_holds(slurm: SlurmCluster, demo_data: Path, tmp_path: Path) -> None:
    done = check(slurm, demo_data, tmp_path, "--window=6")
    said = done.stdout
    assert done.returncode == 0, f"{said}{done.stderr}"
    for expected in (
        "rung 1, one device: nodes × devices = 1 × 1\n",
        "\n  losses      20 steps, 5.",
        "\n  all-reduce  not measured: there is one node\n",
        "\nrung 2, one node: not there: a node has one device: it is rung 1\n",
        "\nrung 3, two nodes: nodes × devices = 2 × 1\n",
        "\n  parity      20 steps within ",
        " GB/s between 2 nodes\n",
        "\n  kill        all ranks killed at step ",
        "\n  requeue     warned, saved step ",
        "\nthe ladder holds: rungs 1, 3 of 3\n",
    ):
        assert expected in said
    assert said.count(" tokens/s, ") == 2
    [folder] = tmp_path.glob("ladder-this-*")
    assert sorted(path.name for path in folder.iterdir()) == ["rung_1", "rung_3"]
    assert no_jobs(slurm)


@pytest.mark.parametrize(
    ("fields", "options", "why"),
    [
        # The job ends before the supervisor's first word.
        (
            {"venv": "/nowhere"},
            [],
            "no job of the run is in the queue; last word: submitted: job ",
        ),
        # It never begins.
        ({"sbatch_options": ["--hold"]}, ["--timeout=3"], "PENDING JobHeldUser): --timeout"),
    ],
    ids=["gone", "held"],
)
def test_what_does_not_hold_is_named_and_leaves_no_job(
    fields: dict[str, Any], options: list[str], why: str,
    slurm: SlurmCluster, demo_data: Path, tmp_path: Path,
) -> None:  # fmt: skip
    done = check(slurm, demo_data, tmp_path, *options, **fields)
    assert done.returncode == 1
    assert why in done.stdout.splitlines()[-1]
    assert done.stderr.startswith("error: rung 1, one device, does not hold; its logs are in ")
    assert "rung 3" not in done.stdout
    assert no_jobs(slurm)
