"""The hosts, which are sets of namespaces, and the processes in them.

Nothing is remembered here. A host's first process is in ``BASE/run/HOST.pid``; a process belongs to
a cluster if it sees the mount on ``BASE/bin`` that the boot scripts make. So the cluster can be
ended by a process that knows nothing but ``BASE``, also when half of it is dead.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
PACKAGES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
DAEMON_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
}
# All that a cluster asks of the kernel, in namespaces that are gone at once.
PROBE = """
ip link add br0 type bridge && ip link add one type veth peer name two
mount -t tmpfs tmpfs /mnt && mount -t overlay overlay -o lowerdir=/usr/bin:/usr/sbin /mnt
"""
NAMESPACES = ["--net", "--uts", "--mount"]
T = TypeVar("T")


class SlurmError(RuntimeError):
    """The cluster, or a command on it, did not do what was asked."""


def wait_until(
    condition: Callable[[], T | None],
    timeout_seconds: float,
    what: str,
    describe: Callable[[], str] = lambda: "",
) -> T:
    """Wait for a true result and return it; the error says ``what`` was awaited, and describes."""
    end = time.monotonic() + timeout_seconds
    while not (result := condition()):
        if time.monotonic() > end:
            raise SlurmError(f"{what}: not within {timeout_seconds:g} s\n{describe()}")
        time.sleep(0.05)
    return result


def log_tails(base: Path, lines: int = 15) -> str:
    """The ends of all logs."""
    tails = []
    for path in sorted((base / "log").glob("*")):
        text = path.read_text(errors="replace").splitlines()[-lines:]
        tails.append("\n".join([f"--- {path.name}", *text]))
    return "\n".join(tails)


@functools.cache
def unavailable() -> str | None:
    """Why no cluster can run here, in a sentence with the remedy; None if one can."""
    path = DAEMON_ENVIRONMENT["PATH"]
    missing = {package for tool, package in PACKAGES.items() if not shutil.which(tool, path=path)}
    if missing:
        return f"a Slurm cluster needs `apt-get install {' '.join(sorted(missing))}`"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root, to make network namespaces"
    probe = subprocess.run(
        ["unshare", *NAMESPACES, "--pid", "--fork", "bash", "-ec", PROBE],
        env=DAEMON_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if probe.returncode != 0:
        return f"a Slurm cluster needs network, mount and PID namespaces: {probe.stderr.strip()}"
    return None


def start_head(base: Path, address: str, *, detached: bool) -> subprocess.Popen[bytes]:
    """Power the head on. It ends when this process does, unless detached."""
    argv = ["unshare", *NAMESPACES, "--pid", "--fork", "--kill-child"]
    argv += ["bash", str(HERE / "head.sh"), str(base), address]
    fifo = (base / "run/forever").open("r+b", buffering=0)
    with fifo, (base / "log/head.out").open("wb") as output:
        return subprocess.Popen(
            argv,
            stdin=fifo if detached else subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=DAEMON_ENVIRONMENT,
            # Ctrl-C at the tests must not reach the cluster before they are done with it.
            start_new_session=True,
        )


def boot(base: Path, name: str, address: str, port: str) -> None:
    """Power a node on; its slurmd will register within a second."""
    hidden = base / "hidden"
    script = [str(HERE / "node.sh"), str(base), name, address, port]
    script.append(str(hidden) if any(hidden.iterdir()) else "")
    node = ["unshare", *NAMESPACES, "--pid", "--fork", "--kill-child", "bash", *script]
    start_in_head(base, ["setsid", "--fork", *node], base / f"log/{name}.out")


def start_in_head(base: Path, argv: Sequence[str], log: Path) -> None:
    """Run a command that leaves a child of the head's pid 1 behind."""
    with log.open("ab") as output:
        done = subprocess.run(
            ["nsenter", f"--target={first_process(base, 'head')}", *NAMESPACES, "--pid", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=DAEMON_ENVIRONMENT,
        )
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(argv)}: exit status {done.returncode}\n{log.read_text()}")


def first_process(base: Path, host: str) -> int | None:
    """The host's pid 1, as a pid of this machine; None when the host is off."""
    try:
        pid = int((base / f"run/{host}.pid").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return pid if _is_inside(base, pid) else None


def enter(base: Path, host: str, folder: Path) -> list[str]:
    """What to put before a command, so that it runs on the host, in ``folder``.

    A command on the head keeps this machine's PID namespace, and so can be signalled directly.
    It is killed when the thread that started it ends; children of its own may take longer (a killed
    srun leaves one that looks for the controller, for eight seconds).
    """
    pid = first_process(base, host)
    if pid is None:
        raise SlurmError(f"{host} is off")
    pid_namespace = [] if host == "head" else ["--pid"]
    return [
        *["nsenter", f"--target={pid}", *NAMESPACES, *pid_namespace],
        *["setpriv", "--pdeathsig", "KILL", "env", f"--chdir={folder}"],
    ]


def power_off(base: Path, host: str) -> None:
    """Kill the host's pid 1, and thereby at once all that runs there."""
    pid = first_process(base, host)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        # It ends after all others.
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10, f"end of {host}")
    (base / f"run/{host}.pid").unlink(missing_ok=True)


def user_processes(base: Path, node: str) -> list[tuple[int, str]]:
    """Pid on this machine and command line of what runs on a node beside Slurm."""
    found = []
    for pid, name in _processes(base, node):
        if name in ("slurmd", "slurmstepd"):
            continue
        with contextlib.suppress(OSError):  # it has just ended
            content = Path(f"/proc/{pid}/cmdline").read_bytes()
            command = content.replace(b"\0", b" ").decode().strip()
            if command:  # a zombie has none
                found.append((pid, command))
    return found


def step_daemons(base: Path, node: str) -> list[int]:
    """Pids on this machine of the slurmstepds of a node."""
    return [pid for pid, name in _processes(base, node) if name == "slurmstepd"]


def _processes(base: Path, node: str) -> list[tuple[int, str]]:
    """Pid on this machine and program of what runs on a node beside its first process."""
    first = first_process(base, node)
    if first is None:
        return []
    namespace = os.readlink(f"/proc/{first}/ns/pid")
    found = []
    for pid in _pids():
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):  # it has just ended
            if pid != first and os.readlink(process / "ns/pid") == namespace:
                found.append((pid, (process / "comm").read_text().strip()))
    return found


def end(base: Path) -> None:
    """Kill every process of the cluster and remove its folder."""

    def nobody_left() -> bool:
        pids = inhabitants(base)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(nobody_left, 10, f"end of all processes of {base}")
    shutil.rmtree(base, ignore_errors=True)


def inhabitants(base: Path) -> list[int]:
    """Every process of the cluster: daemons, jobs, and commands on the head."""
    return [pid for pid in _pids() if _is_inside(base, pid)]


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_inside(base: Path, pid: int) -> bool:
    try:
        return f" {base}/bin " in Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return False
