"""One training step: Megatron's schedule drives forward and backward, DeepSpeed the update.

DeepSpeed is told that the caller manages accumulation: the schedule runs all microbatches, then one
``engine.step()`` reduces over the data-parallel ranks, clips and updates.
"""

import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from distributed_lm import platform
from distributed_lm.config import RunConfig
from distributed_lm.errors import TrainingError
from distributed_lm.model.gpt import GPTStage
from distributed_lm.model.parameters import ParameterShard, parameter_shards
from distributed_lm.pipeline import Microbatch, run_schedule
from distributed_lm.process_groups import ModelParallelUnit, ProcessGroups
from distributed_lm.training.gradients import (
    average_gradients,
    global_gradient_norm,
    sum_partial_gradients,
    sum_position_gradients,
    sum_tied_embedding_gradients,
)
from distributed_lm.training.optimizer import Optimizer, build_optimizer


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Nats per token over the whole batch, before the update."""
    grad_norm: float
    """Global L2 norm before clipping; infinite where a 16-bit gradient overflowed."""
    is_updated: bool
    """False if the update was left out: asked for, or an fp16 overflow."""


class NonFiniteError(TrainingError):
    """A loss or gradient is NaN or infinite; the weights are still those of before the step."""


class Chunks(nn.Module):
    """This rank's stages as one module, so that one DeepSpeed engine owns them all."""

    def __init__(self, stages: list[GPTStage]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, index: int, *inputs: Tensor) -> Tensor:
        return self.stages[index](*inputs)


class StageHandle(nn.Module):
    """What Megatron's schedule calls: forwards through ``engine``, so that its hooks are in place.

    Everything else Megatron asks of a model chunk is answered by the stage itself.
    """

    engine: Any
    stage: GPTStage

    def __init__(self, engine: Any, stage: GPTStage, index: int) -> None:
        super().__init__()
        self.__dict__.update(engine=engine, stage=stage)  # not submodules: the engine has them
        self.index = index
        self.config = stage.config
        self.model_type = stage.model_type
        self.vp_stage = stage.vp_stage
        self.pre_process = stage.pre_process
        self.post_process = stage.post_process
        self.share_embeddings_and_output_weights = stage.share_embeddings_and_output_weights

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.engine(self.index, *inputs)

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.stage.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.stage.shared_embedding_or_output_weight()


class TrainingEngine:
    """The model and its optimizer, ready to step."""

    def __init__(self, config: RunConfig, stages: list[GPTStage], groups: ProcessGroups) -> None:
        self.config = config
        self.stages = stages
        self.groups = groups
        self.stopwatch = platform.Stopwatch(groups.device)
        """Of this rank's own part of the last step."""
        self.shards: list[ParameterShard] = parameter_shards(stages, groups)
        sum_partial_gradients(self.shards, groups)
        self.optimizer: Optimizer = build_optimizer(self.shards, config.optimizer)
        self.deepspeed = _initialize_quietly(
            model=Chunks(stages),
            optimizer=self.optimizer,
            config=deepspeed_config(
                config,
                groups.layout.data,
                largest_parameter=max(shard.parameter.numel() for shard in self.shards),
            ),
            mpu=ModelParallelUnit(),
            dist_init_required=False,
        )
        assert self.deepspeed.dp_world_size == groups.layout.data
        # DeepSpeed refuses a direct backward through its engine at stage 0.
        self.handles: list[Any] = list(stages)
        if config.zero.stage > 0:
            self.handles = [
                StageHandle(self.deepspeed, stage, index) for index, stage in enumerate(stages)
            ]
        if config.precision == "fp16":
            for stage in stages:
                stage.config.grad_scale_func = self.deepspeed.scale

    def train_step(
        self, microbatches: list[Microbatch], learning_rate: float, max_loss: float = math.inf
    ) -> StepResult:
        """Forward, backward and update on one batch.

        Args:
            microbatches: this data-parallel rank's share.
            max_loss: leave the update out if the loss is above this.

        Raises:
            NonFiniteError: before the update.
            TrainingError: out of memory, naming the part and the remedy.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        local_losses: list[Tensor] = []
        with explain_out_of_memory("forward and backward"):
            loss_sum, tokens = run_schedule(
                self.handles,
                microbatches,
                self.groups,
                forward_only=False,
                on_losses=lambda losses_BS: local_losses.append(losses_BS.sum()),
                stopwatch=self.stopwatch,
            ).tolist()
        loss = loss_sum / tokens
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss={loss} on {self._ranks_with_non_finite(local_losses)}")
        self.optimizer.skip_update = loss > max_loss
        sum_tied_embedding_gradients(self.stages, self.groups)
        sum_position_gradients(self.stages, self.groups)
        with explain_out_of_memory("the optimizer step"):
            grad_norm = self._step_plain() if self.config.zero.stage == 0 else self._step_zero()
        is_finite = math.isfinite(grad_norm)
        if not is_finite and self.config.precision != "fp16":  # fp16 lowers its loss scale
            raise NonFiniteError(f"loss={loss:.4f} but grad_norm={grad_norm}")
        return StepResult(loss, grad_norm, is_finite and not self.optimizer.skip_update)

    def evaluate(
        self,
        microbatches: list[Microbatch],
        on_losses: Callable[[Tensor], None] | None = None,
    ) -> tuple[float, float]:
        """Forward without gradients; arguments and return as of ``run_schedule``."""
        self.deepspeed.eval()
        with torch.no_grad(), explain_out_of_memory("evaluation"):
            totals = run_schedule(
                self.handles, microbatches, self.groups, forward_only=True, on_losses=on_losses
            )
        self.deepspeed.train()
        loss_sum, tokens = totals.tolist()
        return loss_sum, tokens

    def _ranks_with_non_finite(self, local_losses: list[Tensor]) -> str:
        """Names the ranks whose own microbatches went wrong. Collective."""
        here = not all(bool(torch.isfinite(loss)) for loss in local_losses)
        ranks = [rank for rank, is_bad in enumerate(self.groups.gather(here)) if is_bad]
        return "ranks " + ", ".join(f"{rank} (data-parallel {self._data(rank)})" for rank in ranks)

    def _data(self, rank: int) -> int:
        return self.groups.layout.coordinates(rank).data

    def _step_zero(self) -> float:
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def _step_plain(self) -> float:
        """ZeRO 0 in fp32: the plain reference, with our own norm and clipping."""
        average_gradients(self.shards, self.groups)
        norm = global_gradient_norm(self.shards, self.groups)
        limit = self.config.optimizer.clip_grad_norm
        if limit > 0.0:
            scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
            for shard in self.shards:
                shard.parameter.grad.mul_(scale)  # type: ignore[union-attr]
        grad_norm = float(norm)
        self.optimizer.skip_update |= not math.isfinite(grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm


def _initialize_quietly(**arguments: Any) -> Any:
    """``deepspeed.initialize`` without its pages of memory readings on standard output.

    On CPUs it would also compile a shared-memory extension (20 s, needs g++) that it then uses only
    under its own launcher: not built.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it set INFO
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(**arguments)
    return engine


def deepspeed_config(
    config: RunConfig, data_parallel_size: int, largest_parameter: int
) -> dict[str, Any]:
    """DeepSpeed's own config, derived: nothing of it is the user's to write twice.

    Args:
        largest_parameter: elements of the largest of this rank's.
    """
    micro = config.batch.micro_batch_size
    settings: dict[str, Any] = {
        "train_batch_size": micro * data_parallel_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.zero.stage, "overlap_comm": config.zero.stage == 2},
        "steps_per_print": 2**31,
    }
    if config.zero.stage == 2:
        # Reduced while backward goes on, bucket by bucket. DeepSpeed's own bucket of 5e8 elements
        # would leave a third of a 1.3B model's gradients for after it, and takes twice its size.
        settings["zero_optimization"]["reduce_bucket_size"] = largest_parameter
    if config.precision != "fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    if config.precision == "bf16":
        # The fp32 accumulator must be live during backward: tied embeddings are summed in it.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if config.precision == "fp16":
        settings["fp16"] = {"enabled": True}
    return settings


@contextmanager
def explain_out_of_memory(part: str) -> Iterator[None]:
    """Turn the allocator's message into the part that ran out and what to change."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        remedies = {
            "the optimizer step": "raise zero.stage or use more data-parallel ranks",
            "evaluation": "lower evaluation.tokens_per_batch",
        }
        remedy = remedies.get(
            part,
            "lower batch.micro_batch_size, set train.recompute=selective or full, or raise "
            "parallel.tensor",
        )
        first_line = str(error).splitlines()[0]
        raise TrainingError(f"out of memory in {part}; {remedy} ({first_line})") from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA's allocator has an exception of its own, the CPU's only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
