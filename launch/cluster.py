"""``configs/clusters/NAME.yaml``: what is particular to one cluster, and nowhere else."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from distributed_lm.errors import ConfigError
from distributed_lm.planner.devices import CLUSTERS, NodeShape, cluster_path

# Nothing that a shell would read as more than text. In a #SBATCH line no blank and no "#" either:
# there Slurm would begin another option, or a comment.
SPECIAL = r"\x00-\x1f\x7f\"'`$\\;<>!"
WORD = rf"^[^\s{SPECIAL}#]+$"
OPTION = rf"^--[^\s{SPECIAL}#]+$"
IMAGE = rf"^[^\s{SPECIAL}]+$"
PATH = rf"^/[^{SPECIAL}#]*$"
NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
TIME = r"^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$"
EXPECTED = {
    WORD: "one word, without quotes or what else a shell or Slurm reads as more than text",
    OPTION: "an option as in --reservation=NAME, without blanks or quotes",
    IMAGE: "a path or a registry name, without blanks or quotes",
    PATH: "a path from / on, without quotes, variables or ~",
    NAME: "the name of a variable",
    TIME: "minutes, HH:MM:SS or D-HH:MM:SS",
}
Word = Annotated[str, Field(pattern=WORD)]
Option = Annotated[str, Field(pattern=OPTION)]
AbsolutePath = Annotated[str, Field(pattern=PATH)]
Time = Annotated[str, Field(pattern=TIME)]
VariableName = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Variable(Section):
    value: Annotated[str, Field(pattern=r"^[^\x00]*$")]
    reason: Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f]*$")]
    """Why this cluster needs it; stands beside it in the script."""


class Container(Section):
    kind: Literal["apptainer", "pyxis"]
    image: Annotated[str, Field(pattern=IMAGE)]
    """Path of a ``.sif``, or for pyxis a ``.sqsh`` or registry name."""
    mounts: tuple[AbsolutePath, ...] = ()
    """Folders to be seen inside, as ``PATH`` or ``PATH:PLACE``; the folders of the run, of its data
    sets and ``scratch`` always are."""
    python: Word = "python3"
    """Interpreter inside."""


class Cluster(NodeShape, Section):
    """One cluster; ``NodeShape`` has nodes and devices. Fields left out are not given to Slurm,
    which then uses its own default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclusive: bool = False
    gpu_type: Word | None = None
    """As in ``--gpus-per-node=TYPE:N``."""
    cpus_per_task: PositiveInt | None = None
    memory: Word | None = None
    """Per node, as in ``--mem``; ``0`` is all of it."""
    time: Time = "1-00:00:00"
    """Limit of one job; a run goes on over as many jobs as it takes. ``0`` = none."""
    modules: tuple[Word, ...] = ()
    """Environment modules to load, in order."""
    venv: AbsolutePath | None = None
    """Virtual environment with ``distributed_lm``'s dependencies; off = the one in use now."""
    container: Container | None = None
    network_interface: Word | None = None
    """For gloo's and NCCL's sockets; off = the one that leads to the first node."""
    environment: dict[VariableName, Variable] = {}
    """Further variables of the ranks, each with its reason."""
    shared: AbsolutePath | None = None
    """Folder that all nodes see: run folders must be in it."""
    scratch: AbsolutePath | None = None
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
    sbatch_options: tuple[Option, ...] = ()
    """Further options of ``sbatch``, as in ``--reservation=NAME``."""
    srun_options: tuple[Option, ...] = ()
    """Further options of ``srun``, as in ``--mpi=none``."""

    def for_command(self) -> Cluster:
        """As it is to a command in one process: no devices, and no node of its own."""
        alone = {"device": "cpu", "devices_per_node": 1, "exclusive": False, "memory": None}
        return self.model_copy(update=alone)


def load_cluster(name: str) -> Cluster:
    """Read a cluster file.

    Args:
        name: a path, or the name of a file in ``configs/clusters``.

    Raises:
        ConfigError: naming the file, the field and what is wrong with it.
    """
    path = cluster_path(name)
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return Cluster.model_validate(values)
    except FileNotFoundError:
        known = ", ".join(sorted(found.stem for found in CLUSTERS.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such cluster file; there are: {known}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_problem(error)}") from None


def _problem(error: pydantic.ValidationError) -> str:
    """The first one as 'field=found: expected'."""
    problem: Any = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    field = field if field.isprintable() else repr(field)
    found = str(problem["input"])[:60]
    if not field:
        return f"expected 'field: value' lines, found {found!r}"
    if problem["type"] == "extra_forbidden":
        return f"{field}: no such field; launch/cluster.py explains them all"
    if problem["type"] == "missing":
        return f"{field}: missing; add it"
    if problem["type"] == "string_pattern_mismatch":
        expected = EXPECTED.get(problem["ctx"]["pattern"], "text on one line")
        return f"{field}={found!r}: expected {expected}"
    if field == "time":  # YAML reads 24:00:00 as a number in base 60
        return f'{field}={found}: expected {EXPECTED[TIME]}, in quotes as in time: "24:00:00"'
    return f"{field}={found!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def seconds_of(time: str) -> int:
    """Of Slurm's ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, or after ``days-``:
    ``hours``, ``hours:minutes``, ``hours:minutes:seconds``.

    Raises:
        ConfigError: if it is none of them.
    """
    if not re.fullmatch(TIME.strip("^$"), time):
        raise ConfigError(f"time={time!r}: expected {EXPECTED[TIME]}")
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
