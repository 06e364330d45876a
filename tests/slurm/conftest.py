"""Real Slurm clusters. Where none can run, the tests here are skipped, and say why."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, train_run
from tests.support.slurm_cluster import SlurmCluster, unavailable
from tests.support.slurm_jobs import LENGTH, Jobs, leave_nothing_behind, own_cluster


@pytest.fixture(scope="session", autouse=True)
def _clusters_can_run() -> None:
    if reason := unavailable():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """Two nodes. A test that breaks one mends it, or uses a cluster of its own."""
    with own_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def expected(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the uninterrupted run on two ranks, started without Slurm."""
    runs = Runs(demo_data, tmp_path_factory.mktemp("uninterrupted"))
    config = runs.config("smoke", *LENGTH)
    run_distributed(train_run, 2, config)
    return losses(runs.records(config))


@pytest.fixture
def jobs(slurm: SlurmCluster, demo_data: Path, tmp_path: Path) -> Iterator[Jobs]:
    """Runs on the module's cluster."""
    yield Jobs(slurm, demo_data, tmp_path)
    leave_nothing_behind(slurm)
