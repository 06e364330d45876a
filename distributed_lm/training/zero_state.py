"""Where DeepSpeed keeps this rank's weights, fp32 masters and moments, as checkpoint blocks.

ZeRO 1 and 2 (and the bf16 optimizer) flatten each parameter group and give every data-parallel rank
one piece of it; each parameter knows which part of itself is in this rank's piece. ZeRO 3 gives
every rank an equal piece of each parameter, padded at the end. ZeRO 0 keeps everything everywhere.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_lm.checkpoint.blocks import (
    Block,
    flat_range,
    model_blocks,
    replica,
    whole_parameter,
)
from distributed_lm.model.parameters import ParameterShard
from distributed_lm.process_groups import ProcessGroups
from distributed_lm.training.engine import TrainingEngine

MASTER = "optimizer.master"


def weight_blocks(engine: TrainingEngine) -> list[Block]:
    """The weights in the training dtype, under ``model.NAME``."""
    if engine.config.zero.stage < 3:
        return model_blocks(engine.shards, engine.groups)
    blocks: list[Block] = []
    for shard in engine.shards:
        piece, start = _zero3_piece(shard, shard.parameter.ds_tensor, engine.groups)  # type: ignore[attr-defined]
        blocks += flat_range("model", shard, piece, start, replica(shard, engine.groups))
    return blocks


def optimizer_blocks(engine: TrainingEngine) -> list[Block]:
    """fp32 master weights under ``optimizer.master.NAME`` and the optimizer's moments."""
    return [block for shard in engine.shards for block in _shard_optimizer_blocks(engine, shard)]


def ensure_moments(engine: TrainingEngine) -> None:
    """Create the optimizer's state where no step has: what a load is to fill."""
    for master in _masters(engine):
        state = engine.optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for moment in engine.optimizer.moments:
                state[moment] = torch.zeros_like(master)


def refresh_gathered_weights(engine: TrainingEngine) -> None:
    """After a load: ZeRO 3 keeps small parameters gathered from its first step on, and those copies
    are of before. Dropping them has the next forward gather what was loaded."""
    if engine.config.zero.stage == 3:
        gathered = engine.deepspeed.optimizer.persistent_parameters
        if gathered:
            gathered[0].partition(gathered, has_been_updated=False)


def updates_done(engine: TrainingEngine) -> int:
    """The optimizer's step count: steps less the updates left out."""
    return int(engine.optimizer.state[_masters(engine)[0]]["step"].item())


def set_updates_done(engine: TrainingEngine, count: int) -> None:
    for state in engine.optimizer.state.values():
        state["step"].fill_(float(count))


def loss_scale_state(engine: TrainingEngine) -> dict[str, Any]:
    """fp16's dynamic loss scale as JSON values; empty otherwise."""
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if engine.config.precision != "fp16" or scaler is None:
        return {}
    return {
        name: value for name, value in vars(scaler).items() if isinstance(value, bool | int | float)
    }


def set_loss_scale_state(engine: TrainingEngine, state: dict[str, Any]) -> None:
    if state and engine.config.precision == "fp16":
        vars(engine.deepspeed.optimizer.loss_scaler).update(state)


def _masters(engine: TrainingEngine) -> list[Tensor]:
    """The fp32 tensors that torch's optimizer updates on this rank."""
    if engine.config.zero.stage == 3:  # put into the parameter groups one at a time, in step()
        masters: list[Tensor] = engine.deepspeed.optimizer.fp32_partitioned_groups_flat
        return masters
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def _shard_optimizer_blocks(engine: TrainingEngine, shard: ParameterShard) -> Iterator[Block]:
    if engine.config.zero.stage == 0:
        yield from _zero0_blocks(engine, shard)
        return
    located = _zero3_location(engine, shard) if engine.config.zero.stage == 3 else None
    located = located or _flat_group_location(engine, shard)
    if located is None:  # this rank's piece holds nothing of the parameter
        return
    flat, flat_start, count, start = located
    copy = replica(shard, engine.groups)
    state = engine.optimizer.state[flat]
    tensors = {
        MASTER: flat.data,
        **{f"optimizer.{name}": state[name] for name in engine.optimizer.moments},
    }
    for kind, tensor in tensors.items():
        yield from flat_range(kind, shard, tensor.narrow(0, flat_start, count), start, copy)


def _zero0_blocks(engine: TrainingEngine, shard: ParameterShard) -> Iterator[Block]:
    state = engine.optimizer.state[shard.parameter]
    tensors = {MASTER: shard.parameter.data}
    tensors |= {f"optimizer.{name}": state[name] for name in engine.optimizer.moments}
    for kind, tensor in tensors.items():
        yield from whole_parameter(kind, shard, tensor, engine.groups)


def _flat_group_location(
    engine: TrainingEngine, shard: ParameterShard
) -> tuple[Tensor, int, int, int] | None:
    """(flat fp32 tensor, start in it, length, start in the parameter) for ZeRO 1 and 2."""
    mapping = getattr(shard.parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    flat = engine.optimizer.param_groups[mapping.param_group_index]["params"][0]
    address = mapping.hp_fragment_address
    return flat, address.start, address.numel, mapping.lp_fragment_address.start


def _zero3_location(
    engine: TrainingEngine, shard: ParameterShard
) -> tuple[Tensor, int, int, int] | None:
    """The same for ZeRO 3."""
    optimizer, parameter = engine.deepspeed.optimizer, shard.parameter
    group, flat_start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    piece, start = _zero3_piece(shard, parameter.ds_tensor, engine.groups)  # type: ignore[attr-defined]
    if piece.numel() == 0:
        return None
    return optimizer.fp32_partitioned_groups_flat[group], flat_start, piece.numel(), start


def _zero3_piece(
    shard: ParameterShard, partition: Tensor, groups: ProcessGroups
) -> tuple[Tensor, int]:
    """This rank's piece of a parameter without padding, and where in the parameter it starts."""
    numel = int(torch.Size(shard.local_shape).numel())
    start = min(partition.numel() * dist.get_rank(groups.data), numel)
    return partition.data.view(-1)[: min(partition.numel(), numel - start)], start
