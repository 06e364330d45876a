"""The start-up proof passes on the real model and fails on every known way to get ALiBi wrong."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model import gpt
from distributed_lm.model.positions import METHODS
from distributed_lm.model.positions.alibi import Alibi
from distributed_lm.model.positions.base import HeadSlice
from distributed_lm.model.proof import prove_positions
from distributed_lm.process_groups import Process
from tests.distributed.test_parity import CUSTOM
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, build_engine, tiny_config

HEADS = {"num_attention_heads": 8, "hidden_size": 128}


def prove(config: RunConfig) -> dict[str, Any]:
    """Through the DeepSpeed engine, which casts what it can reach."""
    engine, groups = build_engine(config)
    return vars(prove_positions(engine.stages, groups))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("position", [*sorted(METHODS), CUSTOM])
def test_real_model_is_proved_with_one_fingerprint_at_any_layout(
    position: str, precision: str
) -> None:
    model = {**HEADS, "position": position}
    [serial] = run_distributed(prove, 1, tiny_config(model=model, precision=precision))
    sharded = run_distributed(
        prove, 2, tiny_config(model=model, precision=precision, parallel={"tensor": 2})
    )
    assert serial["largest_error"] < serial["tolerance"] / 2
    assert {result["fingerprint"] for result in sharded} == {serial["fingerprint"]}


def test_grouped_queries_and_odd_head_counts_are_proved() -> None:
    model = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192}
    [proof] = run_distributed(prove, 1, tiny_config(model=model))
    assert proof["largest_error"] < proof["tolerance"]


def local_slopes(position: Alibi) -> None:
    """The bug of BigScience #227: slopes from the local head count."""
    alone = HeadSlice(0, position.heads.count, position.heads.count)
    position.linear_slopes = Alibi(tiny_config().model, alone).linear_slopes


def flipped_sign(position: Alibi) -> None:
    position.linear_slopes = tuple(-slope for slope in position.linear_slopes)


def scaled_bias(position: Alibi) -> None:
    head_dim = HEADS["hidden_size"] // HEADS["num_attention_heads"]
    position.linear_slopes = tuple(slope / math.sqrt(head_dim) for slope in position.linear_slopes)


def bf16_distances(position: Alibi) -> None:
    def bias(queries: range, num_keys: int, device: torch.device) -> torch.Tensor:
        rows = torch.arange(queries.start, queries.stop)[:, None]
        distance = (rows - torch.arange(num_keys)[None, :]).bfloat16().float()
        return -position.slopes(device)[:, None, None] * distance

    position.bias = bias


def bf16_bias(position: Alibi) -> None:
    exact = position.bias
    position.bias = lambda *arguments: exact(*arguments).bfloat16().float()


def off_by_one_distance(position: Alibi) -> None:
    """Invisible to softmax if every key is off; here only the far ones are."""
    exact = position.bias
    position.bias = lambda *arguments: (lambda b: torch.where(b < -4, b - 0.5, b))(
        exact(*arguments)
    )


SABOTAGES: list[Callable[[Alibi], None]] = [
    local_slopes,
    flipped_sign,
    scaled_bias,
    bf16_distances,
    bf16_bias,
    off_by_one_distance,
]


def prove_sabotaged(config: RunConfig, sabotage: Callable[[Alibi], None]) -> str:
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    stages = gpt.build_stages(config, VOCAB, groups)
    sabotage(stages[0].position)
    with pytest.raises(Exception, match="differs from the reference") as caught:
        prove_positions(stages, groups)
    return str(caught.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda function: function.__name__)
def test_sabotage_is_caught_on_every_rank(
    sabotage: Callable[[Alibi], None], precision: str
) -> None:
    config = tiny_config(model=HEADS, precision=precision, parallel={"tensor": 2})
    messages = run_distributed(prove_sabotaged, 2, config, sabotage)
    assert len(messages) == 2
    assert "head" in messages[0]
    assert "distance" in messages[0]
