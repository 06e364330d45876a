"""``RUN/slurm/job.json``: what the launcher has decided on the login node, for the batch script."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One run as a batch job. Paths are absolute."""

    run_dir: str
    code: str
    """Folder that is first in the ranks' ``PYTHONPATH``: the code as submitted."""
    code_hash: str
    arguments: list[str]
    """Of ``distributed-lm``: command, config and overrides."""
    nodes: int
    """Nodes that train; the allocation has ``spare_nodes`` more."""
    spare_nodes: int
    tasks_per_node: int
    devices_per_node: int
    """GPUs that each node must show; 0 = it computes on its CPUs."""
    legal_nodes: list[int]
    """Numbers of nodes on which the run can go on, largest first."""
    time_seconds: int | None
    """Limit of the allocation; None = the partition's, not known here."""
    lead_seconds: int
    """Before that limit, when to save and leave; grows with what saves are measured to take."""
    hang_timeout_seconds: int
    max_restarts_without_progress: int
    prefix: list[str]
    """What a task's command line is put behind: a container's, or nothing."""
    srun_options: list[str]
    python: str
    """Interpreter of the tasks."""
    environment: dict[str, str]
    network_interface: str | None
    health_check: bool
    preemption_requeues: bool
    """Whether Slurm itself requeues a job that it preempts (PreemptMode=REQUEUE)."""
    minimum_disk_bytes: int
    sbatch: list[str]
    """Command line that submits this job again, without ``sbatch`` itself."""
    is_chained: bool
    """Whether jobs that go on with the run are waiting in the queue already."""
    steps: int
    """``train.steps``."""
    alert_command: str | None = None
    mail: str | None = None
    own_modules: str = ""
    """Folder of the user's own modules that the config names, if there are any."""
    part: str = ""
    """Of the run, if the job is not its training: ``evaluate_2048``."""
    tells_end: bool = True
    """Whether rank 0 itself tells when there is nothing left to do; else exit code 0 says so."""
    after: tuple[str, ...] = ()
    """Folders of journals whose work must be finished before this can begin."""
    config_digest: str = ""
    """Of the config as submitted: a stage before this one may have changed the file since."""
    batch_log_dir: str = ""
    """Where Slurm puts the batch script's output, ``slurm-JOB.log``; off = with the ranks' logs."""

    @property
    def slurm_dir(self) -> Path:
        return Path(self.run_dir) / "slurm" / self.part

    @property
    def log_dir(self) -> Path:
        return Path(self.run_dir) / "logs" / self.part

    def batch_log(self, number: int) -> Path:
        """What the batch script and Slurm itself say."""
        return Path(self.batch_log_dir or self.log_dir) / f"slurm-{number}.log"

    def write(self) -> Path:
        path = self.slurm_dir / "job.json"
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=1))
        return path

    @classmethod
    def read(cls, path: Path) -> Job:
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "after": tuple(values["after"])})


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
