"""Bytes that a rank needs, part by part, at the moment when it needs most.

The formulas follow the code that runs: ``activations.py`` for what backward needs, and DeepSpeed
0.19's optimizers for the rest (``bf16_optimizer.py``, ``zero/stage_1_and_2.py``,
``zero/stage3.py``). They are compared with measured peaks in ``tests/distributed/test_memory.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.planner.activations import (
    WEIGHT_BYTES,
    Device,
    Sizes,
    backward_bytes,
    bias_bytes,
    core_attention_bytes,
    layer_bytes,
    loss_bytes,
    output_gradient_bytes,
)
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.planner.shards import RankParameters, rank_parameters, stage_layers

MASTER_BYTES = 4
MOMENTS_BYTES = {"adamw": 8, "nag": 4}
"""Per parameter, fp32: master weight, and the optimizer's two moments or one."""

# DeepSpeed's defaults, in elements: gradients reduced at once, and of ZeRO 3 weights that are
# gathered ahead and kept gathered.
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, at its peak."""

    weights: float
    gradients: float
    """What stays until the update, in fp32."""
    masters: float
    """fp32 weights of 16-bit ones; ZeRO keeps them in fp32 too."""
    moments: float
    activations: float
    """Of all microbatches in flight."""
    attention: float
    """The bias with its mask, where the kernel reads it from memory."""
    loss: float
    """Logits of a chunk, and the gradients of the output weight."""
    buffers: float
    """Of the engine: buckets of gradients, weights gathered by ZeRO 3, sequence parallelism's."""
    phase: str
    """When the peak is: in ``forward and backward`` or in the ``optimizer step``."""

    @functools.cached_property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {
            field.name: getattr(self, field.name) for field in fields(self) if field.name != "phase"
        }


def rank_memory(
    config: RunConfig, layout: Layout, vocab_size: int, pipeline: int, device: Device = "cuda"
) -> Memory:
    """The peak of a rank at this pipeline coordinate; its tensor- and data-parallel peers need as
    much.

    Args:
        device: on a CPU, buffers count as far as they are written to.
    """
    held = rank_parameters(config.model, vocab_size, layout, pipeline)
    state = _state(config, layout, held.total)
    working = _working_set(config, layout, vocab_size, pipeline, device)
    buckets = _buckets(config, layout, held, device)
    running = _forward_and_backward(config, layout, held, state, working, buckets)
    stepping = Memory(
        **state,
        activations=0.0,
        attention=working.attention,
        loss=0.0,
        buffers=buckets.always + buckets.in_step,
        phase="optimizer step",
    )
    return max(running, stepping, key=lambda memory: memory.total)


def largest_memory(
    config: RunConfig, layout: Layout, vocab_size: int, device: Device = "cuda"
) -> Memory:
    """Of the rank that needs most: the first, which has most microbatches in flight, or the last,
    which has the loss."""
    ranks = {0, layout.pipeline - 1}
    every = (rank_memory(config, layout, vocab_size, rank, device) for rank in ranks)
    return max(every, key=lambda memory: memory.total)


def microbatches_in_flight(
    layout: Layout, num_microbatches: int, pipeline: int, chunk: int = 0
) -> float:
    """Microbatches whose activations a model chunk keeps at once.

    1F1B (Narayanan et al. 2021, §2.2.1): rank r of p starts p − r forwards before its first
    backward. Interleaved with v chunks (§2.2.2, and Megatron's ``schedules.py``): 2·(p − r − 1) +
    (v − 1)·p + 1 forwards of a chunk, which come in groups of p microbatches, first chunk first.
    """
    size, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return min(num_microbatches, size - pipeline)
    started = 2 * (size - pipeline - 1) + (chunks - 1) * size + 1
    of_chunk = 0
    for forward in range(min(started, num_microbatches * chunks)):
        of_chunk += forward // size % chunks == chunk
    return of_chunk


@dataclass(frozen=True)
class _Working:
    """Of forward and backward, before ZeRO adds anything."""

    kept: float
    """Activations at the last stage's loss, or wherever most are kept."""
    passing: float
    """What backward of one layer adds for its time."""
    loss: float
    late_loss: float
    """What of the loss is still there in the layers' backward."""
    attention: float
    gathered: float
    """Sequence parallelism's copy of the whole sequence."""


def _working_set(
    config: RunConfig, layout: Layout, vocab_size: int, pipeline: int, device: Device
) -> _Working:
    sizes = Sizes.of(config, layout)
    batch, model = config.batch, config.model
    count = layout.num_microbatches(batch.global_batch_size, batch.micro_batch_size)
    one_layer = layer_bytes(config, layout, device)
    is_last = pipeline == layout.pipeline - 1
    kept = 0.0
    for chunk, layers in enumerate(stage_layers(model, layout, pipeline)):
        flying = microbatches_in_flight(layout, count, pipeline, chunk)
        per_layer = sizes.stream if config.train.recompute == "full" else one_layer
        has_loss = is_last and chunk == layout.virtual_pipeline - 1
        # What goes on to the next stage is kept too; at the end it goes through the final norm.
        ends = sizes.stream if layout.pipeline > 1 or (has_loss and model.final_norm) else 0.0
        kept += flying * (layers * per_layer + ends)
    passing = backward_bytes(config, layout)
    if config.train.recompute == "full":
        passing += one_layer
    elif config.train.recompute == "selective":
        passing += core_attention_bytes(config, layout, device)
    tied = output_gradient_bytes(config, layout, vocab_size) if model.adaptive is None else 0.0
    return _Working(
        kept=kept,
        passing=passing,
        loss=loss_bytes(config, layout, vocab_size, device) if is_last else 0.0,
        late_loss=tied if is_last else 0.0,
        attention=bias_bytes(config, layout, device),
        gathered=sizes.whole_stream if layout.sequence else 0.0,
    )


@dataclass(frozen=True)
class _Buckets:
    """Of ZeRO, in bytes."""

    always: float
    in_backward: float
    """While gradients are reduced in backward."""
    reduced_at_once: float
    """Share of the rank's gradients; the activations of the rest are still there."""
    in_step: float
    weights: float
    """Gathered by ZeRO 3."""


def _state(config: RunConfig, layout: Layout, parameters: int) -> dict[str, float]:
    """ZeRO 1 shards the optimizer over the data-parallel ranks, 2 also the gradients, 3 also the
    weights (Rajbhandari et al. 2020, ZeRO, figure 1)."""
    stage, data = config.zero.stage, layout.data
    return {
        "weights": parameters * WEIGHT_BYTES[config.precision] / (data if stage >= 3 else 1),
        "gradients": parameters * 4.0 / (data if stage >= 2 else 1),
        # Even for fp32 weights, ZeRO updates a copy.
        "masters": parameters * MASTER_BYTES / data if stage >= 1 else 0.0,
        "moments": parameters * MOMENTS_BYTES[config.optimizer.kind] / (data if stage >= 1 else 1),
    }


def _buckets(config: RunConfig, layout: Layout, held: RankParameters, device: Device) -> _Buckets:
    """DeepSpeed allocates its bucket whole, however small the model; a CPU's memory is taken only
    where it is written to."""
    stage, data, item = config.zero.stage, layout.data, WEIGHT_BYTES[config.precision]
    filled = min(held.total, REDUCE_BUCKET)
    whole = filled if device == "cpu" else REDUCE_BUCKET
    shard = 4.0 * held.total / data
    share = filled / held.total
    if stage == 0:
        return _Buckets(0.0, 0.0, 0.0, 0.0, 0.0)
    if stage == 1 and config.precision == "bf16":
        # Both groups of parameters are joined to be reduced, if one bucket takes them.
        joined = 4.0 * held.total if held.total <= REDUCE_BUCKET else 0.0
        return _Buckets(0.0, 0.0, 0.0, joined, 0.0)
    if stage == 1:
        # Gradients move into the bucket, and are joined there; then cut to this rank's shard.
        bucket = 0.0 if device == "cpu" else 4.0 * whole
        return _Buckets(0.0, bucket, 0.0, bucket + max(4.0 * filled, shard), 0.0)
    if stage == 2:
        # Two buckets of the largest parameter in turn, one joined, and in fp32 for 16-bit weights.
        bucket = held.largest
        reduce = 3.0 * item * bucket + (4.0 * bucket if item < 4 else 0.0)
        return _Buckets(0.0, reduce, bucket / held.total, shard, 0.0)
    gathered = 0.0
    if data > 1:
        ahead = min(held.total, PREFETCH_BUCKET + held.largest)
        gathered = item * (min(held.total, MAX_LIVE) + ahead)
    return _Buckets(4.0 * whole, 8.0 * filled, share, shard, gathered)


def _forward_and_backward(
    config: RunConfig,
    layout: Layout,
    held: RankParameters,
    state: dict[str, float],
    working: _Working,
    buckets: _Buckets,
) -> Memory:
    """The worst of three moments: the loss, the backward of the last layer, and the reduction of
    gradients when the activations have gone."""

    def at(activations: float, loss: float, buffers: float) -> Memory:
        return Memory(
            **state,
            activations=activations,
            attention=working.attention,
            loss=loss,
            buffers=buckets.always + buffers,
            phase="forward and backward",
        )

    # ZeRO 1 of fp32 and fp16 has its bucket from the first gradient on.
    beside = (
        working.gathered + buckets.weights + (buckets.in_backward if config.zero.stage == 1 else 0)
    )
    moments = [
        at(working.kept, working.loss, beside),
        at(working.kept + working.passing, working.late_loss, beside),
    ]
    if buckets.reduced_at_once:
        left = (1 - buckets.reduced_at_once) * working.kept
        moments.append(at(left, 0.0, working.gathered + buckets.in_backward))
    return max(moments, key=lambda memory: memory.total)


def check_fits(
    config: RunConfig,
    layout: Layout,
    vocab_size: int,
    bytes_per_device: float,
    device: Device = "cuda",
) -> None:
    """Raises ConfigError if a rank does not fit on its device, naming what would help."""
    memory = largest_memory(config, layout, vocab_size, device)
    if memory.total <= bytes_per_device:
        return
    state = memory.weights + memory.gradients + memory.masters + memory.moments
    rest = memory.total - state
    if state > bytes_per_device:
        remedy = "raise zero.stage, parallel.tensor or the number of nodes"
    else:
        remedy = (
            "lower batch.micro_batch_size, set train.recompute=selective or full, or raise "
            "parallel.tensor"
        )
    raise ConfigError(
        f"model: weights, gradients and optimizer state need {state / 1e9:.1f} GB on each device "
        f"with {layout.describe()} and zero.stage={config.zero.stage}, activations and buffers "
        f"{rest / 1e9:.1f} GB more; a device has {bytes_per_device / 1e9:.0f} GB; {remedy}"
    )


def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Of one checkpoint: weights, masters, moments."""
    weights = 4 if config.precision == "fp32" else 2
    parameters = total_parameters(config.model, vocab_size)
    return parameters * (weights + MASTER_BYTES + MOMENTS_BYTES[config.optimizer.kind])
