"""The lives of a drilled run: each one is started by the launcher, and all but the last are killed.

The watcher sees what a user sees: the lines of ``metrics.jsonl`` and the processes in ``/proc``.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from distributed_lm.errors import TrainingError
from distributed_lm.tracking.metrics_file import parse_records

POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Kill:
    """One kill and what came after it. What is None did not happen: the run finished first."""

    layout: str
    """Overrides the run was resumed with; empty = the same layout."""
    ranks: tuple[int, ...] = ()
    killed_at: float | None = None
    """Seconds since the epoch."""
    step: int | None = None
    """Last step on record when the launcher had ended the other ranks."""
    lost_steps: int | None = None
    """Recorded steps that were done again."""
    recovery_seconds: float | None = None
    """From the kill to the first line of a new step."""
    problem: str | None = None
    """Why the run did not go on."""


class Life:
    """One start of a run. Leaving the context ends whatever still runs."""

    def __init__(self, config_path: Path, arguments: Sequence[str], metrics: Path, log: Path):
        command = [sys.executable, "-m", "launch", "local", str(config_path), *arguments]
        self._metrics = metrics
        self._position = _end_of_whole_lines(metrics)
        self._log = log
        self.steps: list[tuple[int, float]] = []
        """(step, time of its line) as far as this life has recorded them."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # On the CPU, where the same layout gives the same bits.
            self._launcher = subprocess.Popen(
                ["env", "CUDA_VISIBLE_DEVICES=", *command], stdout=output, stderr=output
            )

    def __enter__(self) -> "Life":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._launcher.poll() is None:
            self._launcher.terminate()
        self._launcher.wait()

    def reach(self, step: int) -> bool:
        """Wait for the line of ``step`` or a later one; False if the run ended before it."""
        while True:
            ended = self._launcher.poll() is not None
            self._read()
            if self.steps and self.steps[-1][0] >= step:
                return True
            if ended:
                self.finish()
                return False
            time.sleep(POLL_SECONDS)

    def kill(self, chance: random.Random) -> tuple[tuple[int, ...], float] | None:
        """SIGKILL one rank, and let the launcher end the others; or all of them, as a node's power
        cut does.

        Returns:
            The ranks and when; None if the run had finished.
        """
        ranks = rank_processes(self._launcher.pid)
        if not ranks:
            self.finish()
            return None
        victims = sorted(ranks) if chance.random() < 0.5 else [chance.choice(sorted(ranks))]
        killed_at = time.time()
        for rank in victims:
            with contextlib.suppress(ProcessLookupError):  # it has just finished
                os.kill(ranks[rank], signal.SIGKILL)
        return_code = self._launcher.wait()
        self._read()
        return None if return_code == 0 else (tuple(victims), killed_at)

    def finish(self) -> None:
        """Wait for the end of the run.

        Raises:
            TrainingError: if it failed.
        """
        return_code = self._launcher.wait()
        self._read()
        if return_code != 0:
            raise TrainingError(
                f"a run of the drill failed by itself, with exit code {return_code}: {self._why()}"
                f" (all of its output: {self._log})"
            )

    def _read(self) -> None:
        """Take in the lines that have been written since the last look."""
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as file:
            file.seek(self._position)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        self.steps += [
            (line["step"], line["time"]) for line in parse_records(whole) if line["kind"] == "train"
        ]

    def _why(self) -> str:
        """The last sentence of the launcher or a rank in the log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.startswith(("error: ", "launch: "))]
        return (said or lines or ["no output"])[-1].strip()


def rehearse(
    start: Callable[[int], Life],
    layouts: Sequence[str],
    moments: Sequence[float],
    step_seconds: float,
    chance: random.Random,
) -> list[Kill]:
    """Run, kill and resume until the run is finished.

    Args:
        start: starts the run after that many kills.
        layouts: what the run is resumed on after each kill.
        moments: of the kills, in steps: 3.4 is after step 3's line, 0.4 of a step later.

    Returns:
        One account per kill. A run that does not come back ends the rehearsal, not the program.

    Raises:
        TrainingError: if the run failed before anything was killed.
    """
    kills: list[Kill] = []
    try:
        _kill_and_resume(kills, start, layouts, moments, step_seconds, chance)
    except TrainingError as error:
        if not kills:
            raise
        kills[-1] = replace(kills[-1], problem=str(error))
        return kills + [Kill(name, problem="not reached") for name in layouts[len(kills) :]]
    return kills + [Kill(name) for name in layouts[len(kills) :]]


def _kill_and_resume(
    kills: list[Kill],
    start: Callable[[int], Life],
    layouts: Sequence[str],
    moments: Sequence[float],
    step_seconds: float,
    chance: random.Random,
) -> None:
    for moment, layout in zip(moments, layouts, strict=True):
        with start(len(kills)) as life:
            _account_recovery(kills, life)
            hit = None
            if life.reach(int(moment)):
                time.sleep((moment % 1.0) * step_seconds)
                hit = life.kill(chance)
        if hit is None:
            return
        kills.append(Kill(layout, *hit, step=life.steps[-1][0]))
    with start(len(kills)) as life:
        _account_recovery(kills, life)
        life.finish()


def _account_recovery(kills: list[Kill], life: Life) -> None:
    """Complete the last kill with the first step of the life after it, if there is one: a run
    whose last checkpoint was already published has none."""
    if kills and life.reach(1):
        kill = kills[-1]
        assert kill.step is not None
        assert kill.killed_at is not None
        first_step, recorded_at = life.steps[0]
        kills[-1] = replace(
            kill,
            lost_steps=kill.step - (first_step - 1),
            recovery_seconds=recorded_at - kill.killed_at,
        )


def rank_processes(launcher: int) -> dict[int, int]:
    """rank -> process id, of the living children of a launcher (Linux)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) != launcher or fields[0] == "Z":
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended while we looked
            continue
        for variable in variables:
            name, _, value = variable.partition(b"=")
            if name == b"RANK":
                found[int(value)] = int(folder.name)
    return found


def _end_of_whole_lines(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
