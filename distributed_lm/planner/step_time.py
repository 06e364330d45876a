"""Seconds of one optimizer step, part by part: a model with stated assumptions, no simulation.

Nothing overlaps: the engine reduces gradients after backward (ZeRO 2 beside it, which is left out
here), gathers before it computes, and Megatron's schedules send without overlap. docs/planning.md
says which constants were calibrated with which published figure, and how the model compares with
figures it has not seen.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.planner.activations import Sizes, layer_bytes
from distributed_lm.planner.devices import DeviceRates
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.planner.shards import layer_shard, rank_parameters, stage_layers

# Assumed: of a link's rate in long collectives, and of the matrix products' rate in attention.
LINK_EFFICIENCY = 0.75
ATTENTION_EFFICIENCY = 0.6
# Assumed, seconds: of one hop of a collective, inside a node and between nodes.
HOP_INSIDE, HOP_BETWEEN = 5e-6, 2e-5
# Bytes of memory traffic: per byte kept for backward (written, read in forward and in backward, its
# gradient written and read), per logit of the fused loss, per parameter and microbatch where 16-bit
# gradients are added up in fp32, per parameter in norm and clipping, and in the update.
TRAFFIC_PER_KEPT_BYTE = 5
TRAFFIC_PER_LOGIT = 50
TRAFFIC_ACCUMULATE = 12
TRAFFIC_CLIP = 12
TRAFFIC_UPDATE = 30


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest rank."""

    matrix_products: float
    attention: float
    elementwise: float
    loss: float
    recompute: float
    tensor_parallel: float
    """All-reduces, or with sequence parallelism gathers and scatters, of two activations per layer
    and direction."""
    pipeline_sends: float
    bubble: float
    """Of the pipeline: waiting for the first microbatch and for the last."""
    gradients: float
    """Reduced over the data-parallel ranks; and the updated weights gathered (ZeRO 1 and 2)."""
    weights: float
    """Gathered for each microbatch (ZeRO 3)."""
    optimizer: float
    """Gradients added up, clipped, and the update."""

    @functools.cached_property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Machine:
    """The devices, and how many of them share a node."""

    rates: DeviceRates
    devices_per_node: int

    def collective(self, ranks: int, stride: int, volume: float, rounds: int = 1) -> float:
        """Seconds of ``rounds`` passes of a ring over ``ranks`` that stand ``stride`` apart: 1 for
        a gather or a scatter of ``volume`` bytes, 2 for an all-reduce.

        In a group that has several ranks on each node, each brings its own network adapter. The
        hops of a tree grow with the logarithm (Thakur et al. 2005; NCCL's double binary trees).
        """
        if ranks == 1:
            return 0.0
        per_node = max(1, min(ranks, self.devices_per_node // stride))
        is_inside = ranks <= per_node
        bandwidth = self.rates.node_bandwidth
        if not is_inside:
            bandwidth = min(bandwidth, per_node * self.rates.network_bandwidth)
        hop = HOP_INSIDE if is_inside else HOP_BETWEEN
        share = (ranks - 1) / ranks
        return rounds * (
            share * volume / (LINK_EFFICIENCY * bandwidth) + hop * math.ceil(math.log2(ranks))
        )

    def send(self, stride: int, volume: float) -> float:
        """Seconds from one rank to the one that stands ``stride`` further."""
        inside = stride < self.devices_per_node
        bandwidth = self.rates.node_bandwidth if inside else self.rates.network_bandwidth
        return volume / (LINK_EFFICIENCY * bandwidth) + (HOP_INSIDE if inside else HOP_BETWEEN)


@dataclass(frozen=True)
class Throughput:
    """What a layout is predicted to do."""

    step: StepTime
    tokens_per_second: float
    mfu: float
    """Attention counted in full; of the precision's peak."""
    tokens_per_day: float
    device_hours: float
    """Of the whole run."""


def step_time(config: RunConfig, layout: Layout, vocab_size: int, machine: Machine) -> StepTime:
    """Of the slowest pipeline rank; the others wait for it. That is the first, which has the spare
    layers and the embedding, or the last, which has the loss."""
    microbatches = [
        _microbatch(config, layout, vocab_size, machine, rank) for rank in range(layout.pipeline)
    ]
    ranks = {0, layout.pipeline - 1}
    every = (_rank_time(config, layout, vocab_size, machine, rank, microbatches) for rank in ranks)
    return max(every, key=lambda times: times.total)


def throughput(config: RunConfig, layout: Layout, vocab_size: int, machine: Machine) -> Throughput:
    step = step_time(config, layout, vocab_size, machine)
    speed = config.tokens_per_step / step.total
    flops = training_flops_per_token(config.model, vocab_size, config.data.sequence_length).full
    peak = machine.rates.peaks[config.precision] * layout.world_size
    return Throughput(
        step=step,
        tokens_per_second=speed,
        mfu=speed * flops / peak,
        tokens_per_day=speed * 86400,
        device_hours=layout.world_size * config.train.steps * step.total / 3600,
    )


def _rank_time(
    config: RunConfig,
    layout: Layout,
    vocab_size: int,
    machine: Machine,
    pipeline: int,
    microbatches: list[dict[str, float]],
) -> StepTime:
    """``microbatches``: the parts of one microbatch's time, by pipeline rank."""
    count = layout.num_microbatches(config.batch.global_batch_size, config.batch.micro_batch_size)
    parts = microbatches[pipeline]
    # Forward of the first microbatch through the stages before it, and both passes through those
    # behind it, and backward of the last through those before: each of the others' time, once.
    everyone = sum(sum(one.values()) for one in microbatches)
    held = rank_parameters(config.model, vocab_size, layout, pipeline).total
    gradients, weights = _data_parallel(config, layout, held, count, machine)
    return StepTime(
        **{name: count * seconds for name, seconds in parts.items()},
        bubble=(everyone - sum(parts.values())) / layout.virtual_pipeline,
        gradients=gradients,
        weights=weights,
        optimizer=_optimizer(config, layout, held, count) / machine.rates.memory_bandwidth,
    )


def _microbatch(
    config: RunConfig, layout: Layout, vocab_size: int, machine: Machine, pipeline: int
) -> dict[str, float]:
    """Seconds of one microbatch, forward and backward, on a rank at this pipeline coordinate."""
    model, rates, sizes = config.model, machine.rates, Sizes.of(config, layout)
    layers = sum(stage_layers(model, layout, pipeline))
    rate = rates.peaks[config.precision] * rates.matmul_efficiency

    product = layers * 6 * sizes.tokens * layer_shard(model, layout.tensor) / rate
    # Below the diagonal: two products forward, five backward.
    length = config.data.sequence_length
    forward_attention = 2 * sizes.tokens * length * model.hidden_size / layout.tensor
    attention = layers * 3.5 * forward_attention / (rate * ATTENTION_EFFICIENCY)
    kept = layer_bytes(config, layout, rates.device)
    elementwise = layers * TRAFFIC_PER_KEPT_BYTE * kept / rates.memory_bandwidth
    again = {
        "none": 0.0,
        "selective": attention / 3.5,
        "full": product / 3 + attention / 3.5 + elementwise / 3,
    }[config.train.recompute]
    columns = vocab_size // layout.tensor
    if model.adaptive is not None:
        columns = model.adaptive.cutoffs[0] // layout.tensor
    loss = sends = 0.0
    if pipeline == layout.pipeline - 1:
        loss = 6 * sizes.tokens * columns * model.hidden_size / rate
        loss += TRAFFIC_PER_LOGIT * sizes.tokens * columns / rates.memory_bandwidth
    if layout.pipeline > 1:
        one = machine.send(layout.tensor * layout.data, sizes.stream)
        sends = 2 * layout.virtual_pipeline * one
    return {
        "matrix_products": product,
        "attention": attention,
        "elementwise": elementwise,
        "loss": loss,
        "recompute": again,
        "tensor_parallel": layers * _tensor_parallel(config, layout, sizes, machine),
        "pipeline_sends": sends,
    }


def _tensor_parallel(config: RunConfig, layout: Layout, sizes: Sizes, machine: Machine) -> float:
    """Of one layer: Shoeybi et al. 2019, §3, two all-reduces each way; with sequence parallelism a
    gather and a scatter for each, and both inputs gathered once more in backward."""
    one = machine.collective(layout.tensor, 1, sizes.whole_stream)
    passes = 8 + (2 if layout.sequence else 0)
    if config.train.recompute == "full":
        passes += 4
    return passes * one


def _data_parallel(
    config: RunConfig, layout: Layout, held: int, count: int, machine: Machine
) -> tuple[float, float]:
    """Gradients, and ZeRO 3's weights. Gradients travel in fp32 whatever the precision."""
    item = 4 if config.precision == "fp32" else 2

    def ring(volume: float, rounds: int) -> float:
        return machine.collective(layout.data, layout.tensor, volume, rounds)

    stage = config.zero.stage
    reductions = count if stage >= 2 else 1  # shards cannot wait for the last microbatch
    # The engine's stages 0 to 2 all-reduce, also where a scatter would do.
    gradients = reductions * ring(4.0 * held, 1 if stage == 3 else 2)
    if stage in (1, 2):
        gradients += ring(item * held, 1)
    if stage < 3:
        return gradients, 0.0
    # Gathered a layer at a time, in forward and again in backward.
    hops = config.model.num_layers / layout.pipeline * ring(0.0, 1)
    return gradients, 2 * count * (ring(item * held, 1) + hops)


def _optimizer(config: RunConfig, layout: Layout, held: int, count: int) -> float:
    """Bytes of memory traffic."""
    stage = config.zero.stage
    accumulate = TRAFFIC_ACCUMULATE * count * held if config.precision != "fp32" else 0.0
    clip = TRAFFIC_CLIP * held / (layout.data if stage >= 2 else 1)
    return accumulate + clip + TRAFFIC_UPDATE * held / (layout.data if stage >= 1 else 1)
