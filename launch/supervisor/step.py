"""The srun steps of a job: their command lines, and one that runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

from launch.failure import Failure, root_cause
from launch.supervisor.job import Job

# Of what srun is asked to end, before it is killed.
END_SECONDS = 15.0
TAIL_BYTES = 64 * 1024
# Which network interface gloo and NCCL open their sockets on.
SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


# What deals a node's devices out to the tasks of a step, or counts those of all its nodes.
PER_TASK_OPTIONS = (
    "--gpus", "--gpus-per-task", "--gpus-per-socket", "--ntasks-per-gpu", "--gpu-bind",
    "--tres-per-task", "--tres-bind",
)  # fmt: skip


def whole_node_options(options: list[str]) -> list[str]:
    """Of srun: those with which one task on a node has all its devices."""
    return [option for option in options if option.partition("=")[0] not in PER_TASK_OPTIONS]


def srun_command(
    job: Job, nodes: list[str], tasks_per_node: int, output: str, module: str, *arguments: str
) -> list[str]:
    """One task per device on ``nodes``, each running ``python -m MODULE ARGUMENTS``."""
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        "--distribution=block:block",
        "--kill-on-bad-exit=1",
        "--overlap",  # a step that has not quite gone holds nothing back
        "--mem=0",
        "--input=none",
        "--open-mode=append",
        f"--output={output}",
        *job.srun_options,
        *job.prefix,
        job.python,
        "-m",
        module,
        *arguments,
    ]


def task_environment(job: Job, port: int, token: str, nodes: list[str]) -> dict[str, str]:
    """What the tasks of a step find beside Slurm's own variables."""
    interface = job.network_interface
    sockets = {name: interface for name in SOCKET_VARIABLES if interface}
    return {
        **os.environ,
        **sockets,
        **job.environment,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [job.code, job.own_modules, os.environ.get("PYTHONPATH")])
        ),
        "PYTHONUNBUFFERED": "1",
        "DISTRIBUTED_LM_SUPERVISOR_PORT": str(port),
        "DISTRIBUTED_LM_SUPERVISOR_TOKEN": token,
        "DISTRIBUTED_LM_NODES": ",".join(nodes),
    }


class Step:
    """One srun and its end."""

    def __init__(
        self, process: asyncio.subprocess.Process, log_dir: Path, starts: list[int]
    ) -> None:
        self._process = process
        self._log_dir = log_dir
        self._starts = starts
        """By rank, where in its log this step begins, in bytes."""

    @classmethod
    async def start(
        cls, command: list[str], environment: dict[str, str], log_dir: Path, tasks: int
    ) -> Step:
        starts = await asyncio.to_thread(_make_ready, log_dir, tasks)
        # A session of its own: what is sent to the batch script's group is for us alone.
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, start_new_session=True
        )
        return cls(process, log_dir, starts)

    async def wait(self) -> int:
        """Its exit code: the highest of its tasks; 128 + n for signal n."""
        code = await self._process.wait()
        return 128 - code if code < 0 else code

    async def end(self) -> None:
        """Have srun kill its tasks; then srun itself."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), END_SECONDS)
                return

    def why(self, code: int, ends: dict[int, tuple[int, float]], seconds: float) -> Failure:
        """The rank whose fault the end seems to be. Reads all logs.

        Args:
            code: srun's exit code, for ranks of which no other is known; 0 = not their fault.
            ends: exit code and time of the ranks that have told.
        """
        failures = []
        for rank, start in enumerate(self._starts):
            path = self._log_dir / f"rank_{rank}.log"
            rank_code, ended_at = ends.get(rank, (code, time.time()))
            if rank_code:
                output = _tail(path, start)
                by_signal = 128 < rank_code < 128 + signal.NSIG
                code_or_signal = 128 - rank_code if by_signal else rank_code
                failures.append(Failure(rank, code_or_signal, ended_at, output, path))
        return root_cause(failures or [Failure(0, code, time.time(), "", self._log_dir)])


def _make_ready(log_dir: Path, tasks: int) -> list[int]:
    """Make the folder; returns the sizes of the ranks' logs in it."""
    log_dir.mkdir(parents=True, exist_ok=True)
    paths = [log_dir / f"rank_{rank}.log" for rank in range(tasks)]
    return [path.stat().st_size if path.exists() else 0 for path in paths]


def _tail(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # Without what launch.task says of itself.
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("--- "))
