"""``python -m launch.task COMMAND …``: what each task of an srun step runs. It finds out who it is
and where the ranks meet, and starts the rank. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

SIOCGIFADDR = 0x8915  # linux/sockios.h
GRACE_SECONDS = 5.0


def main() -> None:
    rank, world_size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    host = supervisor_host()
    port = int(os.environ["DISTRIBUTED_LM_SUPERVISOR_PORT"])
    token = os.environ["DISTRIBUTED_LM_SUPERVISOR_TOKEN"]
    master, own_address = meet(host, port, token, rank)
    interface = interface_of(own_address)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks_here()),
        MASTER_ADDR=master["address"],
        MASTER_PORT=str(master["port"]),
        DISTRIBUTED_LM_ATTEMPT=os.environ["SLURM_STEP_ID"],
        DISTRIBUTED_LM_SUPERVISOR=f"{host}:{port}:{token}",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_task()))
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    print(  # noqa: T201
        f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} job {os.environ['SLURM_JOB_ID']} restart "
        f"{os.environ.get('SLURM_RESTART_COUNT', '0')} step {os.environ['SLURM_STEP_ID']}: rank "
        f"{rank} of {world_size} on {socket.gethostname()}, meeting at {master['address']}:"
        f"{master['port']}; sockets on {os.environ.get('GLOO_SOCKET_IFNAME', 'any interface')} "
        f"({interface} leads to the first node)",
        flush=True,
    )
    code, is_ending = run_rank([sys.executable, "-m", "distributed_lm", *sys.argv[1:]])
    is_heard = tell(host, port, {"token": token, "rank": rank, "ended": code})
    if code and not is_heard and not is_ending and not answers(host, port):
        requeue()
    sys.exit(code)


def run_rank(command: list[str]) -> tuple[int, bool]:
    """Start the rank and wait for it.

    Returns:
        Its exit code, 128 + n for signal n; and whether Slurm is ending the step.
    """
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # the rank gets them, too
        signal.signal(number, lambda number, _: received.append(number))
    code = subprocess.Popen(command).wait()
    return 128 - code if code < 0 else code, signal.SIGTERM in received


def tell(host: str, port: int, message: dict[str, Any]) -> bool:
    """Say one thing to the supervisor; False if it cannot be reached."""
    try:
        with socket.create_connection((host, port), timeout=GRACE_SECONDS) as line:
            line.sendall((json.dumps(message) + "\n").encode())
    except OSError:
        return False
    return True


def answers(host: str, port: int) -> bool:
    """Whether the supervisor can be reached after all: if so, this node was cut off for a while."""
    time.sleep(GRACE_SECONDS)  # in which Slurm ends the tasks of a job that it is ending
    try:
        socket.create_connection((host, port), timeout=GRACE_SECONDS).close()
    except OSError:
        return False
    return True


def requeue() -> None:
    """Bring the job back whose first node, and with it the supervisor, has died: with
    ``--no-kill`` Slurm leaves such a job as it is."""
    command = ["scontrol", "requeue", job_id()]
    print(f"the first node does not answer any more: {' '.join(command)}", flush=True)  # noqa: T201
    with contextlib.suppress(OSError):
        subprocess.run(command, check=False, timeout=60)


def job_id() -> str:
    """Of this job alone: of an array's last task ``SLURM_JOB_ID`` means the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array else os.environ["SLURM_JOB_ID"]


def supervisor_host() -> str:
    """Address of the node that ran srun, as Slurm's own connection has it: no name is resolved."""
    for variable in ("SLURM_LAUNCH_NODE_IPADDR", "SLURM_SRUN_COMM_HOST"):
        if os.environ.get(variable):
            return os.environ[variable]
    sys.exit("error: SLURM_LAUNCH_NODE_IPADDR is not set; start tasks with srun")


def meet(host: str, port: int, token: str, rank: int) -> tuple[dict[str, str], str]:
    """Ask the supervisor where rank 0 is; also this task's own address on the way there."""
    try:
        with socket.create_connection((host, port), timeout=600.0) as line:
            own_address = str(line.getsockname()[0])
            hello = {"token": token, "rank": rank, "host": socket.gethostname(), "ask": "master"}
            line.sendall((json.dumps(hello) + "\n").encode())
            answer = line.makefile().readline()
    except OSError as error:
        if not answers(host, port):
            requeue()
        sys.exit(
            f"error: {socket.gethostname()} cannot reach the first node at {host}:{port} "
            f"({error}); is a firewall between the nodes?"
        )
    if not answer:
        sys.exit("error: the supervisor has given this step up")
    return json.loads(answer)["master"], own_address


def interface_of(address: str) -> str | None:
    """The network interface that has ``address``: the one that leads to the first node.

    Without it gloo announces what the node's own name resolves to, on Debian 127.0.1.1.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(found) == address:
                return name
    return None


def tasks_here() -> int:
    """Tasks of this step on this node."""
    return int(os.environ["SLURM_NTASKS"]) // int(os.environ["SLURM_STEP_NUM_NODES"])


def threads_per_task() -> int:
    """Threads that let the tasks of a node share its cores without a fight."""
    mine = len(os.sched_getaffinity(0))
    of_node = int(os.environ.get("SLURM_CPUS_ON_NODE", mine))
    is_bound = mine < of_node
    return max(1, mine if is_bound else min(mine, of_node) // tasks_here())


if __name__ == "__main__":
    main()
