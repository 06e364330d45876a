"""Runs of ``configs/runs/smoke.yaml`` as jobs of a test cluster, as ``python -m launch slurm`` has
them."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from launch.supervisor.journal import read_journal
from tests.support.runs import SMOKE
from tests.support.slurm_cluster import SlurmCluster, SlurmError

CLUSTER = Path("configs/clusters/local_test.yaml")
# Of the reference and of every job: enough steps to hit in the middle, few enough to wait for.
LENGTH = (
    "train.steps=50", "batch.global_batch_size=32", "checkpoint.save_every=10",
    "evaluation.lengths=[64]", "evaluation.max_tokens=2048",
)  # fmt: skip


class Job:
    """A launched run: its folder, its records and its journal."""

    def __init__(self, cluster: SlurmCluster, run_dir: Path, job_id: str) -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self.job_id = job_id

    def records(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in whole if record["kind"] == kind]

    def losses(self) -> list[float]:
        """Of each step, in the life that counted."""
        by_step = {line["step"]: line["loss"] for line in self.records("train")}
        return [by_step[step] for step in sorted(by_step)]

    def journal(self, event: str | None = None) -> list[dict[str, Any]]:
        events = read_journal(self.run_dir / "slurm")
        return [one for one in events if event in (None, one["event"])]

    def reach(self, step: int, seconds: float = 60.0) -> None:
        """Wait until ``step`` is on record."""

        def reached() -> bool:
            return any(record["step"] >= step for record in self.records("train"))

        self.wait(reached, f"step {step}", seconds)

    def finish(self, seconds: float = 90.0) -> None:
        """Wait until the run is finished."""
        self.wait(lambda: bool(self.journal("finished")), "the end of the run", seconds)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
        try:
            self.cluster.wait_until(lambda: condition() or None, seconds, what)
        except SlurmError:
            sys.stdout.write(self.log())  # pytest shows it
            raise

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run_dir.glob("logs/slurm-*.log")))

    def slurm_state(self) -> str:
        return self.cluster.job(self.job_id)["JobState"]


class Jobs:
    """Launches runs from one data set into one folder."""

    def __init__(self, cluster: SlurmCluster, data: Path, output_dir: Path) -> None:
        self.cluster = cluster
        self.fixed = [f"data.path={data}", f"output_dir={output_dir}", "tracking.wandb=disabled"]
        self.output_dir = output_dir

    def launch(
        self, name: str, *overrides: str, options: tuple[str, ...] = (), **cluster_fields: Any
    ) -> Job:
        """Submit a run from the head node.

        Args:
            options: of ``python -m launch slurm``.
            cluster_fields: over those of the cluster file.
        """
        path = self.output_dir / f"{name}-cluster.yaml"
        fields = {**yaml.safe_load(CLUSTER.read_text()), **cluster_fields}
        path.write_text(yaml.safe_dump(fields))
        command = [
            sys.executable, "-m", "launch", "slurm", SMOKE, *self.fixed, f"name={name}", *LENGTH,
            *overrides, "--cluster", str(path), *options,
        ]  # fmt: skip
        said = self.cluster.run(command, cwd=Path.cwd()).stdout
        job_id = said.partition("submitted job ")[2].split()[0].rstrip(",")
        return Job(self.cluster, self.output_dir / name, job_id)


def ranks_on(cluster: SlurmCluster, node: str) -> list[int]:
    """Process ids of the ranks on a node."""
    return [pid for pid, command in cluster.processes(node) if "distributed_lm train" in command]


def send(pid: int, number: int) -> None:
    """A signal to a process of a node: its id is the machine's."""
    os.kill(pid, number)


@contextlib.contextmanager
def own_cluster(**options: Any) -> Iterator[SlurmCluster]:
    """A cluster for one scenario, which must leave nothing behind on it."""
    with SlurmCluster(**options) as cluster:
        yield cluster
        leave_nothing_behind(cluster)


def leave_nothing_behind(cluster: SlurmCluster) -> None:
    """Empty the queue, after which no process of a run may be left on any node."""
    cluster.run(["scancel", "--me"])
    cluster.wait_until(lambda: not cluster.run(["squeue", "-h"]).stdout or None, 60, "empty queue")

    def left() -> list[tuple[int, str]]:
        return [found for node in cluster.settings.nodes for found in cluster.processes(node)]

    # A job is over for Slurm a moment before its last process is.
    with contextlib.suppress(SlurmError):
        cluster.wait_until(lambda: not left() or None, 5, "no process on a node")
    assert not left(), "processes outlive their job"
