"""The environment of a launched rank: the only file of the launcher that reads or makes one."""

import os
from collections.abc import Mapping


def rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What the launcher adds to the environment of one rank on this machine.

    Args:
        rank: of ``processes`` on this machine, which is the whole run.
        port: TCP port of the rendezvous, free on 127.0.0.1.
    """
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Into a file Python writes whole blocks: a killed rank would lose its last words.
        "PYTHONUNBUFFERED": "1",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(threads_per_process(processes))
    return variables


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with ``variables`` on top."""
    return {**os.environ, **variables}


def environment_without_slurm() -> dict[str, str]:
    """For Slurm's commands: variables of a job that we may be in would become the new job's."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"
    }


def threads_per_process(processes: int) -> int:
    """Threads that let ``processes`` share the cores this process may use, without a fight."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    return max(1, cores // processes)
