"""Tokens per second and model FLOP utilisation of an interval of steps."""

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from distributed_lm import platform
from distributed_lm.config import RunConfig
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.process_groups import ProcessGroups


class Throughput:
    """A clock that is read once per logged step and can be stopped (evaluation, saving)."""

    def __init__(self, config: RunConfig, vocab_size: int, groups: ProcessGroups) -> None:
        self.tokens_per_step = config.tokens_per_step
        self.groups = groups
        self.flops = training_flops_per_token(config.model, vocab_size, config.data.sequence_length)
        groups.barrier()  # all processes measure at once, as they will run at once
        self.peak, self.peak_source = platform.peak_flops(
            groups.device, platform.DTYPES[config.precision]
        )
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last reading."""
        self.started = time.perf_counter()
        self.steps = 0

    def step_done(self) -> None:
        self.steps += 1

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last reading. Collective: memory is the largest rank's."""
        seconds = (time.perf_counter() - self.started) / max(1, self.steps)
        tokens_per_second = self.tokens_per_step / seconds
        per_device = tokens_per_second / self.groups.layout.world_size
        memory = torch.tensor(
            platform.peak_memory_bytes(self.groups.device), device=self.groups.device
        )
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        self.restart()
        return {
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": per_device,
            "mfu": per_device * self.flops.full / self.peak,
            "mfu_causal": per_device * self.flops.causal / self.peak,
            "peak_memory_bytes": int(memory),
            "step_seconds": seconds,
        }
