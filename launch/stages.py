"""``python -m launch stages``: a graph of stages as job arrays that wait for one another."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_lm.errors import ConfigError
from launch.cancel import JOB_LIST, scancel
from launch.cluster import Cluster
from launch.graph import Graph, Stage, Task
from launch.plan import digest, plan_command, plan_submission
from launch.script import Wishes, render
from launch.submit import SubmitError, check_not_queued, record_jobs, sbatch, write_files
from launch.supervisor.job import Job, write_whole
from launch.supervisor.journal import is_finished, read_journal


@dataclass(frozen=True)
class Planned:
    """One task as a job."""

    job: Job
    config: str | None
    """YAML of the run that it trains; None = it trains none."""
    works_on_run: bool

    @property
    def has_new_config(self) -> bool:
        """Whether it was never submitted with this config, nor has it got it from a stage."""
        if self.config is None:
            return False
        path = self.job.slurm_dir / "config.yaml"
        if not path.exists():
            return True
        known = (_launched(self.job).get("config_digest"), digest(path.read_text(encoding="utf-8")))
        return self.job.config_digest not in known

    @property
    def is_launched_alike(self) -> bool:
        same = _launched(self.job).get("arguments") == self.job.arguments
        return same and not self.has_new_config


@dataclass(frozen=True)
class PlannedStage:
    stage: Stage
    cluster: Cluster
    wishes: Wishes
    todo: tuple[Planned, ...]
    done: tuple[Planned, ...]
    """Finished already: they are left out."""


@dataclass(frozen=True)
class SubmittedStage:
    """What has become of a stage."""

    name: str
    jobs: tuple[str, ...]
    """Ids of its arrays, of which all but the first are links of a chain; none = all was done."""
    todo: tuple[Job, ...]
    done: tuple[Job, ...]


def submit_graph(
    graph: Graph, cluster: Cluster, wishes: Wishes, limit: int | None
) -> list[SubmittedStage]:
    """Submit the stages, each as one job array that waits for those before it. Tasks that are
    finished are left out; each of the others comes back by itself until it is finished.

    Args:
        limit: so many of the tasks of an array at once; None = all.

    Raises:
        ConfigError: before anything is written.
        SubmitError: with what sbatch said; then no stage stays in the queue.
    """
    stages = plan_stages(graph, cluster, wishes)
    todo = [task for stage in stages for task in stage.todo]
    check_not_queued([task.job for task in todo])
    stamp = time.strftime("%Y%m%d-%H%M%S")
    submitted: dict[str, SubmittedStage] = {}
    try:
        for stage in stages:
            folder = graph.path / f"{stage.stage.name}-{stamp}"
            name = f"{graph.name}-{stage.stage.name}"
            after = [submitted[one].jobs[-1] for one in stage.stage.after if submitted[one].jobs]
            at_once = min(filter(None, (limit, stage.stage.limit)), default=None)
            submitted[stage.stage.name] = _submit(stage, name, folder, after, at_once)
    except SubmitError as error:
        started = [job for one in submitted.values() for job in one.jobs]
        scancel(started)
        undone = f"; cancelled again: job {', '.join(started)}" if started else ""
        raise SubmitError(f"{error}{undone}") from None
    return list(submitted.values())


def _submit(
    stage: PlannedStage, name: str, folder: Path, after: Sequence[str], limit: int | None
) -> SubmittedStage:
    """Write the files of a stage's tasks, and submit their array."""
    done = tuple(task.job for task in stage.done)
    if not stage.todo:
        return SubmittedStage(stage.stage.name, (), (), done)
    script, jobs_file = folder / "run.sbatch", folder / JOB_LIST
    # What is said on the command line goes before what the script says.
    options = [f"--job-name={name}", f"--output={folder}/slurm-%j.log", "--kill-on-invalid-dep=yes"]
    jobs = []
    for index, task in enumerate(stage.todo):
        job = dataclasses.replace(
            task.job,
            batch_log_dir=str(folder),
            sbatch=[f"--array={index}", *options, str(script)],
        )
        # A config that was submitted before may have been changed since by a stage before this.
        write_files(job, task.config if task.has_new_config else None)
        jobs.append(job)
    write_whole(jobs_file, json.dumps([str(job.slurm_dir / "job.json") for job in jobs], indent=1))
    # Links of the chain wait for one another by number: all tasks of an array have one name.
    alone = dataclasses.replace(stage.wishes, chain=0)
    write_whole(script, render(name, stage.cluster, alone, jobs[0], jobs_file))
    tasks = f"--array=0-{len(jobs) - 1}" + (f"%{limit}" if limit else "")
    arrays: list[str] = []
    for _ in range(1 + stage.wishes.chain):
        before = arrays[-1:] or after
        dependency = [f"--dependency=afterany:{':'.join(before)}"] if before else []
        arrays.append(sbatch([tasks, *dependency, *options, str(script)]))
    for index, job in enumerate(jobs):
        record_jobs(job, [f"{array}_{index}" for array in arrays])
    return SubmittedStage(stage.stage.name, tuple(arrays), tuple(jobs), done)


def plan_stages(graph: Graph, cluster: Cluster, wishes: Wishes) -> list[PlannedStage]:
    """Lay out all tasks, and tell apart those that are done. Writes nothing.

    Raises:
        ConfigError: if a config is wrong, or two tasks would work in one folder.
    """
    one_process = cluster.for_command()
    alone = dataclasses.replace(wishes, nodes=1, spare_nodes=0)
    planned: dict[str, list[Planned]] = {}
    for stage in graph.stages:
        works_on_runs = stage.tasks[0].config is not None
        planned[stage.name] = [
            _plan_task(task, cluster, wishes)
            if works_on_runs
            else _plan_command(graph, task, one_process, alone)
            for task in stage.tasks
        ]
    _check_unique(planned)
    done: set[Path] = set()
    stages = []
    for stage in graph.stages:
        tasks = []
        for task in planned[stage.name]:
            before = [one.job for one in _before(task, stage, planned)]
            job = dataclasses.replace(task.job, after=tuple(str(one.slurm_dir) for one in before))
            if _is_done(task, before, done) and not _informs_new(task, stage, graph, planned):
                done.add(job.slurm_dir)
            tasks.append(dataclasses.replace(task, job=job))
        todo = tuple(task for task in tasks if task.job.slurm_dir not in done)
        left = tuple(task for task in tasks if task.job.slurm_dir in done)
        on_runs = tasks[0].works_on_run
        where = (cluster, wishes) if on_runs else (one_process, alone)
        stages.append(PlannedStage(stage, *where, todo, left))
    return stages


def _plan_task(task: Task, cluster: Cluster, wishes: Wishes) -> Planned:
    """Of a task that works on a run."""
    assert task.config is not None
    submission = plan_submission(Path(task.config), task.overrides, cluster, wishes)
    if task.trains:
        return Planned(submission.job, submission.config.to_yaml(), works_on_run=True)
    job = submission.job
    name, *arguments = task.command
    job = dataclasses.replace(
        job,
        part=task.folder_of_part,
        arguments=[name, job.run_dir, *arguments],
        legal_nodes=list(range(job.nodes, 0, -1)),
        minimum_disk_bytes=0,
        tells_end=name == "evaluate",
    )
    return Planned(job, None, works_on_run=True)


def _plan_command(graph: Graph, task: Task, cluster: Cluster, wishes: Wishes) -> Planned:
    """Of a task that is a plain command."""
    job = plan_command(graph.path, task.folder_of_part, list(task.command), cluster, wishes)
    return Planned(job, None, works_on_run=False)


def _check_unique(planned: dict[str, list[Planned]]) -> None:
    known: set[Path] = set()
    for name, tasks in planned.items():
        for task in tasks:
            folder = task.job.slurm_dir
            if folder in known:
                remedy = "its own part" if task.job.part else "its own name"
                where = f"part {task.job.part} of " if task.job.part else ""
                raise ConfigError(
                    f"stage {name}: two tasks are {where}{task.job.run_dir}; give each {remedy}"
                )
            known.add(folder)


def _before(task: Planned, stage: Stage, planned: dict[str, list[Planned]]) -> Iterator[Planned]:
    """What it waits for: of each stage before, what is about its run, or else all."""
    for name in stage.after:
        same = [one for one in planned[name] if one.job.run_dir == task.job.run_dir]
        yield from same if task.works_on_run and same else planned[name]


def _is_done(task: Planned, before: Sequence[Job], done: set[Path]) -> bool:
    """Whether it is finished, and nothing that it is made from is newer."""
    at = _finished_at(task.job)
    if at is None or not task.is_launched_alike:
        return False
    # A run is made from its config. The other runs and commands before it were to come first.
    sources = [job for job in before if not task.works_on_run or job.run_dir == task.job.run_dir]
    return all(job.slurm_dir in done and (_finished_at(job) or at) <= at for job in sources)


def _finished_at(job: Job) -> float | None:
    """In seconds since the epoch; None if it is not finished since it was last launched."""
    events = read_journal(job.slurm_dir)
    if not is_finished(events):
        return None
    return max(float(event["time"]) for event in events if event["event"] == "finished")


def _informs_new(
    task: Planned, stage: Stage, graph: Graph, planned: dict[str, list[Planned]]
) -> bool:
    """Whether it is a command after which a run trains whose config is new: it may be to fill that
    in."""
    if task.works_on_run:
        return False
    later = [one.name for one in graph.stages if stage.name in one.after]
    return any(one.has_new_config for name in later for one in planned[name])


def _launched(job: Job) -> dict[str, object]:
    """What it was submitted as before; empty if it was not."""
    try:
        values = json.loads((job.slurm_dir / "job.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return dict(values)
