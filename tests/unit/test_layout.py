"""The parallel arithmetic, against Megatron's own."""

from itertools import product
from pathlib import Path

import pytest

from distributed_lm.config import load_config
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout, layers_per_stage, pipeline_layout

SMOKE = Path(__file__).parents[2] / "configs" / "runs" / "smoke.yaml"
GRIDS = list(product((1, 2, 3, 8), (1, 2, 4), (1, 2, 5)))


def grid(data: int, tensor: int, pipeline: int) -> Layout:
    return Layout(data=data, tensor=tensor, pipeline=pipeline, virtual_pipeline=1, sequence=False)


@pytest.mark.parametrize(("data", "tensor", "pipeline"), GRIDS)
def test_every_rank_has_its_own_place(data: int, tensor: int, pipeline: int) -> None:
    layout = grid(data, tensor, pipeline)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size == data * tensor * pipeline
    assert {place.data for place in places} == set(range(data))
    assert {place.tensor for place in places} == set(range(tensor))
    assert {place.pipeline for place in places} == set(range(pipeline))


@pytest.mark.parametrize(("data", "tensor", "pipeline"), GRIDS)
def test_rank_order_is_megatrons(data: int, tensor: int, pipeline: int) -> None:
    """Megatron's groups of each kind are our ranks that differ in that coordinate only."""
    from megatron.core.parallel_state import RankGenerator

    layout = grid(data, tensor, pipeline)
    megatron = RankGenerator(
        tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp", rank_offset=0
    )
    for kind, name in {"tp": "tensor", "dp": "data", "pp": "pipeline"}.items():
        assert sorted(megatron.get_ranks(kind)) == sorted(ranks_along(layout, name))


def ranks_along(layout: Layout, name: str) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = vars(layout.coordinates(rank))
        others = tuple(value for key, value in place.items() if key != name)
        groups.setdefault(others, []).append(rank)
    return list(groups.values())


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (25, 1, "Et*25L"),
        (25, 2, "Et*13|t*12L"),
        (25, 4, "Et*7|t*6|t*6|t*6L"),
        (4, 4, "Et*1|t*1|t*1|t*1L"),
    ],
)
def test_pipeline_layout(layers: int, stages: int, expected: str) -> None:
    assert pipeline_layout(layers, stages) == expected


@pytest.mark.parametrize(("layers", "stages"), list(product((4, 25, 32), (1, 2, 3, 4))))
def test_megatron_reads_the_pipeline_layout_as_we_mean_it(layers: int, stages: int) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    parsed = PipelineParallelLayerLayout.from_str(pipeline_layout(layers, stages), stages)
    counts = [sum("decoder" in str(layer).lower() for layer in chunk[0]) for chunk in parsed.layout]
    assert counts == layers_per_stage(layers, stages)
    assert sum(counts) == layers


def test_microbatches() -> None:
    assert grid(2, 4, 1).num_microbatches(global_batch_size=24, micro_batch_size=3) == 4
    with pytest.raises(ConfigError, match=r"=24 is not a multiple of .*=5 × 2 .* = 10; use 20"):
        grid(2, 4, 1).num_microbatches(global_batch_size=24, micro_batch_size=5)


def test_processes_beyond_the_model_are_data_parallel() -> None:
    config = load_config(SMOKE, ["parallel.tensor=2", "parallel.pipeline=2"])
    layout = Layout.of(config, 8)
    assert (layout.data, layout.tensor, layout.pipeline) == (2, 2, 2)
    assert layout.describe() == "data=2 tensor=2 pipeline=2"
