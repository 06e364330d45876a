"""Runs a study's processes on this machine, several at a time. No torch."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from distributed_lm.errors import TrainingError
from distributed_lm.processes import die_with_parent

POLL_SECONDS = 0.05
LAST_LINES = 3


@dataclass(frozen=True)
class Task:
    """One ``python -m launch local``."""

    name: str
    arguments: tuple[str, ...]
    is_done: Callable[[], bool]
    """Whether what it makes is there, from an earlier start of the study or by now."""


def run_tasks(
    tasks: Sequence[Task], log_dir: Path, jobs: int, threads: int, console: Console
) -> None:
    """Run what is not done yet, ``jobs`` at a time, each with a log of its own.

    Args:
        threads: of each process.

    Raises:
        TrainingError: naming the first task that failed, once the others at work have ended.
    """
    waiting = [task for task in tasks if not task.is_done()]
    if len(waiting) < len(tasks):
        console.print(f"  {len(tasks) - len(waiting)} of {len(tasks)} are done already")
    running: list[_Running] = []
    failure = ""
    try:
        while running or (waiting and not failure):
            while waiting and len(running) < jobs and not failure:
                running.append(_Running(waiting.pop(0), log_dir, threads))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                if one.task.is_done():
                    console.print(f"  {one.task.name}: {one.seconds:.0f} s")
                else:
                    failure = failure or one.failure()
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
    if failure:
        raise TrainingError(failure)


class _Running:
    def __init__(self, task: Task, log_dir: Path, threads: int) -> None:
        self.task = task
        self._log = log_dir / f"{task.name}.log"
        self._started = time.monotonic()
        log_dir.mkdir(parents=True, exist_ok=True)
        # The environment is the launcher's to read: ``env`` sets what this study wants of it.
        command = ["env", f"OMP_NUM_THREADS={threads}", sys.executable, "-m", "launch", "local"]
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *task.arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,  # Ctrl-C reaches it once, from here
                preexec_fn=die_with_parent(),
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def failure(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = " / ".join(line.strip() for line in lines[-LAST_LINES:])
        code = self.process.returncode
        return f"{self.task.name} ended with exit code {code}; {self._log} ends with: {said}"
