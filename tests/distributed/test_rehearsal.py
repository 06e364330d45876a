"""Rehearsals of small worlds: right ones pass, and each deliberate break of the real code is found
and named."""

import dataclasses
import subprocess
import sys
import time
from typing import Any

import pytest

from distributed_lm.config import RunConfig
from tests.support.rehearsal import problems_of, rehearse_all
from tests.support.training import tiny_config

RUN = "configs/runs/alibi_1p3b_L1024.yaml"


def config_of(**sections: Any) -> RunConfig:
    """A tiny model with a batch for up to 8 data-parallel ranks, whose blocks hold 2 sequences."""
    sections = {"batch": {"global_batch_size": 16, "micro_batch_size": 1}, **sections}
    return tiny_config(data={"block_length": 64}, **sections)


# Three dimensions, interleaved and sequence-parallel.
THREE = config_of(
    precision="bf16",
    parallel={"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True},
)

RIGHT = {
    "three dimensions": (THREE, 16),
    "tied embedding over a pipeline": (config_of(parallel={"pipeline": 4}), 8),
    "untied": (config_of(model={"tie_embeddings": False}, parallel={"pipeline": 2}), 4),
    "no ZeRO": (config_of(zero={"stage": 0}, parallel={"tensor": 4}), 8),
    "ZeRO 2": (config_of(precision="bf16", zero={"stage": 2}, parallel={"tensor": 2}), 16),
    "ZeRO 3": (config_of(precision="bf16", zero={"stage": 3}, parallel={"tensor": 2}), 16),
    "fp16": (config_of(precision="fp16"), 8),
    "gated, grouped queries, no biases": (
        config_of(
            model={
                "activation": "swiglu", "normalization": "rmsnorm", "bias": False,
                "num_key_value_heads": 2, "position": "rotary",
            },
            parallel={"tensor": 2, "pipeline": 2},
        ),
        8,
    ),
    "trained bias": (
        config_of(model={"position": "t5"}, parallel={"tensor": 2, "pipeline": 2}),
        8,
    ),
    "trained positions": (
        config_of(model={"position": "learned"}, parallel={"tensor": 2, "pipeline": 2}),
        8,
    ),
    "adaptive": (
        config_of(
            model={"adaptive": {"cutoffs": [64, 128]}, "position": "sinusoidal"},
            parallel={"tensor": 2, "pipeline": 2},
        ),
        8,
    ),
    "heads not a power of two": (
        config_of(
            model={"hidden_size": 96, "num_attention_heads": 6}, parallel={"tensor": 2}
        ),
        4,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def rehearsed() -> dict[str, Any]:
    return dict(zip(RIGHT, rehearse_all(list(RIGHT.values())), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layout_has_no_problems(name: str, rehearsed: dict[str, Any]) -> None:
    views, problems = rehearsed[name]
    config, world_size = RIGHT[name]
    assert {check: found for check, found in problems.items() if found} == {}
    assert [view.rank for view in views] == list(range(world_size))
    assert sum(view.samples.shape[1] for view in views) == (
        config.batch.global_batch_size * config.parallel.tensor * config.parallel.pipeline
    )
    if config.model.position == "alibi":
        heads = config.model.num_attention_heads // config.parallel.tensor
        assert all(len(slopes) == heads for view in views for slopes in view.slopes)


def local_head_index() -> None:
    from distributed_lm.model.positions import HeadSlice

    right = HeadSlice.of
    HeadSlice.of = lambda *place: dataclasses.replace(right(*place), first=0)


def one_layer_less_in_the_layout() -> None:
    from distributed_lm import layout

    right = layout.layers_per_stage
    layout.layers_per_stage = lambda *sizes: [*right(*sizes)[:-1], right(*sizes)[-1] - 1]


def one_layer_less_in_the_model() -> None:
    from distributed_lm.model import gpt

    right = gpt.get_num_layers_to_build

    def fewer(config: Any, vp_stage: int | None, pipeline_rank: int) -> int:
        return right(config, vp_stage, pipeline_rank) - (pipeline_rank == 1 and vp_stage == 0)

    gpt.get_num_layers_to_build = fewer


def data_ranks_in_reverse() -> None:
    from distributed_lm.layout import Layout

    right = Layout.coordinates

    def swapped(self: Layout, rank: int) -> Any:
        place = right(self, rank)
        return dataclasses.replace(place, data=self.data - 1 - place.data)

    Layout.coordinates = swapped


def half_of_the_data_ranks_read() -> None:
    from distributed_lm.data.sequences import StepSequences

    right = StepSequences.of_rank
    StepSequences.of_rank = lambda self, position, rank, size: right(
        self, position, rank // 2 * 2, size
    )


def pipeline_stages_read_differently() -> None:
    from distributed_lm.rehearsal import world

    right = world._samples

    def shifted(script: Any, groups: Any) -> Any:
        return right(script, groups) + groups.coordinates.pipeline

    world._samples = shifted


def offsets_of_the_first_tensor_rank() -> None:
    from distributed_lm.model import parameters

    right = parameters._pieces
    parameters._pieces = lambda names, shape, dimension, rank, size: right(
        names, shape, dimension, 0 if dimension == 1 else rank, size
    )


def zero_pieces_from_the_start() -> None:
    from distributed_lm.training import zero_state

    right = zero_state._flat_group_location

    def located(*arguments: Any) -> Any:
        found = right(*arguments)
        return None if found is None else (*found[:3], 0)

    zero_state._flat_group_location = located


def zero3_pieces_of_one_rank() -> None:
    from distributed_lm.training import zero_state

    zero_state.dist = type("Distributed", (), {"get_rank": staticmethod(lambda group: 0)})


def tied_copies_are_saved() -> None:
    from distributed_lm.checkpoint import blocks
    from distributed_lm.training import zero_state

    def replica(shard: Any, groups: Any) -> tuple[int, int]:
        return 0 if shard.is_sharded else groups.coordinates.tensor, 0

    blocks.replica = zero_state.replica = replica


def nobody_saves_the_norms() -> None:
    from distributed_lm.checkpoint import blocks
    from distributed_lm.training import zero_state

    def replica(shard: Any, groups: Any) -> tuple[int, int]:
        return 0 if shard.is_sharded else 1, int(shard.is_tied_copy)

    blocks.replica = zero_state.replica = replica


def deepspeed_sums_over_tensor_ranks_only() -> None:
    from megatron.core import parallel_state

    from distributed_lm.process_groups import ModelParallelUnit

    ModelParallelUnit.get_model_parallel_group = lambda self: (
        parallel_state.get_tensor_model_parallel_group()
    )


def norms_differ_between_tensor_ranks() -> None:
    from distributed_lm.model import parameters

    right = parameters.ParameterShard

    def renamed(parameter: Any, shape: Any, pieces: Any, *rest: Any) -> Any:
        from megatron.core import parallel_state

        if "final_layernorm" in pieces[0].name:
            tensor_rank = parallel_state.get_tensor_model_parallel_rank()
            name = pieces[0].name + str(tensor_rank)
            pieces = (dataclasses.replace(pieces[0], name=name),)
        return right(parameter, shape, pieces, *rest)

    parameters.ParameterShard = renamed


# What is broken, on which run, which check says so, and how its first sentence begins.
ZERO3 = (RIGHT["ZeRO 3"][0], 8)
BROKEN: list[tuple[Any, tuple[RunConfig, int], str, str]] = [
    (local_head_index, (THREE, 8), "slopes",
     "ranks 0, 1 (one tensor group), layer 0: slope 0.25 for head 2 of the model, expected 0.015"),
    (one_layer_less_in_the_layout, (THREE, 8), "building", "rank 0: cannot be built: "),
    (one_layer_less_in_the_model, (THREE, 8), "layers",
     "ranks 0, 4 (one pipeline): hold layers 0, 1, 3, 4 in this order, expected 0, 1, 2, 3, 4"),
    (data_ranks_in_reverse, (THREE, 8), "building",
     "rank 0: cannot be built: AssertionError: rank 0: Coordinates(tensor=0, data=1, pipeline=0) "
     "here, Coordinates(tensor=0, data=0, pipeline=0) in Megatron"),
    (half_of_the_data_ranks_read, (THREE, 8), "sequences", "ranks 0 and 2: both read the seq"),
    (pipeline_stages_read_differently, (THREE, 8), "sequences",
     "rank 4: reads other sequences than rank 0, which shares its replica of the model"),
    (offsets_of_the_first_tensor_rank, (THREE, 8), "weights",
     "decoder.layers.0.self_attention.linear_proj.weight [64, 64], row 0, column 0: ranks 0 and 1 "
     "hold it, expected one of them"),
    (zero_pieces_from_the_start, (THREE, 8), "checkpoint", "optimizer.master."),
    (zero3_pieces_of_one_rank, ZERO3, "checkpoint", "model.embedding.weight [192, 64], row 0, "),
    (tied_copies_are_saved, (THREE, 8), "checkpoint",
     "model.embedding.weight [192, 64], row 0, column 0: ranks 0 and 4 write it, expected one"),
    (nobody_saves_the_norms, (THREE, 8), "checkpoint", "no rank writes model.decoder."),
    (deepspeed_sums_over_tensor_ranks_only, (THREE, 8), "process groups",
     "rank 0: DeepSpeed's model group is 0, 1, Megatron's 0, 1, 4, 5"),
    (norms_differ_between_tensor_ranks, (THREE, 8), "weights",
     "ranks 4 and 5: decoder.final_layernorm.bias0 should be the same on every tensor-parallel"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("breakage", "run", "check", "sentence"), BROKEN, ids=[case[0].__name__ for case in BROKEN]
)
def test_a_broken_layout_is_found_and_named(
    breakage: Any, run: tuple[RunConfig, int], check: str, sentence: str
) -> None:
    problems = problems_of(*run, breakage)
    assert check in problems, problems
    assert problems[check][0].startswith(sentence), problems[check][:3]


@pytest.mark.slow
def test_a_thousand_ranks() -> None:
    layout = ["parallel.tensor=2", "parallel.pipeline=4", "parallel.virtual_pipeline=2"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "distributed_lm", "rehearse", RUN, "--world-size", "1024", *layout,
         "parallel.sequence=true", "--cluster", "configs/clusters/h100_8x16.yaml"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "built 48 of 1,024 ranks" in done.stdout
    assert "228,725,760" in done.stdout  # of the first stage's ranks, tied embedding included
    assert done.stdout.count(" ok\n") == 9
    assert time.monotonic() - started < 90.0
