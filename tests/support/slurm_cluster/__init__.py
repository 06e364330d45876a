"""Real Slurm clusters for tests: several nodes on one machine, in namespaces. Needs root."""

from tests.support.slurm_cluster.cluster import FINISHED, SlurmCluster
from tests.support.slurm_cluster.hosts import SlurmError, unavailable, wait_until
from tests.support.slurm_cluster.settings import Settings

__all__ = ["FINISHED", "Settings", "SlurmCluster", "SlurmError", "unavailable", "wait_until"]
