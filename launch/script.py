"""The batch script of a job, from ``slurm/run.sbatch``, and how its tasks get into a container."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError
from launch.cluster import Cluster
from launch.supervisor.job import Job

TEMPLATE = Path(__file__).resolve().parents[1] / "slurm" / "run.sbatch"


class Script(Template):
    """With ``@name``: ``$`` is the shell's."""

    delimiter = "@"


@dataclass(frozen=True)
class Wishes:
    """What the command line asks of one launch, beside the config; None = as the cluster file."""

    nodes: int | None = None
    time: str | None = None
    spare_nodes: int = 0
    chain: int = 0
    alert_command: str | None = None
    mail: str | None = None


def render(
    name: str, cluster: Cluster, wishes: Wishes, job: Job, job_file: Path | None = None
) -> str:
    """The batch script, from the template.

    Args:
        name: of the job, in the queue.
        job_file: what the supervisor is to read, if not the job's own file.
    """
    directives = "\n".join(f"#SBATCH {option}" for option in _options(name, cluster, wishes, job))
    python = sys.executable if cluster.container is None else "python3"
    if cluster.venv is not None:
        python = f"{cluster.venv}/bin/python"
    job_file = job_file or job.slurm_dir / "job.json"
    supervisor = [python, "-m", "launch.supervisor", str(job_file)]
    return Script(TEMPLATE.read_text(encoding="utf-8")).substitute(
        directives=directives,
        title=name,
        environment="\n".join(_setup(cluster, job)),
        supervisor=shlex.join(supervisor),
    )


def _options(name: str, cluster: Cluster, wishes: Wishes, job: Job) -> list[str]:
    nodes = job.nodes + job.spare_nodes
    options = {
        "job-name": name,
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


def own_module_folder(config: RunConfig) -> Path | None:
    """Where the user's own position method is imported from, for the ranks, which start in another
    folder; None if there is none, or it is installed.

    Raises:
        ConfigError: if its module is not to be found from here.
    """
    module, colon, _ = config.model.position.partition(":")
    if not colon:
        return None
    name = module.partition(".")[0]
    found = importlib.util.find_spec(name)
    places = [*(found.submodule_search_locations or []), found.origin] if found else []
    if not places or places[0] is None:
        raise ConfigError(
            f"model.position={config.model.position}: there is no module {name} here; launch from "
            "the folder that has it, or set PYTHONPATH"
        )
    folder = Path(places[0]).resolve().parent
    return None if "site-packages" in folder.parts else folder


def srun_options(cluster: Cluster, folders: Sequence[str]) -> list[str]:
    # Slurm 22.05 and later do not hand sbatch's --cpus-per-task on: each rank would get one core.
    cpus = [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    return [*cpus, *_container_options(cluster, folders), *cluster.srun_options]


def task_python(cluster: Cluster) -> str:
    if cluster.container is not None:
        return cluster.container.python
    return f"{cluster.venv}/bin/python" if cluster.venv else sys.executable


def container_prefix(cluster: Cluster, folders: Sequence[str]) -> list[str]:
    container = cluster.container
    if container is None or container.kind != "apptainer":
        return []
    if not container.image.startswith("/") and "://" not in container.image:
        raise ConfigError(
            f"container.image={container.image!r}: expected a path from / on, or an address as in "
            "docker://…: the ranks start in another folder than this one"
        )
    mounts = _mounts(cluster, folders) + list(container.mounts)
    nvidia = ["--nv"] if cluster.device == "gpu" else []
    binds = [part for mount in mounts for part in ("--bind", mount)]
    return ["apptainer", "exec", *nvidia, *binds, container.image]


def _container_options(cluster: Cluster, folders: Sequence[str]) -> list[str]:
    container = cluster.container
    if container is None or container.kind != "pyxis":
        return []
    mounts = _mounts(cluster, folders) + list(container.mounts)
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    return [f"--container-image={container.image}", f"--container-mounts={','.join(pairs)}"]


def folders_of_run(config: RunConfig) -> list[str]:
    """Folders that a container must show for the run to work in it."""
    cache = [config.data.cache_path] if config.data.cache_path else []
    module = own_module_folder(config)
    return [
        str(config.run_dir),
        *(corpus.path for corpus in config.data.corpora),
        *cache,
        *([] if module is None else [str(module)]),
    ]


def _mounts(cluster: Cluster, folders: Sequence[str]) -> list[str]:
    scratch = [cluster.scratch] if cluster.scratch else []
    return [plain("data.path", path) for path in [*folders, *scratch]]


def plain(field: str, path: Path | str) -> str:
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
