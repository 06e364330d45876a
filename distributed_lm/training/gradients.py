"""Gradient sums that Megatron leaves to its own optimizer, done where DeepSpeed can see the result.

Some parameters exist on several model-parallel ranks with only part of the gradient on each: those
that saw a slice of the tokens or of the heads, on the tensor-parallel ranks; a tied embedding,
whose input half is on the first pipeline stage and output half on the last; and what a position
method learns on the attention, of which every stage has its layers' part.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from distributed_lm.model.gpt import GPTStage
from distributed_lm.model.parameters import ParameterShard
from distributed_lm.process_groups import ProcessGroups


def sum_partial_gradients(shards: list[ParameterShard], groups: ProcessGroups) -> None:
    """From now on, sum partial gradients over the tensor-parallel ranks in backward.

    A hook per microbatch, since ZeRO 2 and 3 take a gradient away as soon as it is there. The sum
    is in fp32 whatever the training dtype.
    """

    def sum_over_tensor_ranks(gradient: Tensor) -> Tensor:
        total = gradient.to(torch.float32, copy=True)
        dist.all_reduce(total, group=groups.tensor)
        return total.to(gradient.dtype)

    for shard in shards:
        if shard.is_partial:
            shard.parameter.register_hook(sum_over_tensor_ranks)


def sum_tied_embedding_gradients(stages: list[GPTStage], groups: ProcessGroups) -> None:
    """After all microbatches and before the optimizer: first stage's half plus last stage's."""
    if groups.layout.pipeline == 1 or groups.embedding is None:
        return
    for stage in stages:
        weight = stage.shared_embedding_or_output_weight()
        if weight is not None and stage.share_embeddings_and_output_weights:
            dist.all_reduce(accumulated_gradient(weight), group=groups.embedding)


def sum_position_gradients(stages: list[GPTStage], groups: ProcessGroups) -> None:
    """After all microbatches and before the optimizer: the sum over all pipeline stages. Virtual
    stages of one rank share the weights, and so the gradient."""
    position = stages[0].position
    if groups.layout.pipeline == 1 or position.embeds_only:
        return
    for parameter in position.parameters():
        dist.all_reduce(accumulated_gradient(parameter), group=groups.pipeline)


def accumulated_gradient(parameter: Tensor) -> Tensor:
    """Where DeepSpeed accumulates this parameter's microbatches: fp32 for the bf16 optimizer."""
    for name in ("_hp_grad", "grad_accum", "grad"):
        gradient = getattr(parameter, name, None)
        if gradient is not None:
            return gradient
    raise AssertionError("no gradient: backward has not run, or ZeRO has partitioned it already")


def average_gradients(shards: list[ParameterShard], groups: ProcessGroups) -> None:
    """Mean over the data-parallel ranks. For ZeRO 0: DeepSpeed reduces only inside ``step()``."""
    for shard in shards:
        gradient = accumulated_gradient(shard.parameter)
        dist.all_reduce(gradient, group=groups.data)
        gradient /= groups.layout.data


def global_gradient_norm(shards: list[ParameterShard], groups: ProcessGroups) -> Tensor:
    """L2 norm over the whole model, each weight counted once. For ZeRO 0, which has none itself."""
    total = torch.zeros((), dtype=torch.float32, device=groups.device)
    for shard in shards:
        is_counted_here = shard.is_sharded or groups.coordinates.tensor == 0
        if is_counted_here and not shard.is_tied_copy:
            total += torch.linalg.vector_norm(accumulated_gradient(shard.parameter)).square()
    dist.all_reduce(total, group=groups.model)
    return total.sqrt()
