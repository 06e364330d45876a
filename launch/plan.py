"""What a job will be: a config checked against a cluster, or a plain command. Writes nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_lm.config import RunConfig, load_config
from distributed_lm.data.manifest import read_manifest
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.planner.memory import Device, check_fits, checkpoint_bytes
from launch.cluster import Cluster, seconds_of
from launch.health import code_hash
from launch.script import (
    Wishes,
    container_prefix,
    folders_of_run,
    own_module_folder,
    plain,
    render,
    srun_options,
    task_python,
)
from launch.supervisor.job import Job

ROOT = Path(__file__).resolve().parents[1]
# For a command that says nothing of its progress.
NEVER_SECONDS = 10**9


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
    """Check the config against the cluster, and lay out the job.

    Raises:
        ConfigError: naming the field and what to do.
    """
    config = _with_absolute_paths(load_config(path, overrides))
    nodes = wishes.nodes or cluster.nodes
    layout = Layout.of(config, nodes * cluster.devices_per_node)
    vocab_size = _vocab_size(config)
    if cluster.device_memory_gb is not None:
        device: Device = "cuda" if cluster.device == "gpu" else "cpu"
        check_fits(config, layout, vocab_size, cluster.device_memory_gb * 1e9, device)
    _check_shared("output_dir", config.output_dir, config.run_dir, cluster)
    job = _job(config, cluster, wishes, nodes, vocab_size)
    script_path = job.slurm_dir / "run.sbatch"
    script = render(config.name, cluster, wishes, job)
    return Submission(config, job, script, script_path, wishes.chain)


def plan_command(
    folder: Path, part: str, arguments: list[str], cluster: Cluster, wishes: Wishes
) -> Job:
    """Lay out a command of ``distributed-lm`` that is one process and works on no run; its journal
    is in ``FOLDER/slurm/PART``.

    Raises:
        ConfigError: if the nodes do not see the folder.
    """
    _check_shared("folder", str(folder), folder, cluster)
    # What it reads may be anywhere.
    folders = [str(folder), *([cluster.shared] if cluster.shared else [])]
    return Job(
        **_on_cluster(cluster, wishes, folder, folders),
        arguments=arguments,
        part=part,
        nodes=1,
        legal_nodes=[1],
        hang_timeout_seconds=NEVER_SECONDS,
        max_restarts_without_progress=1,
        health_check=False,
        minimum_disk_bytes=0,
        sbatch=[],
        steps=0,
        tells_end=False,
    )


def _job(config: RunConfig, cluster: Cluster, wishes: Wishes, nodes: int, vocab_size: int) -> Job:
    slurm_dir = config.run_dir / "slurm"
    supervision = config.supervision
    own_modules = own_module_folder(config)
    return Job(
        **_on_cluster(cluster, wishes, config.run_dir, folders_of_run(config)),
        arguments=["train", str(slurm_dir / "config.yaml")],
        nodes=nodes,
        legal_nodes=_legal_nodes(config, nodes, cluster.devices_per_node),
        hang_timeout_seconds=supervision.hang_timeout_seconds,
        max_restarts_without_progress=supervision.max_restarts_without_progress,
        health_check=cluster.health_check,
        minimum_disk_bytes=checkpoint_bytes(config, vocab_size),
        sbatch=[str(slurm_dir / "run.sbatch")],
        steps=config.train.steps,
        config_digest=digest(config.to_yaml()),
        own_modules="" if own_modules is None else plain("model.position", own_modules),
    )


def _on_cluster(
    cluster: Cluster, wishes: Wishes, run_dir: Path, folders: Sequence[str]
) -> dict[str, Any]:
    """Fields of any job that works in ``run_dir``.

    Args:
        folders: that a container must show.
    """
    limit = wishes.time or cluster.time
    lead_seconds = max(cluster.lead_seconds, _measured_lead(run_dir))
    if 0 < seconds_of(limit) <= lead_seconds:
        raise ConfigError(
            f"time={limit} is {seconds_of(limit)} s, and a run stops to save {lead_seconds} s "
            "before (lead_seconds in the cluster file, or what its saves have taken); ask for more"
        )
    hash_ = code_hash(ROOT)
    return dict(
        run_dir=str(run_dir),
        code=str(run_dir / "code" / hash_),
        code_hash=hash_,
        spare_nodes=wishes.spare_nodes,
        tasks_per_node=cluster.devices_per_node,
        devices_per_node=cluster.devices_per_node if cluster.device == "gpu" else 0,
        time_seconds=seconds_of(limit) or None,
        lead_seconds=lead_seconds,
        prefix=container_prefix(cluster, folders),
        srun_options=srun_options(cluster, folders),
        python=task_python(cluster),
        environment={name: variable.value for name, variable in cluster.environment.items()},
        network_interface=cluster.network_interface,
        preemption_requeues=cluster.preemption_requeues,
        is_chained=wishes.chain > 0,
        alert_command=wishes.alert_command,
        mail=wishes.mail,
    )


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def _check_shared(field: str, value: str, folder: Path, cluster: Cluster) -> None:
    shared = Path(cluster.shared or "/").resolve()
    if not folder.is_relative_to(shared):
        raise ConfigError(
            f"{field}={value} is not in {cluster.shared}, the folder that all nodes of this "
            f"cluster see; set {field}={cluster.shared}/runs"
        )
    plain(field, folder)


def _vocab_size(config: RunConfig) -> int:
    """Of the data set, or the larger one that the config pads it to."""
    found = read_manifest(config.data.corpora[0].path).vocab_size
    return max(found, config.model.vocab_size or 0)
