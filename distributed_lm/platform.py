"""What differs between a GPU node and a laptop: device, dtype, backend, peak rate, random state.

Megatron-core assumes CUDA in a few places even when every tensor lives on the CPU. The stand-ins
for those are all in ``install_cpu_stand_ins`` and are put in place only where there is no CUDA.
"""

import contextlib
import ctypes
import logging
import os
import platform as host
import time
import types
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from distributed_lm.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16/fp16 tensor-core peaks in FLOP/s from NVIDIA's data sheets (no sparsity).
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756.0e12,
    "H100": 989.4e12,
    "A100": 312.0e12,
    "V100": 125.0e12,
    "L40S": 362.0e12,
    "L40": 181.0e12,
    "A10G": 70.0e12,
}


def has_cuda() -> bool:
    return torch.cuda.is_available()


def backend(device: torch.device) -> str:
    """Of torch.distributed. Tensors without memory are for a rehearsal, which talks to nobody."""
    return {"cuda": "nccl", "cpu": "gloo", "meta": "fake"}[device.type]


def select_device(local_rank: int) -> torch.device:
    """The device of this process; on a GPU node also makes it the current one."""
    if not has_cuda():
        return torch.device("cpu")
    # Slurm's --gpus-per-task leaves each task one visible device, torchrun leaves it all of them.
    if 1 < torch.cuda.device_count() <= local_rank:
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this node shows "
            f"{torch.cuda.device_count()}; start at most that many processes on it"
        )
    index = local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def hide_gpus() -> None:
    """For a command that computes nothing. Before anything asks for a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def check_precision(precision: str) -> None:
    """Raises ConfigError where this machine cannot train in ``precision``."""
    if precision == "fp16" and not has_cuda():
        raise ConfigError(
            "precision=fp16 needs a GPU (DeepSpeed has no fp16 on CPUs); "
            "set precision=bf16 or precision=fp32"
        )


def quiet_engines() -> None:
    """Silence the engines' chatter; their warnings about missing GPU add-ons are not for users."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_cuda() else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\.")


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The rate that MFU is a fraction of.

    Returns:
        FLOP/s, and where the number comes from. A known GPU: its data sheet. Anything else: a
        large matrix product timed here, so that MFU still says how much of the machine is used.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for model, peak in PEAK_FLOPS.items():
            if all(word in name for word in model.split()):
                return peak, f"{model} data sheet, dense"
    return _measured_matmul_flops(device, dtype), "measured matrix product"


def _measured_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best of five products of two square matrices, in FLOP/s."""
    size = 8192 if device.type == "cuda" else 1024  # long enough to hide a kernel's launch
    # Not random: a run's random states have been restored by now.
    left = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (left @ left).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory_bytes`` begin again; a CPU's process remembers its largest for good."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Stopwatch:
    """Times work on a device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    def seconds(self) -> float:
        """Between the two, once the device has been waited for."""
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1]) / 1000.0
        return self._times[1] - self._times[0]

    def _mark(self, index: int) -> None:
        if self._events is not None:
            self._events[index].record()
        self._times[index] = time.perf_counter()


def dump_flight_recorder(path: Path) -> None:
    """NCCL's record of the last collectives, for ``torch.distributed.flight_recorder``; on CUDA
    and with ``TORCH_FR_BUFFER_SIZE`` set."""
    if has_cuda():
        path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for logs, W&B and reports."""
    packages = ("torch", "megatron-core", "deepspeed", "wandb", "datasets")
    return {
        "python": host.python_version(),
        "machine": host.machine(),
        "host": host.node(),
        "cpus": len(os.sched_getaffinity(0)),
        "devices": torch.cuda.get_device_name() if has_cuda() else "cpu",
        **{package: metadata.version(package) for package in packages},
    }


class CpuRngTracker:
    """Named random states, like Megatron's CUDA tracker but over torch's CPU generator."""

    def __init__(self) -> None:
        self.states: dict[str, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return bool(self.states)

    def reset(self) -> None:
        self.states = {}

    def add(self, name: str, seed: int) -> None:
        self.states[name] = torch.Generator().manual_seed(seed).get_state()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states = dict(states)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def install_cpu_stand_ins() -> None:
    """Let Megatron-core run where there is no CUDA. Does nothing where there is.

    Megatron asks ``torch.cuda`` for the current device, synchronises it, keeps its random states
    there, and its schedules allocate one token counter on ``"cuda"``.
    """
    if has_cuda():
        return
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.pipeline_parallel import schedules

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    if not isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, CpuRngTracker):
        megatron_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    megatron_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(
        state
    )
    schedules.torch = _torch_with_zeros_on_cpu()


def _torch_with_zeros_on_cpu() -> types.ModuleType:
    """A view of ``torch`` whose ``zeros`` ignores ``device="cuda"``.

    Given to one module of Megatron's only: a ``TorchFunctionMode`` over everything would cost a
    Python call for every operation and is not active inside backward.
    """
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)

    def zeros(*size: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, **{**kwargs, "device": "cpu"})

    view.__dict__["zeros"] = zeros
    return view


def give_back_freed_tensors() -> None:
    """Have the memory of every large tensor returned to the system as soon as it is freed.

    glibc raises its threshold for that whenever a large block is freed, and from then on keeps
    tensors of up to 32 MB in its heap, whose holes add up to most of a model that passes through.
    Elsewhere than on glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, in bytes; setting it turns the raising off
