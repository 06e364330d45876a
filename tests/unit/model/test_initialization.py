"""Initial weights by fairseq's rules, against the calls that fairseq makes of torch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.process_groups import Process
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, tiny_config
from tests.support.wikitext import ADAPTIVE

WIDTH, FFN = 64, 256


def draw_all(config: RunConfig) -> dict[str, np.ndarray]:
    groups = process_groups.start(config, Process.from_environment(), Layout(1, 1, 1, 1, False))
    shards = parameter_shards(build_stages(config, VOCAB, groups), groups)
    initialize_weights(shards, config.model, config.seed)
    return {shard.pieces[0].name: shard.parameter.detach().numpy() for shard in shards}


def fairseqs() -> dict[str, torch.Tensor]:
    """Each kind of weight, drawn by the calls that fairseq makes."""
    found: dict[str, torch.Tensor] = {}
    for name in ("query", "key", "value"):
        linear = nn.Linear(WIDTH, WIDTH)
        nn.init.xavier_uniform_(linear.weight, gain=1 / math.sqrt(2))
        found[name], found[name + ".bias"] = linear.weight, linear.bias
    output = nn.Linear(WIDTH, WIDTH)
    nn.init.xavier_uniform_(output.weight)
    nn.init.constant_(output.bias, 0.0)
    up, down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)
    layer = "decoder.layers.1."
    kinds = {
        f"{layer}self_attention.linear_qkv.weight": torch.cat(
            [found[name] for name in ("query", "key", "value")]
        ),
        f"{layer}self_attention.linear_qkv.bias": torch.cat(
            [found[name + ".bias"] for name in ("query", "key", "value")]
        ),
        f"{layer}self_attention.linear_proj.weight": output.weight,
        f"{layer}self_attention.linear_proj.bias": output.bias,
        f"{layer}mlp.linear_fc1.weight": up.weight,
        f"{layer}mlp.linear_fc1.bias": up.bias,
        f"{layer}mlp.linear_fc2.weight": down.weight,
        f"{layer}mlp.linear_fc2.bias": down.bias,
        f"{layer}input_layernorm.weight": torch.ones(WIDTH),
        f"{layer}input_layernorm.bias": torch.zeros(WIDTH),
        "output_layer.classes.weight": nn.init.xavier_uniform_(torch.empty(2, WIDTH)),
    }
    for band, (words, width) in enumerate([(64, 64), (64, 32), (64, 16)]):
        rows = nn.init.normal_(torch.empty(words, width), std=width**-0.5)
        projection = nn.init.xavier_uniform_(torch.empty(WIDTH, width))
        kinds[f"embedding.bands.{band}.weight"] = rows
        kinds[f"embedding.projections.{band}.weight"] = projection
    return kinds


@pytest.mark.parametrize("position", ["alibi", "t5"])
def test_weights_start_as_fairseqs(position: str) -> None:
    model: dict[str, Any] = {**ADAPTIVE, "position": position, "vocab_size": VOCAB}
    [weights] = run_distributed(draw_all, 1, tiny_config(model=model))
    torch.manual_seed(3)
    for name, expected in fairseqs().items():
        found, like = weights[name], expected.detach().numpy()
        assert found.shape == like.shape, name
        few = 4.0 / math.sqrt(found.size)  # four standard errors and more of these figures
        assert found.std() == pytest.approx(like.std(), rel=few, abs=1e-9), name
        assert abs(found.mean() - like.mean()) <= few * like.std() + 1e-9, name
        if "bands" in name:  # normal: a uniform one ends at √3 standard deviations
            assert np.abs(found).max() > 2.5 * like.std(), name
        else:
            assert np.abs(found).max() == pytest.approx(np.abs(like).max(), rel=0.1), name
    if position == "t5":  # fairseq has none
        [table] = [values for name, values in weights.items() if name.startswith("position.")]
        assert table.std() == pytest.approx(0.02, rel=0.2)
