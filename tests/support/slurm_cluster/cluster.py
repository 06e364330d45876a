"""A Slurm cluster of several nodes on this machine."""

import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.support.slurm_cluster import hosts
from tests.support.slurm_cluster.hosts import SlurmError, wait_until
from tests.support.slurm_cluster.settings import Settings, check_folder, write_files

T = TypeVar("T")
FINISHED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE"}
)
"""States that a job does not leave by itself; a requeued job goes back to PENDING instead."""


def client_environment(base: Path) -> dict[str, str]:
    """What makes ``sbatch`` and its kin mean the cluster in ``base``."""
    path = os.environ.get("PATH", os.defpath)
    return {"SLURM_CONF": f"{base}/etc/slurm/slurm.conf", "PATH": f"{base}/bin:{path}"}


class SlurmCluster:
    """``with SlurmCluster(nodes=("a", "b")) as cluster:``; the options are ``Settings``.

    Real munged, slurmctld and slurmd. A node is a set of namespaces: it has its own host name,
    address, processes and /dev/shm; its files are the machine's. When the process that made
    the cluster ends, however it ends, the cluster ends too.
    """

    def __init__(self, base: Path | None = None, **options: Any) -> None:
        self.settings = Settings(**options)
        # /tmp, not pytest's tmp_path: the paths of UNIX sockets must be short.
        self.base = (base or Path(f"/tmp/slurm-{secrets.token_hex(4)}")).resolve()
        self._head: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "SlurmCluster":
        return self.up()

    def __exit__(self, *error: object) -> None:
        self.down()

    def up(self, *, detached: bool = False) -> "SlurmCluster":
        """Start everything. Detached, the cluster outlives this process."""
        check_folder(self.base, self.settings)
        try:
            write_files(self.base, self.settings)
            address = self.settings.addresses["head"]
            self._head = hosts.start_head(self.base, address, detached=detached)
            self.wait_until(self._head_is_on, 10, "head")
            self.start_controller()
            for node in self.settings.nodes:
                self._boot(node)
            self.wait_until(self._all_idle, 15, "all nodes idle")
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """End all its processes and remove its folder."""
        hosts.end(self.base)
        if self._head is not None:
            if self._head.stdin is not None:
                self._head.stdin.close()
            self._head.wait()

    # Commands

    @property
    def environment(self) -> dict[str, str]:
        """For a process outside the cluster: a caller's own Slurm is not meant here."""
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SALLOC_"))
        }
        return ours | client_environment(self.base)

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        check: bool = True,
        timeout_seconds: float = 60,
        host: str = "head",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user does who is logged in on the head; ``env`` is added."""
        prefix = hosts.enter(self.base, host, cwd or Path.cwd())
        command = [str(argument) for argument in argv]
        done = subprocess.run(
            prefix + command,
            env=self.environment | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        if check and done.returncode != 0:
            raise SlurmError(
                f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def on_node(
        self, node: str, argv: Sequence[str | Path], **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, past Slurm, as over ssh; options as for ``run``."""
        return self.run(argv, host=node, **options)

    def submit(self, *arguments: str | Path, **options: Any) -> str:
        """``sbatch``; returns the job id. Options as for ``run``."""
        return self.run(["sbatch", "--parsable", *arguments], **options).stdout.strip()

    # Jobs

    def job(self, job_id: str | int) -> dict[str, str]:
        """Slurm's record of a job, by the names of ``scontrol show job``; kept for an hour."""
        return _record(self.run(["scontrol", "-o", "show", "job", str(job_id)]).stdout)

    def wait_for_state(
        self,
        job_id: str | int,
        states: str | Collection[str] = FINISHED,
        timeout_seconds: float = 60,
    ) -> dict[str, str]:
        """Wait until a job is in one of the states; return its record."""
        wanted = {states} if isinstance(states, str) else set(states)

        def reached() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] in wanted else None

        return self.wait_until(reached, timeout_seconds, f"job {job_id} in {sorted(wanted)}")

    def wait_until(self, condition: Callable[[], T | None], timeout_seconds: float, what: str) -> T:
        """Wait for a true result and return it; the error has the queue and the logs' ends."""
        return wait_until(condition, timeout_seconds, what, self._describe)

    def signal_batch(self, job_id: str | int, name: str) -> None:
        """Signal the batch shell alone, as ``sbatch --signal=B:`` does before the time limit."""
        self.run(["scancel", "--batch", f"--signal={name}", str(job_id)])

    def signal_steps(self, job_id: str | int, name: str) -> None:
        """Signal every process of every step, and not the batch shell."""
        self.run(["scancel", f"--signal={name}", str(job_id)])

    # Nodes and what happens to them

    def node(self, node: str) -> dict[str, str]:
        """Slurm's record of a node."""
        return _record(self.run(["scontrol", "-o", "show", "node", node]).stdout)

    def processes(self, node: str) -> list[tuple[int, str]]:
        """Pid (this machine's) and command line of what runs on a node beside Slurm."""
        return hosts.user_processes(self.base, node)

    def step_daemons(self, node: str) -> list[int]:
        """Pids (this machine's) of Slurm's own processes that look after tasks on a node."""
        return hosts.step_daemons(self.base, node)

    def power_off(self, node: str) -> None:
        """Pull the plug: slurmd and all processes die at once.

        slurmctld declares the node DOWN after 10 to 16 seconds, or as soon as it is on again.
        Its jobs then end with NODE_FAIL, and are requeued if they may be.
        """
        hosts.power_off(self.base, node)

    def power_on(self, node: str) -> None:
        """The node boots, and the administrator resumes it."""
        before = self.node(node).get("SlurmdStartTime", "")
        # A boot in the second of the node's last response goes unnoticed, and its jobs hang.
        time.sleep(1 - time.time() % 1)
        self._boot(node)
        self.wait_until(
            lambda: self.node(node).get("SlurmdStartTime", "") != before, 15, f"{node} registered"
        )
        self.resume(node)

    def link_down(self, node: str) -> None:
        """Pull the network cable; what runs on the node lives on."""
        self._set_link(node, "down")

    def link_up(self, node: str) -> None:
        """Put it back. A node that was declared DOWN meanwhile returns by itself."""
        self._set_link(node, "up")

    def drain(self, node: str, reason: str = "test") -> None:
        """Give the node no new jobs."""
        self.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}"])

    def resume(self, node: str) -> None:
        """Undo ``drain``, and put a node that was declared DOWN back into service."""
        serving_since = time.monotonic()

        def serves() -> bool:
            nonlocal serving_since
            state = self.node(node)["State"]
            if re.search("DRAIN|DOWN|UNKNOWN|NOT_RESPONDING", state):
                serving_since = time.monotonic()
            if re.search("DRAIN|DOWN", state):
                # Fails while slurmctld is still at what made it so.
                self.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)
            # A rebooted node can be found "unexpectedly rebooted" again by the registration that
            # follows its resumption: the times compared are in seconds.
            return time.monotonic() - serving_since > 0.5

        self.wait_until(serves, 15, f"{node} in service")

    def stop_controller(self) -> None:
        """slurmctld saves its state and ends; jobs go on."""
        self.run(["scontrol", "shutdown", "slurmctld"])
        pid_file = self.base / "run/slurmctld.pid"
        self.wait_until(lambda: not pid_file.exists(), 10, "end of slurmctld")

    def start_controller(self) -> None:
        """slurmctld starts from its saved state."""
        hosts.start_in_head(self.base, ["slurmctld"], self.base / "log/slurmctld.out")
        # A slurmd that finds no controller tries again only after a second.
        ping = ["scontrol", "ping"]
        self.wait_until(lambda: self.run(ping, check=False).returncode == 0, 10, "slurmctld")

    def _boot(self, node: str) -> None:
        hosts.boot(self.base, node, self.settings.addresses[node], self._port(node))

    def _port(self, node: str) -> str:
        """The head's end of the node's network cable."""
        return f"port{self.settings.nodes.index(node)}"

    def _set_link(self, node: str, state: str) -> None:
        self.run(["ip", "link", "set", self._port(node), state])

    def _head_is_on(self) -> bool:
        if self._head is not None and self._head.poll() is not None:
            raise SlurmError(f"the head did not start\n{hosts.log_tails(self.base)}")
        return hosts.first_process(self.base, "head") is not None

    def _describe(self) -> str:
        queue = ""
        if hosts.first_process(self.base, "head") is not None:
            done = self.run(["bash", "-c", "squeue --states=all; sinfo --Node --long"], check=False)
            queue = done.stdout + done.stderr
        return f"{queue}{hosts.log_tails(self.base)}"

    def _all_idle(self) -> bool:
        states = self.run(["sinfo", "-h", "-N", "-p", "debug", "-o", "%t"]).stdout.split()
        return states == ["idle"] * len(self.settings.nodes)


def _record(line: str) -> dict[str, str]:
    """Split ``scontrol -o``'s ``Name=value Name=value``; values may have spaces."""
    parts = (part.partition("=") for part in re.split(r" (?=[\w/:]+=)", line.strip()))
    return {name: value.strip() for name, _, value in parts}
