"""``python -m launch slurm``: from a config to a job in the queue. On a login node: no torch."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_lm.config import RunConfig, load_config
from distributed_lm.data.manifest import read_manifest
from distributed_lm.errors import ConfigError, UserError
from distributed_lm.layout import Layout
from distributed_lm.planner.memory import check_fits, checkpoint_bytes
from launch.cluster import Cluster, seconds_of
from launch.environment import environment_without_slurm
from launch.health import code_hash
from launch.script import Wishes, container_prefix, plain, render, srun_options, task_python
from launch.supervisor.job import Job, write_whole
from launch.supervisor.journal import CANCELLED, Journal, job_ids, newest_step, read_journal

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("distributed_lm", "launch", "slurm")
SBATCH_SECONDS = 60
ACTIVE_STATES = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")


class SubmitError(UserError):
    """Slurm did not take the job."""

    exit_code = 1


@dataclass(frozen=True)
class Submission:
    """Everything that will be written and submitted."""

    config: RunConfig
    job: Job
    script: str
    script_path: Path
    chain: int
    """Further jobs that wait to go on with the run; 0 = none."""


def plan_submission(
    path: Path, overrides: Sequence[str], cluster: Cluster, wishes: Wishes
) -> Submission:
    """Check the config against the cluster, and lay out the job. Writes nothing.

    Raises:
        ConfigError: naming the field and what to do.
    """
    config = _with_absolute_paths(load_config(path, overrides))
    nodes = wishes.nodes or cluster.nodes
    layout = Layout.of(config, nodes * cluster.devices_per_node)
    vocab_size = _vocab_size(config)
    if cluster.device_memory_gb is not None:
        check_fits(config, layout, vocab_size, cluster.device_memory_gb * 1e9)
    _check_shared(config, cluster)
    hash_ = code_hash(ROOT)
    job = _job(config, cluster, wishes, nodes, hash_, vocab_size)
    script_path = job.slurm_dir / "run.sbatch"
    script = render(config, cluster, wishes, job)
    return Submission(config, job, script, script_path, wishes.chain)


def submit(submission: Submission) -> str:
    """Copy the code and the config, write job and script, and submit.

    Returns:
        The job id.

    Raises:
        SubmitError: with what sbatch said.
    """
    job = submission.job
    write_files(submission)
    write_whole(submission.script_path, submission.script)
    submitted = [sbatch(job.sbatch) for _ in range(1 + submission.chain)]
    record_jobs(job, submitted)
    return submitted[0]


def write_files(submission: Submission) -> None:
    """What the supervisor and the ranks read: code, config, job.

    Raises:
        ConfigError: if an earlier launch of this run is still in the queue.
    """
    job = submission.job
    _check_not_running(job)
    _copy_code(Path(job.code))
    job.log_dir.mkdir(parents=True, exist_ok=True)
    write_whole(job.slurm_dir / "config.yaml", submission.config.to_yaml())
    job.write()
    (job.slurm_dir / CANCELLED).unlink(missing_ok=True)
    # Before the job can start: from here on the journal counts anew whether the run is finished,
    # and restarts without progress.
    journal = Journal(job.slurm_dir, job=None, restart=0)
    journal.record("launch", f"of {job.code_hash}", step=newest_step(Path(job.run_dir)))


def record_jobs(job: Job, submitted: list[str]) -> None:
    """For ``status`` and ``cancel``: the jobs may still wait in the queue."""
    journal = Journal(job.slurm_dir, job=submitted[0], restart=0)
    journal.record("submitted", f"job {', '.join(submitted)}", jobs=submitted)


def test_only(submission: Submission) -> str | None:
    """What ``sbatch --test-only`` says to the script; None where there is no sbatch."""
    if shutil.which("sbatch") is None:
        return None
    try:
        asked = subprocess.run(
            ["sbatch", "--test-only"], input=submission.script, capture_output=True, text=True,
            check=False, timeout=SBATCH_SECONDS, env=environment_without_slurm(), cwd="/",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {SBATCH_SECONDS} s"
    return "; ".join((asked.stderr.strip() or asked.stdout.strip()).splitlines())


def _job(
    config: RunConfig, cluster: Cluster, wishes: Wishes, nodes: int, hash_: str, vocab_size: int
) -> Job:
    run_dir = config.run_dir
    slurm_dir = run_dir / "slurm"
    supervision = config.supervision
    limit = wishes.time or cluster.time
    lead_seconds = max(cluster.lead_seconds, _measured_lead(run_dir))
    if 0 < seconds_of(limit) <= lead_seconds:
        raise ConfigError(
            f"time={limit} is {seconds_of(limit)} s, and a run stops to save {lead_seconds} s "
            "before (lead_seconds in the cluster file, or what its saves have taken); ask for more"
        )
    return Job(
        run_dir=str(run_dir),
        code=str(run_dir / "code" / hash_),
        code_hash=hash_,
        arguments=["train", str(slurm_dir / "config.yaml")],
        nodes=nodes,
        spare_nodes=wishes.spare_nodes,
        tasks_per_node=cluster.devices_per_node,
        devices_per_node=cluster.devices_per_node if cluster.device == "gpu" else 0,
        legal_nodes=_legal_nodes(config, nodes, cluster.devices_per_node),
        time_seconds=seconds_of(limit) or None,
        lead_seconds=lead_seconds,
        hang_timeout_seconds=supervision.hang_timeout_seconds,
        max_restarts_without_progress=supervision.max_restarts_without_progress,
        prefix=container_prefix(cluster, config),
        srun_options=srun_options(cluster, config),
        python=task_python(cluster),
        environment={name: variable.value for name, variable in cluster.environment.items()},
        network_interface=cluster.network_interface,
        health_check=cluster.health_check,
        preemption_requeues=cluster.preemption_requeues,
        minimum_disk_bytes=checkpoint_bytes(config, vocab_size),
        sbatch=[str(slurm_dir / "run.sbatch")],
        is_chained=wishes.chain > 0,
        steps=config.train.steps,
        alert_command=wishes.alert_command,
        mail=wishes.mail,
    )


def _legal_nodes(config: RunConfig, nodes: int, devices: int) -> list[int]:
    """Numbers of nodes on which the run can go on, from ``nodes`` down."""
    legal = []
    for number in range(nodes, 0, -1):
        try:
            Layout.of(config, number * devices)
        except ConfigError:
            continue
        legal.append(number)
    return legal


def _measured_lead(run_dir: Path) -> int:
    """Seconds that the run's own saves ask for so far: three of the slowest, and a minute."""
    from distributed_lm.tracking.metrics_file import read_records

    saves = [
        record["save_seconds"]
        for record in read_records(run_dir / "metrics.jsonl")
        if record.get("event") == "save"
    ]
    return math.ceil(3 * max(saves) + 60) if saves else 0


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """The ranks work in another folder than the user's."""
    data = config.data
    path = data.path
    if isinstance(path, str):
        path = str(Path(path).resolve())
    else:
        path = tuple(
            entry.model_copy(update={"path": str(Path(entry.path).resolve())}) for entry in path
        )
    cache = data.cache_path and str(Path(data.cache_path).resolve())
    return config.model_copy(
        update={
            "output_dir": str(Path(config.output_dir).resolve()),
            "data": data.model_copy(update={"path": path, "cache_path": cache}),
        }
    )


def _check_shared(config: RunConfig, cluster: Cluster) -> None:
    shared = Path(cluster.shared or "/").resolve()
    if not config.run_dir.is_relative_to(shared):
        raise ConfigError(
            f"output_dir={config.output_dir} is not in {cluster.shared}, the folder that all nodes "
            f"of this cluster see; set output_dir={cluster.shared}/runs"
        )
    plain("output_dir", config.run_dir)


def _check_not_running(job: Job) -> None:
    """Raises ConfigError if an earlier launch of this run is still in the queue."""
    if shutil.which("squeue") is None:
        return
    jobs = job_ids(read_journal(job.slurm_dir))
    if not jobs:
        return
    asked = subprocess.run(
        ["squeue", "--noheader", "--format=%i %T", f"--jobs={','.join(jobs)}"],
        capture_output=True, text=True, check=False, timeout=SBATCH_SECONDS,
        env=environment_without_slurm(),
    )  # fmt: skip
    active = [line for line in asked.stdout.splitlines() if line.strip()]
    active = [line for line in active if line.split()[1] in ACTIVE_STATES]
    if active:
        raise ConfigError(
            f"{job.run_dir}: job {active[0]} already works on this run; wait for it, or cancel it "
            f"with: python -m launch cancel {job.run_dir}"
        )


def _copy_code(folder: Path) -> None:
    """What is submitted is what runs, whatever is edited meanwhile."""
    if folder.exists():
        return
    draft = folder.with_name(f".{folder.name}.{time.time_ns()}")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, draft / package, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    draft.rename(folder)


def sbatch(arguments: list[str]) -> str:
    """Submit; returns the job id."""
    try:
        asked = subprocess.run(
            ["sbatch", "--parsable", *arguments], capture_output=True, text=True, check=False,
            timeout=SBATCH_SECONDS, env=environment_without_slurm(),
        )  # fmt: skip
    except FileNotFoundError:
        raise SubmitError("sbatch is not here; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SubmitError(f"sbatch did not answer within {SBATCH_SECONDS} s") from None
    if asked.returncode != 0:
        said = (asked.stderr.strip() or asked.stdout.strip()).splitlines()
        raise SubmitError(f"sbatch said: {'; '.join(said)}")
    return asked.stdout.strip().split(";")[0]


def _vocab_size(config: RunConfig) -> int:
    """Of the data set, or the larger one that the config pads it to."""
    found = read_manifest(config.data.corpora[0].path).vocab_size
    return max(found, config.model.vocab_size or 0)


def describe(submission: Submission) -> str:
    """The script and what the supervisor is told, for ``--dry-run``."""
    job = "\n".join(f"{k}: {v}" for k, v in dataclasses.asdict(submission.job).items())
    return f"{submission.script}\n# {submission.job.slurm_dir}/job.json\n{job}"
