"""``distributed-lm drill``: rehearse disaster, and prove that a run survives it."""

import itertools
import random
import shlex
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.table import Table

from distributed_lm.config import CheckpointConfig, RunConfig, load_config
from distributed_lm.drill.comparison import EXACT, OTHER_LAYOUT, Tolerance, Verdict, compare_runs
from distributed_lm.drill.lives import Kill, Life, rehearse
from distributed_lm.errors import ConfigError, UserError
from distributed_lm.layout import Layout


class DrillError(UserError):
    """A kill lost what it must not lose."""

    exit_code = 1


@dataclass(frozen=True)
class Plan:
    """What a drill will do, checked before anything starts."""

    config_path: Path
    arguments: tuple[str, ...]
    """Overrides for all runs of the drill."""
    layouts: tuple[str, ...]
    """Overrides to resume with after each kill."""
    reference: RunConfig
    drilled: RunConfig
    tolerance: Tolerance

    def life(self, config: RunConfig, layout: str = "") -> Life:
        """Start a run of the drill."""
        arguments = [*self.arguments, f"name={config.name}", *shlex.split(layout)]
        log = config.run_dir / "logs" / "drill.log"
        return Life(self.config_path, arguments, config.run_dir / "metrics.jsonl", log)


def drill(
    config_path: Path,
    overrides: Sequence[str],
    kills: int,
    resume_layouts: Sequence[str],
    seed: int,
    output_dir: Path,
) -> None:
    """Run a config uninterrupted and, beside it, with kills; compare; print what came out.

    Args:
        resume_layouts: overrides for the resumed run, taken in turn; none = the same layout.

    Raises:
        ConfigError: if the config leaves no room for the drill.
        DrillError: if a kill or the comparison did not pass.
    """
    plan = make_plan(config_path, overrides, kills, resume_layouts, output_dir)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"reference: {plan.reference.run_dir}, uninterrupted")
    with plan.life(plan.reference) as life:
        life.finish()
    times = [time for _, time in life.steps]
    step_seconds = statistics.median(later - time for time, later in itertools.pairwise(times))
    console.print(f"drill: {plan.drilled.run_dir}, {kills} kills")
    chance = random.Random(seed)
    moments = kill_moments(plan.drilled.train.steps, kills, chance)
    lives = ("", *plan.layouts)
    accounts = rehearse(
        lambda done: plan.life(plan.drilled, lives[done]),
        plan.layouts, moments, step_seconds, chance,
    )  # fmt: skip
    verdicts: list[Verdict] = []
    if not any(kill.problem for kill in accounts):
        verdicts = compare_runs(
            plan.reference.run_dir, plan.drilled.run_dir, plan.drilled.train.steps, plan.tolerance
        )
    report(console, accounts, verdicts, allowed_loss(plan.drilled.checkpoint))


def make_plan(
    config_path: Path,
    overrides: Sequence[str],
    kills: int,
    resume_layouts: Sequence[str],
    output_dir: Path,
) -> Plan:
    """Check the config, every layout and the folders.

    Raises:
        ConfigError: naming the field or option.
    """
    name = load_config(config_path, overrides).name
    arguments = (
        *overrides, f"output_dir={output_dir}", "tracking.wandb=disabled", "train.log_every=1",
        "checkpoint.resume=true",
    )  # fmt: skip
    reference = load_config(config_path, [*arguments, f"name={name}-reference"])
    drilled = load_config(config_path, [*arguments, f"name={name}-drill"])
    layouts = tuple(
        resume_layouts[number % len(resume_layouts)] if resume_layouts else ""
        for number in range(kills)
    )
    resumed = [
        load_config(config_path, [*arguments, f"name={name}-drill", *shlex.split(layout)])
        for layout in layouts
    ]
    for config in (drilled, *resumed):
        Layout.of(config, config.parallel.tensor * config.parallel.pipeline)
    _check_room(drilled, kills)
    for run_dir in (reference.run_dir, drilled.run_dir):
        if run_dir.exists():
            raise ConfigError(f"{run_dir} is already there; remove it, or choose another --output")
    is_changed = any(config != drilled for config in resumed)
    tolerance = OTHER_LAYOUT[drilled.precision] if is_changed else EXACT
    return Plan(Path(config_path), arguments, layouts, reference, drilled, tolerance)


def _check_room(config: RunConfig, kills: int) -> None:
    if config.checkpoint.save_every == 0:
        raise ConfigError(
            "checkpoint.save_every=0 saves only at the end, so a killed run would start over; "
            "set checkpoint.save_every=10 or so"
        )
    if config.train.steps < 2 * kills:
        raise ConfigError(
            f"train.steps={config.train.steps} is too short for --kills {kills}; "
            f"set train.steps={2 * kills} or more"
        )
    if config.precision not in OTHER_LAYOUT:
        raise ConfigError(
            f"precision={config.precision} cannot be drilled, since the drill runs on the CPU; "
            "set precision=bf16 or precision=fp32"
        )
    if not Path("/proc/self/stat").exists() or shutil.which("env") is None:
        raise ConfigError("drill finds the ranks in /proc, which this system lacks; use Linux")


def kill_moments(steps: int, kills: int, chance: random.Random) -> list[float]:
    """A random moment in each of ``kills`` equal parts of steps 1 … ``steps``, in steps."""
    part = (steps - 1) / kills
    return [1 + part * (number + chance.random()) for number in range(kills)]


def report(
    console: Console, kills: Sequence[Kill], verdicts: Sequence[Verdict], allowed_steps: int
) -> None:
    """Print the table of kills and the verdicts.

    Raises:
        DrillError: naming what did not pass.
    """
    table = Table(title="kills", title_justify="left")
    for column in ("kill", "ranks", "at step", "resumed on", "lost steps", "recovery", "result"):
        justify: JustifyMethod = "left" if column in ("resumed on", "result") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    failed = []
    for number, kill in enumerate(kills, start=1):
        result = judge_kill(kill, allowed_steps)
        if result != "passed":
            failed.append(f"kill {number}: {result}")
        ranks = ", ".join(map(str, kill.ranks)) or "-"
        table.add_row(
            str(number), ranks, _shown(kill.step), kill.layout or "same",
            _shown(kill.lost_steps), _seconds(kill.recovery_seconds), result,
        )  # fmt: skip
    console.print(table)
    for verdict in verdicts:
        result = "passed" if verdict.passed else "FAILED"
        console.print(f"{result}  {verdict.part}: {verdict.finding}", markup=False)
    console.print(f"{len(kills) - len(failed)} of {len(kills)} kills passed")
    failed += [verdict.part for verdict in verdicts if not verdict.passed]
    if failed:
        raise DrillError(f"the drill did not pass: {', '.join(failed)}")


def allowed_loss(checkpoint: CheckpointConfig) -> int:
    """Steps that a kill may cost: those since the newest checkpoint, which an asynchronous save
    publishes by the time that the next one begins."""
    return checkpoint.save_every * (2 if checkpoint.asynchronous else 1)


def judge_kill(kill: Kill, allowed_steps: int) -> str:
    """``passed`` if the run went on from its newest checkpoint, else what was wrong."""
    if kill.problem:
        return kill.problem
    if kill.lost_steps is None:
        return "finished first"
    if kill.lost_steps > allowed_steps:
        return f"lost more than {allowed_steps} steps"
    return "passed"


def _shown(value: int | None) -> str:
    return "-" if value is None else str(value)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
