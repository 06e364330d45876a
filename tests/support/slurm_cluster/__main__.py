"""Command line: a cluster to play with.

python -m tests.support.slurm_cluster up
eval "$(python -m tests.support.slurm_cluster env BASE)"
srun -N2 hostname
python -m tests.support.slurm_cluster down BASE
"""

import argparse
import shlex
import sys
from pathlib import Path

from tests.support.slurm_cluster import hosts
from tests.support.slurm_cluster.cluster import SlurmCluster, client_environment


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up", help="start a cluster that stays")
    up.add_argument("--base", type=Path, help="its folder, new or empty; default: one in /tmp")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--gpus", type=int, default=0, help="fake GPUs per node")
    for action, text in (("env", "print what a shell should evaluate"), ("down", "end it")):
        actions.add_parser(action, help=text).add_argument("base", type=Path)
    arguments = parser.parse_args()
    if reason := hosts.unavailable():
        sys.stderr.write(f"error: {reason}\n")
        return 2
    if arguments.action == "up":
        names = tuple(f"node{index + 1}" for index in range(arguments.nodes))
        cluster = SlurmCluster(arguments.base, nodes=names, gpus_per_node=arguments.gpus)
        cluster.up(detached=True)
        command = "python -m tests.support.slurm_cluster"
        sys.stdout.write(
            f"{cluster.base}\n"
            f'# to use it:  eval "$({command} env {cluster.base})"\n'
            f"# to end it:  {command} down {cluster.base}\n"
        )
    elif arguments.action == "env":
        for name, value in client_environment(arguments.base.resolve()).items():
            sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    elif (arguments.base / "etc/slurm/slurm.conf").exists():  # end() would remove any folder
        hosts.end(arguments.base.resolve())
    else:
        sys.stderr.write(f"error: no cluster in {arguments.base}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
