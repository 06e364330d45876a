"""The planner's arithmetic against models that were built, and against the paper's."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_lm import process_groups
from distributed_lm.config import ModelConfig, RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import parameter_shards
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.process_groups import Process
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, tiny_config

MODELS = Path(__file__).parents[3] / "configs" / "models"

GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no bias": {"bias": False},
    "untied": {"tie_embeddings": False},
    "swiglu": {"activation": "swiglu", "ffn_hidden_size": 96},
    "swiglu, no bias": {"activation": "swiglu", "bias": False},
    "rmsnorm": {"normalization": "rmsnorm"},
    # As many as with a LayerNorm without bias, but for the depth.
    "rmsnorm, no bias": {"normalization": "rmsnorm", "bias": False, "num_layers": 3},
    "grouped queries": GROUPED,
    "grouped queries, no bias": {**GROUPED, "bias": False},
    "sinusoidal, odd depth": {"position": "sinusoidal", "num_layers": 3},
    "learned": {"position": "learned"},
    "learned, longer": {"position": "learned", "max_positions": 500},
    "t5": {"position": "t5"},
    "llama-like": {
        **GROUPED,
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "bias": False,
        "tie_embeddings": False,
    },
}


def count_parameters(configs: list[RunConfig]) -> list[int]:
    """Elements of each model's global tensors, counted on this rank's own blocks of them."""
    groups = process_groups.start(configs[0], Process.from_environment(), Layout(1, 1, 1, 1, False))
    return [
        sum(
            shard.parameter.numel()
            for shard in parameter_shards(build_stages(config, VOCAB, groups), groups)
        )
        for config in configs
    ]


def test_counts_equal_the_built_models() -> None:
    configs = [tiny_config(model=variant) for variant in VARIANTS.values()]
    [built] = run_distributed(count_parameters, 1, configs)
    planned = [total_parameters(config.model, VOCAB) for config in configs]
    assert dict(zip(VARIANTS, planned, strict=True)) == dict(zip(VARIANTS, built, strict=True))
    assert len(set(built)) == len(built)  # every variant does change the count


def count_in_norm(config: RunConfig) -> int:
    """Elements whose gradients this rank adds to the norm, as DeepSpeed and ZeRO 0 decide it."""
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    shards = parameter_shards(build_stages(config, VOCAB, groups), groups)
    assert len({id(shard.parameter) for shard in shards}) == len(shards)
    counted = 0
    for shard in shards:
        assert shard.parameter.ds_pipe_replicated == shard.is_tied_copy
        assert shard.parameter.tensor_model_parallel == shard.is_sharded
        if not shard.is_tied_copy and (shard.is_sharded or groups.coordinates.tensor == 0):
            counted += shard.parameter.numel()
    return counted


@pytest.mark.parametrize("position", ["t5", "learned"])
def test_every_weight_is_counted_once_in_the_gradient_norm(position: str) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}
    config = tiny_config(model={"position": position}, parallel=parallel)
    counted = run_distributed(count_in_norm, 4, config)
    assert sum(counted) == total_parameters(config.model, VOCAB)


def preset(name: str) -> tuple[ModelConfig, int]:
    model = ModelConfig.model_validate(yaml.safe_load((MODELS / name).read_text())["model"])
    assert model.vocab_size is not None
    return model, model.vocab_size


def test_the_papers_model_has_1_36_billion_parameters() -> None:
    layers, width, ffn, vocab = 25, 2048, 8192, 51200
    matrices = 4 * width * width + 2 * width * ffn
    biases = 3 * width + width + ffn + width
    norms = 2 * 2 * width
    expected = layers * (matrices + biases + norms) + 2 * width + vocab * width
    model, vocab_size = preset("1p3b.yaml")
    assert total_parameters(model, vocab_size) == expected == 1_363_818_496
    assert model.num_attention_heads == 16
    assert model.activation == "relu"


def test_the_larger_preset_is_a_7b() -> None:
    assert total_parameters(*preset("7b.yaml")) == pytest.approx(6.65e9, rel=5e-3)


def test_the_papers_model_costs_8_81_gflop_per_token() -> None:
    model, vocab_size = preset("1p3b.yaml")
    flops = training_flops_per_token(model, vocab_size, 1024)
    assert flops.full == pytest.approx(8.81e9, rel=1e-3)
    # The two conventions differ by half of the attention, which grows with the length.
    assert flops.full - flops.causal == 6 * 25 * 2048 * 1024
    longer = training_flops_per_token(model, vocab_size, 2048)
    assert longer.full - flops.full == 12 * 25 * 2048 * 1024


def test_looking_up_an_untied_embedding_is_not_counted_as_a_product() -> None:
    tied, vocab_size = preset("1p3b.yaml")
    untied = tied.model_copy(update={"tie_embeddings": False})
    assert total_parameters(untied, vocab_size) - total_parameters(tied, vocab_size) == 51200 * 2048
    assert training_flops_per_token(untied, vocab_size, 1024) == training_flops_per_token(
        tied, vocab_size, 1024
    )
