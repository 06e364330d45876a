"""What a cluster is like, and the configuration files that make it so."""

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CLIENT_COMMANDS = (
    *("sbatch", "srun", "salloc", "scancel", "scontrol", "sinfo", "squeue", "sacct"),
    *("sacctmgr", "sattach", "sbcast", "sdiag", "sprio", "sreport", "sshare", "sstat", "strigger"),
)
SOCKET_PATH_LIMIT = 107  # characters in the path of a UNIX socket


@dataclass(frozen=True)
class Settings:
    """Options of ``SlurmCluster``."""

    nodes: tuple[str, ...] = ("node1", "node2")
    """Host names of the compute nodes."""
    cpus_per_node: int = 4
    """What Slurm believes; the machine may have fewer."""
    memory_mb: int = 16_000
    """Memory per node that Slurm believes in; a task over its share is killed within a second."""
    gpus_per_node: int = 0
    """Null devices under other names: Slurm counts them and sets CUDA_VISIBLE_DEVICES."""
    names: Literal["resolve", "loopback", "none"] = "resolve"
    """Which host names resolve: all; all, but a host's own to 127.0.1.1 as on Debian; none."""
    client_commands_on_nodes: bool = True
    """False: of Slurm's commands a node has only srun."""
    preempt_mode: Literal["REQUEUE", "CANCEL"] = "REQUEUE"
    """What a job in partition ``urgent`` does to jobs in ``debug`` that are in its way."""
    kill_wait_seconds: int = 3
    """From SIGTERM to SIGKILL, at a time limit or a preemption."""
    extra_config: str = ""
    """More lines for slurm.conf."""

    def __post_init__(self) -> None:
        if len({"head", *self.nodes}) != len(self.nodes) + 1:
            raise ValueError(f"names of nodes must differ, and not be `head`: {self.nodes}")

    @property
    def addresses(self) -> dict[str, str]:
        """IP address by host, the head's included. Every cluster has a network of its own."""
        nodes = {name: f"10.99.0.{11 + index}" for index, name in enumerate(self.nodes)}
        return {"head": "10.99.0.1", **nodes}


def check_folder(base: Path, settings: Settings) -> None:
    """A cluster's folder is removed with the cluster, so it must be its own."""
    if base.exists() and any(base.iterdir()):
        raise ValueError(f"{base} is not empty")
    longest = max(settings.nodes, key=len)
    socket = f"{base}/spool/{longest}/{longest}_99999.4294967295"
    if len(socket) > SOCKET_PATH_LIMIT:
        raise ValueError(
            f"{socket} has {len(socket)} characters; a UNIX socket's path has at most"
            f" {SOCKET_PATH_LIMIT}. Take a shorter folder."
        )


def write_files(base: Path, settings: Settings) -> None:
    """Fill the folder with all that the hosts read."""
    for folder in ("bin", "dev", "etc/slurm", "hidden", "log", "munge", "run", "spool", "state"):
        (base / folder).mkdir(parents=True)
    for node in settings.nodes:
        (base / "spool" / node).mkdir()
    for host in settings.addresses:
        (base / "etc" / f"hosts.{host}").write_text(_hosts_file(host, settings))
    (base / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    (base / "etc/slurm/slurm.conf").write_text(_slurm_conf(base, settings))
    (base / "etc/slurm/gres.conf").write_text(_fake_gpus(base / "dev", settings.gpus_per_node))
    # None are used, but slurmd ends when it is left to find out which version the machine has.
    (base / "etc/slurm/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = base / "munge/munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    os.mkfifo(base / "run/forever")
    _write_commands(base)
    if not settings.client_commands_on_nodes:
        for command in {*CLIENT_COMMANDS} - {"srun"}:
            # A character device 0:0 is overlayfs's sign that a file is not there.
            os.mknod(base / "hidden" / command, stat.S_IFCHR, os.makedev(0, 0))


def _hosts_file(host: str, settings: Settings) -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for name, address in settings.addresses.items():
        if settings.names == "loopback" and name == host:
            lines.append(f"127.0.1.1 {name}")
        elif settings.names != "none":
            # torch looks up the names of peers on IPv6 sockets: elsewhere DNS answers that.
            lines += [f"{address} {name}", f"::ffff:{address} {name}"]
    return "\n".join(lines) + "\n"


def _fake_gpus(folder: Path, count: int) -> str:
    """Make the devices; return gres.conf. Names must end in the index, and plain files fail."""
    for index in range(count):
        os.mknod(folder / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    return "".join(f"Name=gpu File={folder}/gpu{index}\n" for index in range(count))


def _write_commands(base: Path) -> None:
    """``bin``: the client commands as somebody outside the cluster calls them."""
    for command in CLIENT_COMMANDS:
        real = shutil.which(command, path="/usr/bin")
        script = base / "bin" / command
        script.write_text(
            "#!/bin/sh\n"
            f'exec nsenter --target "$(cat {base}/run/head.pid)" --net --uts --mount \\\n'
            f'    env --chdir="$PWD" SLURM_CONF={base}/etc/slurm/slurm.conf {real} "$@"\n'
        )
        script.chmod(0o755)


def _slurm_conf(base: Path, settings: Settings) -> str:
    cpus, gpus = settings.cpus_per_node, settings.gpus_per_node
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={settings.addresses[name]} CPUs={cpus} Sockets=1"
        f" CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={settings.memory_mb}"
        + (f" Gres=gpu:{gpus}" if gpus else "")
        for name in settings.nodes
    )
    return f"""\
ClusterName=test
SlurmctldHost=head({settings.addresses["head"]})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for cred_expire; below 5 it is silently 120.
AuthInfo=socket={base}/munge/munge.sock,cred_expire=5

StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true

# Without cgroups, and believing this file rather than the hardware.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={settings.memory_mb // cpus}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
GresTypes=gpu

# At once, instead of within a minute.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmctldTimeout=5
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=20
KillWait={settings.kill_wait_seconds}
CompleteWait=0
InactiveLimit=0
MinJobAge=3600

# With 2, slurmctld overlooks a reboot that is faster than SlurmdTimeout, and the job hangs.
ReturnToService=1
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={base}/log/jobcomp.txt

{nodes}
PreemptType=preempt/partition_prio
PreemptMode={settings.preempt_mode}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
{settings.extra_config}
"""
