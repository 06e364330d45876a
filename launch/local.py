"""Runs one job on this machine: a process per rank, one terminal, one error message."""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import typer

from distributed_lm.config import WHOLE_MODEL_LAYOUT, load_config
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from launch.environment import child_environment, rank_variables
from launch.failure import report
from launch.ports import free_port
from launch.ranks import RankProcess

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.05

# After the first failure the other ranks get this long to fail by themselves (the rank whose
# fault it was may be the slower one to say so), and as long again between SIGTERM and SIGKILL.
GRACE_SECONDS = 5.0

PROGRAM = (sys.executable, "-m", "distributed_lm")


@dataclass(frozen=True)
class LaunchPlan:
    """What will be started: the same command line for every rank, with its own variables."""

    command_line: tuple[str, ...]
    variables: tuple[dict[str, str], ...]
    log_dir: Path


def plan_local(
    path: Path,
    overrides: Sequence[str],
    processes: int | None,
    command: str,
    extra_arguments: Sequence[str] = (),
    program: Sequence[str] = PROGRAM,
) -> LaunchPlan:
    """Check the config and its layout, and lay out the processes.

    Args:
        path: config file, or run folder.
        processes: world size; off = one data-parallel replica.
        command: of ``distributed-lm``.
        extra_arguments: handed to the command after the overrides.
        program: what understands ``command``; the tests put a smaller one here.

    Raises:
        ConfigError: if the config is wrong or does not fit the number of processes.
    """
    is_evaluation = command == "evaluate"
    layout = WHOLE_MODEL_LAYOUT if is_evaluation else ()
    config = load_config(path, [*layout, *overrides])
    processes = processes or config.parallel.tensor * config.parallel.pipeline
    if is_evaluation:
        Layout.grid(config.parallel, processes)
    else:
        Layout.of(config, processes)
    run_dir = path if path.is_dir() else config.run_dir
    port = free_port()
    return LaunchPlan(
        command_line=(*program, command, str(path), *overrides, *extra_arguments),
        variables=tuple(rank_variables(rank, processes, port) for rank in range(processes)),
        log_dir=run_dir / "logs",
    )


def describe(plan: LaunchPlan) -> str:
    """One line of shell per rank that would start it by hand."""
    command_line = shlex.join(plan.command_line)
    return "\n".join(
        " ".join([*(f"{name}={value}" for name, value in variables.items()), command_line])
        for variables in plan.variables
    )


def run_plan(plan: LaunchPlan, grace_seconds: float = GRACE_SECONDS) -> int:
    """Start every rank, wait for all of them, and return the exit code of the whole.

    Rank 0 writes to this terminal, the others to ``log_dir/rank_N.log``. When a rank fails, the
    others are stopped and one message says which rank failed first, and why.

    Returns:
        0, or the exit code of the rank that failed first (128 + n if signal n killed it).

    Raises:
        ConfigError: if the log folder cannot be written.
    """
    started = time.monotonic()
    ranks: list[RankProcess] = []
    received: list[int] = []

    def forward(signal_number: int, frame: FrameType | None) -> None:
        received.append(signal_number)
        for rank in ranks:
            rank.send_signal(signal_number)

    with _handling(forward):
        try:
            _start(plan, ranks)
            _wait(ranks, grace_seconds)
        finally:
            for rank in ranks:
                rank.kill()
    return _conclude(ranks, received, time.monotonic() - started)


def _start(plan: LaunchPlan, ranks: list[RankProcess]) -> None:
    """Start the ranks, each into ``ranks`` at once so that a signal meanwhile reaches it."""
    try:
        plan.log_dir.mkdir(parents=True, exist_ok=True)
        for number, variables in enumerate(plan.variables):
            log_path = plan.log_dir / f"rank_{number}.log"
            environment = child_environment(variables)
            ranks.append(RankProcess(number, plan.command_line, environment, log_path))
    except OSError as error:
        raise ConfigError(
            f"{plan.log_dir}: cannot write the ranks' logs here ({error.strerror}); "
            "set output_dir to a folder that can be written"
        ) from None
    # Last, since a process should not be forked while threads run.
    ranks[0].start_relay()


def _wait(ranks: Sequence[RankProcess], grace_seconds: float) -> None:
    """Return when every rank has ended; once one has failed, help the others to."""
    first_failure: float | None = None
    terminated = False
    while running := [rank for rank in ranks if rank.poll() is None]:
        if first_failure is None and any(rank.failed for rank in ranks):
            first_failure = time.monotonic()
        if first_failure is not None:
            waited = time.monotonic() - first_failure
            if waited > 2 * grace_seconds:
                for rank in running:
                    rank.kill()
            elif waited > grace_seconds and not terminated:
                terminated = True
                for rank in running:
                    rank.terminate()
        time.sleep(POLL_SECONDS)


def _conclude(ranks: Sequence[RankProcess], received: Sequence[int], seconds: float) -> int:
    """Say what happened, once, and return the exit code."""
    for rank in ranks:
        rank.finish()
    failures = [rank.failure() for rank in ranks if rank.failed and not rank.stopped_by_us]
    stops = [number for number in received if number in STOP_SIGNALS]
    own_codes = {code for number in stops for code in (-number, 128 + number)}
    if any(failure.return_code in own_codes for failure in failures):
        typer.echo(f"launch: stopped by {signal.Signals(stops[0]).name}", err=True)
        return 128 + stops[0]
    if not failures:
        ranks[0].release_held_output()
        return 0
    message, exit_code = report(failures, len(ranks), seconds)
    typer.echo(message, err=True)
    return exit_code


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
