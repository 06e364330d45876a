"""The start-up proof passes on the real model and fails on every known way to get ALiBi wrong."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model import gpt
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.positions import METHODS, PositionMethod
from distributed_lm.model.positions.alibi import Alibi
from distributed_lm.model.positions.base import HeadSlice
from distributed_lm.model.positions.rotary import rotary_table
from distributed_lm.model.proof import prove_positions
from distributed_lm.process_groups import Process
from tests.distributed.test_parity import CUSTOM, CUSTOM_TRAINED
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, build_engine, random_microbatches, tiny_config

HEADS = {"num_attention_heads": 8, "hidden_size": 128}


def prove(config: RunConfig) -> dict[str, Any]:
    """Through the DeepSpeed engine, which casts what it can reach."""
    engine, groups = build_engine(config)
    return vars(prove_positions(engine.stages, groups))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("position", [*sorted(METHODS), CUSTOM, CUSTOM_TRAINED])
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
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    sabotage(stages[0].lent_position.copy)
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


def turn(vectors: torch.Tensor, positions: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Right, if positions are and ``base`` is: to be got wrong below."""
    head_dim = vectors.size(-1)
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = (positions.double()[:, None] * frequencies)[:, None, None, :]
    first, second = vectors.double().chunk(2, dim=-1)
    cosines, sines = angles.cos(), angles.sin()
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return torch.cat(turned, dim=-1).to(vectors.dtype)


def places(vectors: torch.Tensor, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + vectors.size(0))


def as_it_should_be(position: PositionMethod) -> None:
    """No sabotage: or those below could be caught for what they have in common."""
    position.rotate = lambda q, k, first: (turn(q, places(q, first)), turn(k, places(k)))


def other_base(position: PositionMethod) -> None:
    position.rotate = lambda q, k, first: (
        turn(q, places(q, first), 9000.0),
        turn(k, places(k), 9000.0),
    )


def backwards(position: PositionMethod) -> None:
    position.rotate = lambda q, k, first: (turn(q, -places(q, first)), turn(k, -places(k)))


def queries_only(position: PositionMethod) -> None:
    position.rotate = lambda q, k, first: (turn(q, places(q, first)), k)


def bf16_positions(position: PositionMethod) -> None:
    position.rotate = lambda q, k, first: (
        turn(q, places(q, first).bfloat16()),
        turn(k, places(k).bfloat16()),
    )


def neighbours_as_pairs(position: PositionMethod) -> None:
    """GPT-J's layout in place of GPT-NeoX's."""

    def interleaved(vectors: torch.Tensor, first: int) -> torch.Tensor:
        tables = rotary_table(first, vectors.size(0), vectors.size(-1), vectors.device)
        cosines, sines = (table.to(vectors.dtype) for table in tables)
        even, odd = vectors[..., ::2], vectors[..., 1::2]
        turned = torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1)
        return turned.flatten(-2)

    position.rotate = lambda q, k, first: (interleaved(q, first), interleaved(k, 0))


def scaled_table(position: PositionMethod) -> None:
    exact = position.bias
    position.bias = lambda *arguments: exact(*arguments) / math.sqrt(16)


def another_heads_row(position: PositionMethod) -> None:
    exact = position.bias
    position.bias = lambda *arguments: exact(*arguments).roll(1, dims=0)


def bucket_of_the_next_distance(position: PositionMethod) -> None:
    exact = position._by_distance
    position._by_distance = lambda count, device: exact(count + 1, device)[:, 1:]


def row_of_the_next_position(position: PositionMethod) -> None:
    position.embed = lambda hidden, first: hidden + position.table[first + 1].to(hidden.dtype)


METHOD_SABOTAGES: list[tuple[str, Callable[[PositionMethod], None]]] = [
    ("rotary", other_base),
    ("rotary", backwards),
    ("rotary", queries_only),
    ("rotary", bf16_positions),
    ("rotary", neighbours_as_pairs),
    ("t5", scaled_table),
    ("t5", another_heads_row),
    ("t5", bucket_of_the_next_distance),
    ("learned", row_of_the_next_position),
]


@pytest.mark.parametrize(
    ("method", "sabotage"), METHOD_SABOTAGES, ids=lambda value: getattr(value, "__name__", value)
)
def test_sabotage_of_other_methods_is_caught_in_bf16(
    method: str, sabotage: Callable[[PositionMethod], None]
) -> None:
    config = tiny_config(model={**HEADS, "position": method}, precision="bf16")
    [message] = run_distributed(prove_sabotaged, 1, config, sabotage)
    assert ("position embedding" if method == "learned" else "distance") in message


def prove_replaced(config: RunConfig, replace: Callable[[PositionMethod], None]) -> float:
    engine, groups = build_engine(config)
    replace(engine.stages[0].position)
    return prove_positions(engine.stages, groups).largest_error


def test_another_right_rotation_is_proved() -> None:
    config = tiny_config(model={**HEADS, "position": "rotary"}, precision="bf16")
    [error] = run_distributed(prove_replaced, 1, config, as_it_should_be)
    assert error < 1e-2


def prove_then_train(config: RunConfig) -> list[float]:
    """Losses: the proof must leave no trace, also where ZeRO 3 has taken the weights apart."""
    engine, groups = build_engine(config)
    prove_positions(engine.stages, groups)
    batches = [random_microbatches(config, groups, step) for step in range(3)]
    return [engine.train_step(batch, 1e-2).loss for batch in batches]


@pytest.mark.parametrize("position", ["t5", "learned"])
def test_proof_of_partitioned_weights_leaves_them_as_they_were(position: str) -> None:
    """4,096 × 64 numbers are more than ZeRO 3 keeps whole."""
    model = {"position": position, "max_positions": 4096}
    [plain] = run_distributed(prove_then_train, 1, tiny_config(model=model, zero={"stage": 0}))
    config = tiny_config(model=model, zero={"stage": 3})
    for losses in run_distributed(prove_then_train, 2, config):
        np.testing.assert_allclose(losses, plain, rtol=5e-6)
