"""The parallel arithmetic: which rank holds which part of the model and of the batch.

Rank order is Megatron's: tensor-parallel ranks are neighbours, then data-parallel, then pipeline,
``rank = tensor + tensor_size · (data + data_size · pipeline)``. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distributed_lm.errors import ConfigError

if TYPE_CHECKING:
    from distributed_lm.config import ParallelConfig, RunConfig


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands in each direction of the grid."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the process grid. ``data × tensor × pipeline`` is the world size."""

    data: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    sequence: bool

    @classmethod
    def grid(cls, parallel: ParallelConfig, world_size: int) -> Layout:
        """The grid that ``parallel`` asks for on ``world_size`` processes.

        Raises:
            ConfigError: if the sizes do not multiply to the world size.
        """
        model_ranks = parallel.tensor * parallel.pipeline
        if world_size % model_ranks:
            raise ConfigError(
                f"{world_size} processes are not a multiple of parallel.tensor={parallel.tensor} "
                f"× parallel.pipeline={parallel.pipeline} = {model_ranks}; "
                f"start {model_ranks * max(1, world_size // model_ranks)} or change the layout"
            )
        return cls(
            data=world_size // model_ranks,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            sequence=parallel.sequence,
        )

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Layout:
        """The grid for training ``config``.

        Raises:
            ConfigError: as ``grid``, or if the batch does not divide over the data-parallel ranks.
        """
        layout = cls.grid(config.parallel, world_size)
        microbatches = layout.num_microbatches(
            config.batch.global_batch_size, config.batch.micro_batch_size
        )
        if layout.virtual_pipeline > 1 and microbatches % layout.pipeline:
            raise ConfigError(
                f"the interleaved schedule needs microbatches in multiples of "
                f"parallel.pipeline={layout.pipeline}, found {microbatches}; change "
                "batch.global_batch_size or set parallel.virtual_pipeline=1"
            )
        return layout

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(tensor=tensor, data=data, pipeline=pipeline)

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Forward passes per step of each data-parallel rank.

        Raises:
            ConfigError: if the global batch is not a multiple of micro batch × data-parallel size.
        """
        sequences = micro_batch_size * self.data
        if global_batch_size % sequences:
            raise ConfigError(
                f"batch.global_batch_size={global_batch_size} is not a multiple of "
                f"batch.micro_batch_size={micro_batch_size} × {self.data} data-parallel ranks "
                f"= {sequences}; use {sequences * max(1, global_batch_size // sequences)}"
            )
        return global_batch_size // sequences

    def describe(self) -> str:
        parts = [f"data={self.data}", f"tensor={self.tensor}", f"pipeline={self.pipeline}"]
        if self.virtual_pipeline > 1:
            parts.append(f"virtual_pipeline={self.virtual_pipeline}")
        if self.sequence:
            parts.append("sequence")
        return " ".join(parts)


def layers_per_stage(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each virtual stage in model order.

    Spare layers go to the first stages: the last one also computes the output projection, which
    costs about as much as two layers at 51,200 tokens of vocabulary.
    """
    share, spare = divmod(num_layers, num_stages)
    return [share + (stage < spare) for stage in range(num_stages)]


def pipeline_layout(num_layers: int, num_stages: int) -> str:
    """Megatron's ``pipeline_model_parallel_layout`` string: E embedding, t layer, L loss.

    ``pipeline_layout(25, 4)`` is ``"Et*7|t*6|t*6|t*6L"``.
    """
    stages = [f"t*{count}" for count in layers_per_stage(num_layers, num_stages)]
    return "E" + "|".join(stages) + "L"


def check_layout(config: RunConfig) -> None:
    """Reject parallel sizes that do not fit the model, at any world size.

    Raises:
        ConfigError: naming the field, both numbers and the remedy.
    """
    parallel, model = config.parallel, config.model
    sharded = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_key_value_heads": model.key_value_heads,
        "model.ffn_hidden_size": model.ffn_size,
        "model.vocab_size": model.vocab_size,
    }
    for index, cutoff in enumerate(model.adaptive.cutoffs if model.adaptive else ()):
        sharded[f"model.adaptive.cutoffs.{index}"] = cutoff
    for field, size in sharded.items():
        if size is not None and size % parallel.tensor:
            raise ConfigError(
                f"{field}={size} cannot be divided over parallel.tensor={parallel.tensor}; "
                f"set parallel.tensor to a divisor of {size}"
            )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1, "
            "found 1; set parallel.virtual_pipeline=1"
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if stages > model.num_layers:
        raise ConfigError(
            f"model.num_layers={model.num_layers} is fewer than parallel.pipeline × "
            f"parallel.virtual_pipeline = {stages} stages; use at most {model.num_layers} stages"
        )
    _check_sequence_parallel(config)


def _check_sequence_parallel(config: RunConfig) -> None:
    parallel, length = config.parallel, config.data.sequence_length
    if not parallel.sequence:
        return
    if parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence=true splits over the tensor-parallel ranks, and "
            "parallel.tensor=1; set parallel.sequence=false or a larger parallel.tensor"
        )
    if length % parallel.tensor:
        raise ConfigError(
            f"data.sequence_length={length} cannot be divided over "
            f"parallel.tensor={parallel.tensor} with parallel.sequence=true; "
            f"use a multiple of {parallel.tensor}"
        )
