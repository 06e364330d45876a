"""Start torch.distributed and Megatron's process groups, and hand them to DeepSpeed."""

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from distributed_lm import platform
from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Coordinates, Layout

MODEL_PARALLEL_RNG = "model-parallel-rng"
DATA_PARALLEL_RNG = "data-parallel-rng"


@dataclass(frozen=True)
class Process:
    """Who this process is, as its launcher said."""

    rank: int
    world_size: int
    local_rank: int
    job: str | None = None
    """The batch system's job id."""
    restart: int = 0
    """How often the batch system has started the job again."""
    attempt: int = 0
    """How often the ranks were started since."""
    nodes: tuple[str, ...] = ()
    """Names of the nodes of a batch job."""
    supervisor: str | None = None
    """``HOST:PORT:TOKEN`` of the supervisor in the batch script."""

    @classmethod
    def from_environment(cls) -> "Process":
        """From ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; one lonely process without them.

        What is missing is set, since DeepSpeed and Megatron read the environment too.
        """
        try:
            return cls(
                rank=int(os.environ.setdefault("RANK", "0")),
                world_size=int(os.environ.setdefault("WORLD_SIZE", "1")),
                local_rank=int(os.environ.setdefault("LOCAL_RANK", "0")),
                job=os.environ.get("SLURM_JOB_ID"),
                restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
                attempt=int(os.environ.get("DISTRIBUTED_LM_ATTEMPT", "0")),
                nodes=tuple(filter(None, os.environ.get("DISTRIBUTED_LM_NODES", "").split(","))),
                supervisor=os.environ.get("DISTRIBUTED_LM_SUPERVISOR"),
            )
        except ValueError as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}); "
                "start the run with python -m launch"
            ) from None


@dataclass(frozen=True)
class ProcessGroups:
    """The process grid as seen from this rank, and the groups along each of its directions."""

    process: Process
    layout: Layout
    coordinates: Coordinates
    device: torch.device
    collection: ProcessGroupCollection
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup
    embedding: dist.ProcessGroup | None
    """First and last pipeline rank, which share a tied embedding; None elsewhere."""

    @property
    def is_first_rank(self) -> bool:
        return self.process.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank. For small things, outside the step."""
        values: list[Any] = [None] * self.process.world_size
        dist.all_gather_object(values, value)
        return values

    def sum_over_run(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over pipeline and data-parallel ranks, in place (tensor-parallel ranks agree)."""
        dist.all_reduce(values, group=self.pipeline)
        dist.all_reduce(values, group=self.data)
        return values


@contextmanager
def joined(config: RunConfig, process: Process, layout: Layout) -> Iterator[ProcessGroups]:
    """``start`` and ``stop``, but no stop on an error: NCCL would wait for ranks that are still at
    work, and the error must be heard first. The process ends anyway."""
    yield start(config, process, layout)
    stop()


def start(
    config: RunConfig, process: Process, layout: Layout, device: torch.device | None = None
) -> ProcessGroups:
    """Join the run: every process calls this once, before building the model.

    Args:
        device: ``meta`` for a rehearsal: tensors without memory, and groups whose collectives do
            nothing, so that one process can be any rank of any world. None = what there is.

    Raises:
        ConfigError: if the launcher left out what torch.distributed needs.
    """
    device = device or platform.select_device(process.local_rank)
    # Where DeepSpeed looks for its device: local rank 3 may be a task that sees one GPU.
    os.environ["LOCAL_RANK"] = str(process.local_rank if device.index is None else device.index)
    platform.install_cpu_stand_ins()
    _init_torch_distributed(process, device, config.parallel.timeout_seconds)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        distributed_timeout_minutes=max(1, config.parallel.timeout_seconds // 60),
        create_gloo_process_groups=device.type != "meta",
    )
    groups = _collect(process, layout, device)
    _check_same_grid(groups)
    seed_random_states(config.seed, groups)
    return groups


def stop() -> None:
    """Leave the run; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def seed_random_states(seed: int, groups: ProcessGroups) -> None:
    """Random states for dropout: equal over tensor-parallel ranks outside the sharded regions,
    different inside them (Megatron's two trackers), different for every other coordinate."""
    position = groups.coordinates
    shared = seed + 1000 * position.data + 100_000 * position.pipeline
    torch.manual_seed(shared)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(DATA_PARALLEL_RNG, shared)
    tracker.add(MODEL_PARALLEL_RNG, shared + 2718 + position.tensor)


def random_states() -> dict[str, torch.Tensor]:
    """Every random state of this rank, uint8, by name."""
    states = {"default": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    if platform.has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """The inverse of ``random_states``."""
    states = dict(states)
    torch.set_rng_state(states.pop("default"))
    if "cuda" in states:
        torch.cuda.set_rng_state(states.pop("cuda"))
    get_cuda_rng_tracker().set_states(states)


def _init_torch_distributed(process: Process, device: torch.device, timeout_seconds: int) -> None:
    options: dict[str, Any] = {
        "backend": platform.backend(device),
        "rank": process.rank,
        "world_size": process.world_size,
        "timeout": datetime.timedelta(seconds=timeout_seconds),
    }
    if device.type == "meta":
        # Importing it also registers the backend.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group(store=FakeStore(), **options)
        return
    if process.world_size == 1:
        dist.init_process_group(store=dist.HashStore(), **options)
        return
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        if variable not in os.environ:
            raise ConfigError(
                f"{variable} is not set for rank {process.rank} of {process.world_size} on "
                f"{socket.gethostname()}; start the run with python -m launch"
            )
    dist.init_process_group(init_method="env://", **options)


def _collect(process: Process, layout: Layout, device: torch.device) -> ProcessGroups:
    in_embedding_group = parallel_state.is_rank_in_embedding_group()
    return ProcessGroups(
        process=process,
        layout=layout,
        coordinates=layout.coordinates(process.rank),
        device=device,
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        embedding=parallel_state.get_embedding_group() if in_embedding_group else None,
    )


def _check_same_grid(groups: ProcessGroups) -> None:
    """Our arithmetic and Megatron's must put this rank in the same place."""
    ours = groups.coordinates
    theirs = Coordinates(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
    )
    if ours != theirs:
        raise AssertionError(f"rank {groups.process.rank}: {ours} here, {theirs} in Megatron")


class ModelParallelUnit:
    """The ``mpu`` that DeepSpeed asks about parallel sizes, ranks and groups.

    Megatron's ``parallel_state`` answers everything but the model-parallel group (tensor ×
    pipeline), over which DeepSpeed sums the gradient norm.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())
