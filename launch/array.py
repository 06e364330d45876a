"""``python -m launch array``: several runs as one job array, and their evaluations after them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_lm.errors import ConfigError
from launch.cluster import Cluster
from launch.script import Wishes, render
from launch.submit import Submission, plan_submission, record_jobs, sbatch, write_files
from launch.supervisor.job import write_whole


@dataclass(frozen=True)
class Submitted:
    """One run of an array, and the array of its evaluations."""

    run_dir: Path
    job: str
    """``ARRAY_INDEX``, as Slurm's commands take it."""
    evaluations: str | None
    """Job id of the array of its evaluations, one task per length."""


def submit_runs(
    paths: Sequence[Path],
    overrides: Sequence[str],
    cluster: Cluster,
    wishes: Wishes,
    limit: int | None,
    lengths: Sequence[int],
) -> list[Submitted]:
    """Submit the runs as one array, each task coming back by itself until its run is finished; and
    for each run an array of evaluations that waits for it.

    Args:
        limit: so many of the tasks of an array at once; None = all.
        lengths: context lengths to evaluate each run at; none = no evaluation.

    Raises:
        ConfigError: if a config is wrong, or two of them are the same run.
        SubmitError: with what sbatch said.
    """
    runs = [plan_submission(path, overrides, cluster, wishes) for path in paths]
    folders = [run.job.run_dir for run in runs]
    twice = [folder for folder in folders if folders.count(folder) > 1]
    if twice:
        raise ConfigError(f"{twice[0]}: two of the configs are this run; give each its own name")
    array = _submit(f"array-{runs[0].config.name}", runs, cluster, wishes, limit, after=None)
    submitted = []
    for index, run in enumerate(runs):
        job = f"{array}_{index}"
        evaluations = None
        if lengths:
            parts = [_evaluation(run, length) for length in lengths]
            name = f"evaluate-{run.config.name}"
            evaluations = _submit(name, parts, cluster, wishes, limit, after=job)
        submitted.append(Submitted(Path(run.job.run_dir), job, evaluations))
    return submitted


def _evaluation(run: Submission, length: int) -> Submission:
    """The job that scores a run at one length, in a folder of its own below the run's."""
    job = run.job
    nodes = job.legal_nodes[0]
    part = dataclasses.replace(
        job,
        part=f"evaluate_{length}",
        arguments=["evaluate", job.run_dir, "--lengths", str(length)],
        legal_nodes=list(range(nodes, 0, -1)),
        minimum_disk_bytes=0,
    )
    return dataclasses.replace(run, job=part)


def _submit(
    name: str,
    submissions: Sequence[Submission],
    cluster: Cluster,
    wishes: Wishes,
    limit: int | None,
    after: str | None,
) -> str:
    """Write all files and submit the array; returns its job id."""
    first = submissions[0]
    folder = Path(first.job.run_dir).parent / "arrays" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    script, jobs = folder / "run.sbatch", folder / "jobs.json"
    # What is said on the command line goes before what the script says.
    options = [f"--job-name={name}", f"--output={folder}/slurm-%j.log"]
    paths = []
    for index, submission in enumerate(submissions):
        job = dataclasses.replace(
            submission.job,
            batch_log_dir=str(folder),
            sbatch=[f"--array={index}", *options, str(script)],
        )
        write_files(dataclasses.replace(submission, job=job))
        paths.append(str(job.slurm_dir / "job.json"))
    write_whole(jobs, json.dumps(paths, indent=1))
    write_whole(script, render(first.config, cluster, wishes, first.job, jobs))
    at_once = f"%{limit}" if limit else ""
    dependency = [f"--dependency=afterok:{after}"] if after else []
    tasks = f"--array=0-{len(submissions) - 1}{at_once}"
    array = sbatch([tasks, *dependency, *options, str(script)])
    for index, submission in enumerate(submissions):
        record_jobs(submission.job, [f"{array}_{index}"])
    return array
