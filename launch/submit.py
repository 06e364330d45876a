"""``python -m launch slurm``: from a config to a job in the queue. On a login node: no torch."""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from distributed_lm.config import RunConfig, load_config
from distributed_lm.data.manifest import read_manifest
from distributed_lm.errors import ConfigError, UserError
from distributed_lm.layout import Layout
from distributed_lm.planner.memory import check_fits, checkpoint_bytes
from launch.cluster import Cluster, seconds_of
from launch.environment import environment_without_slurm
from launch.health import code_hash
from launch.supervisor.job import Job, write_whole
from launch.supervisor.journal import CANCELLED, Journal, job_ids, read_journal

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "slurm/run.sbatch"
PACKAGES = ("distributed_lm", "launch", "slurm")
SBATCH_SECONDS = 60
ACTIVE_STATES = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")


class SubmitError(UserError):
    """Slurm did not take the job."""

    exit_code = 1


class Script(Template):
    """With ``@name``: ``$`` is the shell's."""

    delimiter = "@"


@dataclass(frozen=True)
class Submission:
    """Everything that will be written and submitted."""

    config: RunConfig
    job: Job
    script: str
    script_path: Path
    chain: int
    """Further jobs that wait to go on with the run; 0 = none."""


@dataclass(frozen=True)
class Wishes:
    """What the command line asks of one launch, beside the config; None = as the cluster file."""

    nodes: int | None = None
    time: str | None = None
    spare_nodes: int = 0
    chain: int = 0
    alert_command: str | None = None
    mail: str | None = None


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


def render(
    config: RunConfig, cluster: Cluster, wishes: Wishes, job: Job, job_file: Path | None = None
) -> str:
    """The batch script, from the template.

    Args:
        job_file: what the supervisor is to read, if not the job's own file.
    """
    directives = "\n".join(f"#SBATCH {option}" for option in _options(config, cluster, wishes, job))
    python = sys.executable if cluster.container is None else "python3"
    if cluster.venv is not None:
        python = f"{cluster.venv}/bin/python"
    job_file = job_file or job.slurm_dir / "job.json"
    supervisor = [python, "-m", "launch.supervisor", str(job_file)]
    return Script((ROOT / TEMPLATE).read_text(encoding="utf-8")).substitute(
        directives=directives,
        title=config.name,
        environment="\n".join(_setup(cluster, job)),
        supervisor=shlex.join(supervisor),
    )


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
    Journal(job.slurm_dir, job=None, restart=0).record("launch", f"of {job.code_hash}")


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


def _options(config: RunConfig, cluster: Cluster, wishes: Wishes, job: Job) -> list[str]:
    nodes = job.nodes + job.spare_nodes
    options = {
        "job-name": config.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": nodes,
        "ntasks-per-node": cluster.devices_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory,
        "time": wishes.time or cluster.time,
        "signal": f"B:USR1@{job.lead_seconds}",
        "output": f"{job.log_dir}/slurm-%j.log",
        "chdir": job.code,
        "open-mode": "append",
    }
    if cluster.device == "gpu":
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        options["gpus-per-node"] = f"{kind}{cluster.devices_per_node}"
    if wishes.chain:
        options["dependency"] = "singleton"
    flags = ["--requeue"]
    if cluster.exclusive:
        flags.append("--exclusive")
    # A dead node need not take the allocation along; but if it is the first one, a task on another
    # must be able to call scontrol, which a container hides.
    if nodes > 1 and cluster.commands_on_nodes and cluster.container is None:
        flags.append("--no-kill")
    named = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return named + flags + list(cluster.sbatch_options)


def _setup(cluster: Cluster, job: Job) -> list[str]:
    """Lines of shell: modules, and the path on which the supervisor is found."""
    lines = [f"module load {shlex.quote(module)}" for module in cluster.modules]
    lines += [f"# {name}: {variable.reason}" for name, variable in cluster.environment.items()]
    lines += [
        f"export {name}={shlex.quote(variable.value)}"
        for name, variable in cluster.environment.items()
    ]
    if cluster.scratch is not None:
        lines.append(f"export TMPDIR={shlex.quote(cluster.scratch)}")
    return [*lines, f"export PYTHONPATH={shlex.quote(job.code)}"]


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
        prefix=_container_prefix(cluster, config),
        srun_options=_srun_options(cluster, config),
        python=_task_python(cluster),
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


def _srun_options(cluster: Cluster, config: RunConfig) -> list[str]:
    # Slurm 22.05 and later do not hand sbatch's --cpus-per-task on: each rank would get one core.
    cpus = [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    return [*cpus, *_container_options(cluster, config), *cluster.srun_options]


def _task_python(cluster: Cluster) -> str:
    if cluster.container is not None:
        return cluster.container.python
    return f"{cluster.venv}/bin/python" if cluster.venv else sys.executable


def _container_prefix(cluster: Cluster, config: RunConfig) -> list[str]:
    container = cluster.container
    if container is None or container.kind != "apptainer":
        return []
    if not container.image.startswith("/") and "://" not in container.image:
        raise ConfigError(
            f"container.image={container.image!r}: expected a path from / on, or an address as in "
            "docker://…: the ranks start in another folder than this one"
        )
    mounts = _mounts(cluster, config) + list(container.mounts)
    nvidia = ["--nv"] if cluster.device == "gpu" else []
    binds = [part for mount in mounts for part in ("--bind", mount)]
    return ["apptainer", "exec", *nvidia, *binds, container.image]


def _container_options(cluster: Cluster, config: RunConfig) -> list[str]:
    container = cluster.container
    if container is None or container.kind != "pyxis":
        return []
    mounts = _mounts(cluster, config) + list(container.mounts)
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    return [f"--container-image={container.image}", f"--container-mounts={','.join(pairs)}"]


def _mounts(cluster: Cluster, config: RunConfig) -> list[str]:
    """Folders that a container must show for the run to work in it."""
    data = config.data
    paths = [str(config.run_dir), *(corpus.path for corpus in data.corpora), data.cache_path]
    return [_plain("data.path", path) for path in [*paths, cluster.scratch] if path is not None]


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
    _plain("output_dir", config.run_dir)


def _plain(field: str, path: Path | str) -> str:
    """A path for a #SBATCH line, which is split at blanks and knows ``%``-patterns, for
    ``PYTHONPATH`` and for a container's mounts.

    Raises:
        ConfigError: if something in it would be read as more than a name.
    """
    text = str(path)
    if not text.isprintable() or set(text) & set(" \"'`$\\#%:,;&|<>!"):
        raise ConfigError(
            f"{field}: {text!r} has a blank, a quote or another character that Slurm or a shell "
            "reads as more than a name; choose another folder"
        )
    return text


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
