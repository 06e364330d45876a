"""``distributed-lm study`` and ``distributed-lm report``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from distributed_lm.config import RunConfig, load_run_config
from distributed_lm.errors import ConfigError, TrainingError
from distributed_lm.study import graph
from distributed_lm.study.bill import make_bill, parameters
from distributed_lm.study.choice import Choice
from distributed_lm.study.execution import Task, run_tasks
from distributed_lm.study.measures import Measures, RunSet
from distributed_lm.study.report.content import Content, runs_content, study_content
from distributed_lm.study.report.writer import write_report
from distributed_lm.study.runs import speed_runs, training_runs, tuning_runs
from distributed_lm.study.schema import Study, load_study
from distributed_lm.study.slurm import write_stages
from distributed_lm.tracking.report import send_report

GPU = Path("/dev/nvidia0")


@dataclass(frozen=True)
class Workshop:
    """How a study's processes run on this machine."""

    jobs: int
    threads: int
    """Of each process."""

    @classmethod
    def of(cls, study: Study, jobs: int | None) -> Workshop:
        """As many runs at once as there are cores for their processes; on GPUs one."""
        ranks = max(
            run.config.parallel.tensor * run.config.parallel.pipeline
            for run in training_runs(study, Choice())
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        if GPU.exists() and jobs is not None and jobs > 1:
            raise ConfigError(
                f"--jobs {jobs}: on a machine with GPUs all runs would take the first ones; leave "
                "it out, or use --launcher slurm"
            )
        if jobs is None:
            jobs = 1 if GPU.exists() else max(1, cores // ranks)
        return cls(jobs, max(1, cores // (jobs * ranks)))


def study(
    path: Path,
    overrides: Sequence[str],
    launcher: str,
    cluster: str | None,
    jobs: int | None,
    plan: bool,
    stage: str | None,
) -> None:
    """Run a study, or what is missing of it.

    Args:
        overrides: of the study's top-level fields.
        launcher: ``local`` or ``slurm``.
        cluster: for ``slurm``: file in ``configs/clusters``, or its path.
        jobs: runs at once on this machine; None = as many as fit.
        plan: print the bill and stop.
        stage: only this one of ``graph.STAGES``; None = all.

    Raises:
        UserError: if the study is wrong, or a run fails.
    """
    study_ = load_study(path, overrides)
    console = Console(soft_wrap=True, highlight=False)
    if plan:
        _print_bill(study_, console)
        return
    if launcher == "slurm":
        _submit(study_, cluster, console)
        return
    workshop = Workshop.of(study_, jobs)
    for name in graph.STAGES if stage is None else (stage,):
        console.rule(f"{study_.name}: {name}", style="none")
        _STAGES[name](study_, workshop, console)


def report(run_dirs: Sequence[Path], output: Path) -> None:
    """Compare finished runs: tables and pictures into ``output``.

    Runs that differ in nothing but the seed are one arm.

    Raises:
        ConfigError: if a folder is not a run's.
    """
    runs = RunSet(_arms(run_dirs))
    _write(runs_content(output.name, runs), runs, output, Console(soft_wrap=True, highlight=False))


def _arms(run_dirs: Sequence[Path]) -> dict[str, dict[int, RunConfig]]:
    arms: dict[str, dict[int, RunConfig]] = {}
    for run_dir in run_dirs:
        config = load_run_config(run_dir)
        name = f"{config.model.position}-{config.data.sequence_length}"
        if name in arms and not _differ_in_seed_only(config, next(iter(arms[name].values()))):
            name = config.name.removesuffix(f"-seed{config.seed}")
        arms.setdefault(name, {})[config.seed] = config
    return arms


def _differ_in_seed_only(one: RunConfig, other: RunConfig) -> bool:
    alike = {"seed": other.seed, "name": other.name, "output_dir": other.output_dir}
    return one.seed != other.seed and one.model_copy(update=alike) == other


def _write(content: Content, runs: RunSet, folder: Path, console: Console) -> None:
    media = write_report(content, runs, folder)
    if content.claims is not None:
        for row in content.claims.rows:
            console.print(f"  {row[-1]:<16} {row[0]} ({row[4]})", markup=False)
    console.print(f"report: {folder}/report.html, {folder}/report.md")
    config = runs.any_config(runs.arms[0]).model_copy(update={"name": content.title})
    send_report(config, folder, media, console.print)


def _prepare(study: Study, workshop: Workshop, console: Console) -> None:
    graph.prepare(study, console)


def _tune(study: Study, workshop: Workshop, console: Console) -> None:
    _run(study, graph.training_tasks(tuning_runs(study)), workshop.jobs, workshop, console)


def _speed(study: Study, workshop: Workshop, console: Console) -> None:
    """One at a time: what runs beside it would be measured, too."""
    _run(study, graph.training_tasks(speed_runs(study)), 1, workshop, console)


def _choose(study: Study, workshop: Workshop, console: Console) -> None:
    choice = graph.choose(study, console)
    for run in training_runs(study, choice):
        run.write()
        submitted = run.run_dir / "slurm" / "config.yaml"
        if submitted.exists():  # a job that waits for this
            submitted.write_text(run.config.to_yaml(), encoding="utf-8")


def _train(study: Study, workshop: Workshop, console: Console) -> None:
    runs = training_runs(study, graph.chosen(study))
    _run(study, graph.training_tasks(runs), workshop.jobs, workshop, console)


def _evaluate(study: Study, workshop: Workshop, console: Console) -> None:
    tasks = graph.evaluation_tasks(study, graph.chosen(study))
    _run(study, tasks, workshop.jobs, workshop, console)


def _report(study: Study, workshop: Workshop, console: Console) -> None:
    graph.chosen(study)
    _write(study_content(study), Measures(study), study.folder, console)


_STAGES: dict[str, Callable[[Study, Workshop, Console], None]] = {
    "prepare": _prepare,
    "tune": _tune,
    "speed": _speed,
    "choose": _choose,
    "train": _train,
    "evaluate": _evaluate,
    "report": _report,
}


def _run(
    study: Study, tasks: Sequence[Task], jobs: int, workshop: Workshop, console: Console
) -> None:
    run_tasks(tasks, study.folder / "logs", jobs, workshop.threads, console)


def _print_bill(study: Study, console: Console) -> None:
    bill = make_bill(study)
    grid = Grid(title=f"{study.name}: what it will cost", title_justify="left")
    for head in ("", "runs", "tokens", "device-hours", "per run"):
        grid.add_column(head, justify="right" if head else "left")
    for item in bill:
        grid.add_row(
            item.name,
            str(item.runs),
            f"{item.tokens:.3g}",
            f"{item.hours:,.3g}",
            f"{item.hours / item.runs:,.3g}",
        )
    total = sum(item.hours for item in bill)
    grid.add_row("all", str(sum(i.runs for i in bill)), "", f"{total:,.3g}", "", style="bold")
    console.print(grid)
    size = parameters(study, study.arms[0])
    known = f"{size:,} parameters" if size else "parameters unknown until the data is prepared"
    console.print(
        f"{known}; at an assumed {study.teraflops_per_device:g} model TFLOP/s per device "
        "(teraflops_per_device); start-up, saves and queueing come on top"
    )


def _submit(study: Study, cluster: str | None, console: Console) -> None:
    if cluster is None:
        raise ConfigError("--launcher slurm needs --cluster NAME, a file in configs/clusters")
    graph.prepare(study, console)
    stages = write_stages(study)
    command = [sys.executable, "-m", "launch", "stages", str(stages), "--cluster", cluster]
    if subprocess.run(command, check=False).returncode != 0:
        raise TrainingError(f"not submitted: {' '.join(command)}")
