"""Counts of every rank against stages that were built, on tensors without memory."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from distributed_lm import process_groups
from distributed_lm.config import ModelConfig, RunConfig, check_config, load_config
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.planner.shards import layer_shard, rank_parameters, stage_layers
from distributed_lm.process_groups import Process
from tests.support.ranks import run_distributed
from tests.support.training import tiny_config

CONFIGS = Path(__file__).parents[3] / "configs"
# (tensor, pipeline, virtual pipeline)
GRIDS = [(1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 2, 2), (4, 4, 1)]
VOCAB = 512  # where the data set would say


@functools.cache
def presets() -> dict[str, ModelConfig]:
    """Every model that a file of ours describes, tied and untied."""
    found = {}
    for path in sorted(CONFIGS.glob("models/*.yaml")):
        found[path.stem] = ModelConfig.model_validate(yaml.safe_load(path.read_text())["model"])
    for path in sorted(CONFIGS.glob("runs/*.yaml")):
        if "extrapolation" not in path.stem and "seeds" not in path.read_text():
            found[path.stem] = load_config(path).model
    for name, model in list(found.items()):
        if model.adaptive is None:  # that is always tied
            other = not model.tie_embeddings
            found[f"{name}, other tying"] = model.model_copy(update={"tie_embeddings": other})
    return found


def legal_cases() -> list[tuple[str, RunConfig, int]]:
    cases = []
    for name, model in presets().items():
        for tensor, pipeline, virtual in GRIDS:
            parallel = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual}
            config = tiny_config(parallel=parallel, data={"sequence_length": 64})
            rows = {"vocab_size": model.vocab_size or VOCAB}
            config = config.model_copy(update={"model": model.model_copy(update=rows)})
            try:
                check_config(config)
            except ConfigError:
                continue
            cases += [(name, config, stage) for stage in range(pipeline)]
    return cases


def count_on_meta(cases: list[tuple[str, RunConfig, int]]) -> list[int]:
    """Elements of all parameters of one rank of each case: the last of its tensor-parallel ones."""
    counts = []
    for _, config, stage in cases:
        layout = Layout.grid(config.parallel, config.parallel.tensor * config.parallel.pipeline)
        rank = layout.tensor * stage + layout.tensor - 1
        dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            create_gloo_process_groups=False,
        )
        process = Process(rank=rank, world_size=layout.world_size, local_rank=rank)
        groups = process_groups._collect(process, layout, torch.device("cpu"))
        groups = dataclasses.replace(groups, device=torch.device("meta"))
        with torch.device("meta"):
            stages = build_stages(config, config.model.vocab_size or 0, groups)
        held = {id(one): one.numel() for chunk in stages for one in chunk.parameters()}
        counts.append(sum(held.values()))
        process_groups.stop()
    return counts


def test_every_rank_of_every_preset_holds_what_was_planned() -> None:
    cases = legal_cases()
    assert len({name for name, _, _ in cases}) >= 2 * len(list(CONFIGS.glob("runs/*.yaml"))) - 15
    [built] = run_distributed(count_on_meta, 1, cases)
    for (name, config, stage), count in zip(cases, built, strict=True):
        parallel = config.parallel
        layout = Layout.grid(parallel, parallel.tensor * parallel.pipeline)
        held = rank_parameters(config.model, config.model.vocab_size or 0, layout, stage)
        assert held.total == count, (name, layout.describe(), stage, held)


@pytest.mark.parametrize("name", sorted(presets()))
def test_one_rank_alone_holds_the_whole_model(name: str) -> None:
    model = presets()[name]
    size = model.vocab_size or VOCAB
    alone = Layout(1, 1, 1, 1, False)
    assert rank_parameters(model, size, alone, 0).total == total_parameters(model, size)


def test_layers_of_the_papers_model_over_four_stages() -> None:
    model = presets()["1p3b"]
    split = [stage_layers(model, Layout(1, 1, 4, 1, False), stage) for stage in range(4)]
    assert split == [[7], [6], [6], [6]]
    assert stage_layers(model, Layout(1, 1, 2, 2, False), 0) == [7, 6]
    # 12·D² + 13·D over all, of which 6·D are on every rank: two output biases and two norms.
    width = model.hidden_size
    assert layer_shard(model, 2) == 6 * width**2 + 7 * width // 2 + 6 * width
