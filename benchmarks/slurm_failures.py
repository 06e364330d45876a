"""What each kind of failure costs a run under Slurm: steps done twice, and seconds until the next
new step. On the test cluster of this repository: needs root and Debian's Slurm.

    python -m benchmarks.slurm_failures data/sotu-bytes
"""

import argparse
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support.slurm_cluster import SlurmCluster
from tests.support.slurm_jobs import Job, Jobs, ranks_on, send

Failure = Callable[[SlurmCluster, Job], None]


def warning(cluster: SlurmCluster, job: Job) -> None:
    cluster.signal_batch(job.job_id, "USR1")


def preemption(cluster: SlurmCluster, job: Job) -> None:
    options = ["--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null"]
    cluster.submit(*options, "--wrap=sleep 1")


def killed_rank(cluster: SlurmCluster, job: Job) -> None:
    send(ranks_on(cluster, "node2")[0], signal.SIGKILL)


def stopped_rank(cluster: SlurmCluster, job: Job) -> None:
    send(ranks_on(cluster, "node2")[0], signal.SIGSTOP)


def power_cut(node: str) -> Failure:
    def cut(cluster: SlurmCluster, job: Job) -> None:
        cluster.power_off(node)
        cluster.wait_until(lambda: "DOWN" in cluster.node(node)["State"] or None, 60, "DOWN")
        cluster.power_on(node)

    return cut


def cut_link(cluster: SlurmCluster, job: Job) -> None:
    cluster.link_down("node2")
    job.wait(lambda: len(job.journal("attempt")) == 2, "an attempt without node2")
    cluster.link_up("node2")


FAILURES: tuple[tuple[str, Failure], ...] = (
    ("warning signal or end of the allocation", warning),
    ("preemption", preemption),
    ("a rank is killed", killed_rank),
    ("a rank hangs (timeout of 12 s)", stopped_rank),
    ("power cut of the first node", power_cut("node1")),
    ("power cut of another node", power_cut("node2")),
    ("another node's link is cut", cut_link),
)


def measure(name: str, fail: Failure, data: Path, folder: Path) -> tuple[int, float, str]:
    """Steps done twice, seconds to the next new step, and where the run went on."""
    with SlurmCluster() as cluster:
        job = Jobs(cluster, data, folder).launch(
            name, "supervision.hang_timeout_seconds=12", exclusive=True
        )
        job.reach(17)
        failed_at = time.time()
        fail(cluster, job)
        job.finish(180)
        steps = job.records("train")
        [*_, last_start] = [event["time"] for event in job.journal("attempt")]
        went_on = min(line["time"] for line in steps if line["time"] > last_start)
        lives = len(job.journal("life"))
        nodes = len(job.journal("attempt")[-1]["nodes"])
    where = "queued again" if lives > 1 else "in its allocation"
    repeated = len(steps) - len({line["step"] for line in steps})
    return repeated, went_on - failed_at, f"{where}, {nodes} of 2 nodes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a prepared data set")
    data = parser.parse_args().data.resolve()
    table = Table()
    for column in ("failure", "steps done twice", "seconds to the next new step", "goes on"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, fail) in enumerate(FAILURES):
            repeated, seconds, where = measure(f"run-{number}", fail, data, Path(folder))
            table.add_row(name, str(repeated), f"{seconds:.0f}", where)
    Console().print(table)


if __name__ == "__main__":
    main()
