"""Compiled layers compute what plain ones do, in one graph each, compiled once."""

from typing import Any

import numpy as np
import pytest
import torch

from distributed_lm.config import RunConfig, check_config
from distributed_lm.errors import ConfigError
from distributed_lm.model.compilation import wants_compilation
from tests.support.ranks import run_distributed
from tests.support.training import build_engine, random_microbatches, tiny_config


def train(config: RunConfig, steps: int) -> dict[str, Any]:
    """Two steps to warm up, with an evaluation at twice the length after each, then the rest."""
    from torch._dynamo.utils import counters

    engine, groups = build_engine(config)
    longer = config.model_copy(
        update={"data": config.data.model_copy(update={"sequence_length": 64})}
    )
    results, evaluations, graphs = [], [], []
    for step in range(steps):
        results.append(engine.train_step(random_microbatches(config, groups, step), 1e-3))
        evaluations.append(engine.evaluate(random_microbatches(longer, groups, step)))
        graphs.append(counters["stats"]["unique_graphs"])
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "evaluations": evaluations,
        "graphs": graphs,
        "breaks": dict(counters["graph_break"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        pytest.param(
            1, {"model": {"activation": "relu"}, "train": {"recompute": "full"}}, id="recompute"
        ),
        pytest.param(
            2,
            {"model": {"num_layers": 4}, "parallel": {"pipeline": 2}, "precision": "bf16"},
            id="pipeline",
        ),
    ],
)
def test_compiled_equals_plain_and_compiles_once(world_size: int, sections: dict[str, Any]) -> None:
    plain, compiled = (
        run_distributed(
            train,
            world_size,
            tiny_config(**{**sections, "train": {**sections.get("train", {}), "compile": chosen}}),
            4,
        )[0]
        for chosen in (False, True)
    )
    tolerance = {"fp32": 5e-6, "bf16": 2e-3}[sections.get("precision", "fp32")]
    for name in ("losses", "evaluations"):
        np.testing.assert_allclose(compiled[name], plain[name], rtol=tolerance)
    np.testing.assert_allclose(compiled["grad_norms"], plain["grad_norms"], rtol=20 * tolerance)
    assert plain["graphs"][-1] == 0
    assert compiled["graphs"][1] > 0
    assert compiled["graphs"][1:] == compiled["graphs"][1:2] * 3, "compiled again after warm-up"
    assert compiled["breaks"] == {}


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tensor": 2}},
        {"zero": {"stage": 3}},
        {"train": {"recompute": "selective"}},
        {"model": {"dropout": {"hidden": 0.1}}},
    ],
)
def test_what_cannot_be_compiled_is_said(sections: dict[str, Any]) -> None:
    asked = {**sections, "train": {**sections.get("train", {}), "compile": True}}
    with pytest.raises(ConfigError, match=r"^train\.compile=true: .*; set train\.compile=auto$"):
        check_config(tiny_config(**asked))
    automatic = tiny_config(**sections)
    check_config(automatic)
    assert not wants_compilation(automatic, torch.device("cuda"))


def test_auto_compiles_on_a_gpu_only() -> None:
    assert wants_compilation(tiny_config(), torch.device("cuda"))
    assert not wants_compilation(tiny_config(), torch.device("cpu"))
