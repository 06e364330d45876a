"""``configs/clusters/NAME.yaml``: what is particular to one cluster, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from distributed_lm.errors import ConfigError

CLUSTERS = Path("configs/clusters")
# What may stand in a #SBATCH line and on a command line: nothing that a shell or Slurm would read
# as more than text.
PLAIN = r"^[^\x00-\x1f\"'`$\\;|&<>!#]*$"
Plain = Annotated[str, Field(pattern=PLAIN)]
Time = Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}(:\d{2}){0,2}$|^\d+$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variable(Section):
    value: str
    reason: Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]*$")]
    """Why this cluster needs it; stands beside it in the script."""


class Container(Section):
    kind: Literal["apptainer", "pyxis"]
    image: Plain
    """Path of a ``.sif``, or for pyxis a ``.sqsh`` or registry name."""
    mounts: tuple[Plain, ...] = ()
    """Folders to be seen inside, as ``PATH`` or ``PATH:PLACE``; the run folder always is."""
    python: Plain = "python3"
    """Interpreter inside."""


class Cluster(Section):
    """One cluster. Fields left out are not given to Slurm, which then uses its own default."""

    partition: Plain | None = None
    account: Plain | None = None
    qos: Plain | None = None
    constraint: Plain | None = None
    exclusive: bool = False
    nodes: PositiveInt = 1
    """Nodes of a run, unless ``--nodes`` says otherwise."""
    devices_per_node: PositiveInt
    """Ranks per node: its GPUs, or how many processes share its CPUs."""
    device: Literal["gpu", "cpu"] = "gpu"
    device_memory_gb: PositiveFloat | None = None
    """Of one device (of a CPU node: its memory over ``devices_per_node``), for the memory check."""
    gpu_type: Plain | None = None
    """As in ``--gpus-per-node=TYPE:N``."""
    cpus_per_task: PositiveInt | None = None
    memory: Plain | None = None
    """Per node, as in ``--mem``; ``0`` is all of it."""
    time: Time = "1-00:00:00"
    """Limit of one job; a run goes on over as many jobs as it takes."""
    modules: tuple[Plain, ...] = ()
    """Environment modules to load, in order."""
    venv: Plain | None = None
    """Virtual environment with ``distributed_lm``'s dependencies; off = the one in use now."""
    container: Container | None = None
    network_interface: Plain | None = None
    """For gloo's and NCCL's sockets; off = the one that leads to the first node."""
    environment: dict[VariableName, Variable] = {}
    """Further variables of the ranks, each with its reason."""
    shared: Plain | None = None
    """Folder that all nodes see: run folders must be in it."""
    scratch: Plain | None = None
    """Fast folder of each node for temporary files (``TMPDIR``)."""
    commands_on_nodes: bool = True
    """Whether ``scontrol`` is in the ``PATH`` of compute nodes. Then a run goes on in its
    allocation when a node dies; without it the whole job is queued again."""
    preemption_requeues: bool = False
    """Whether Slurm requeues preempted jobs by itself (PreemptMode=REQUEUE)."""
    lead_seconds: PositiveInt = 180
    """Before the end of the allocation, when to save and leave; more where saves take longer."""
    health_check: bool = True
    """Examine every node before training."""
    sbatch_options: tuple[Plain, ...] = ()
    """Further options of ``sbatch``, as in ``--reservation=NAME``."""
    srun_options: tuple[Plain, ...] = ()
    """Further options of ``srun``, as in ``--mpi=none``."""


def load_cluster(name: str) -> Cluster:
    """Read a cluster file.

    Args:
        name: a path, or the name of a file in ``configs/clusters``.

    Raises:
        ConfigError: naming the file, the field and what is wrong with it.
    """
    path = Path(name)
    if not path.suffix:
        path = CLUSTERS / f"{name}.yaml"
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return Cluster.model_validate(values)
    except FileNotFoundError:
        known = ", ".join(sorted(found.stem for found in CLUSTERS.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such cluster file; there are: {known}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        found = str(problem["input"])[:60]
        raise ConfigError(f"{path}: {field}={found!r}: {problem['msg']}") from None


def seconds_of(time: str) -> int:
    """Of Slurm's ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, or after ``days-``:
    ``hours``, ``hours:minutes``, ``hours:minutes:seconds``.

    Raises:
        ConfigError: if it is none of them.
    """
    if not re.match(r"^((\d+-)?\d{1,2}(:\d{2}){0,2}|\d+)$", time):
        raise ConfigError(f"time {time!r}: expected minutes, HH:MM:SS or D-HH:MM:SS")
    days, dash, rest = time.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if dash:
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) == 1:
        numbers = [0, numbers[0], 0]
    elif len(numbers) == 2:
        numbers = [0, *numbers]
    hours, minutes, seconds = numbers
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
