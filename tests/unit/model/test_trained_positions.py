"""T5's bias and learnt positions against transformers and torch, value by value and gradient by
gradient, and rotary embeddings against transformers' GPT-NeoX and Llama."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, LlamaConfig, T5Config
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.t5.modeling_t5 import T5Attention

from distributed_lm.errors import ConfigError
from distributed_lm.model.positions import HeadSlice, PositionMethod, build_position
from distributed_lm.model.positions.rotary import Rotary, rotary_table
from distributed_lm.model.positions.t5 import t5_buckets
from tests.support.training import tiny_config

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 4, 16


def position_method(name: str, heads: HeadSlice | None = None, **model: object) -> PositionMethod:
    """With weights drawn anew: as built they are zero."""
    config = tiny_config(model={"position": name, **model}).model
    position = build_position(config, heads or HeadSlice(0, HEADS, HEADS))
    generator = torch.Generator().manual_seed(4)
    for weight in position.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return position


def transformers_t5(position: PositionMethod) -> T5Attention:
    """A decoder's first self-attention, with our table in it."""
    config = T5Config(
        num_heads=HEADS, d_kv=HEAD_DIM, d_model=HEADS * HEAD_DIM, is_decoder=True, num_layers=1
    )
    attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    attention.relative_attention_bias.weight.data = position.table.detach().T.clone()
    return attention


def test_t5_buckets_are_those_of_transformers_at_every_distance() -> None:
    count = 200_000
    theirs = T5Attention._relative_position_bucket(
        -torch.arange(count), bidirectional=False, num_buckets=32, max_distance=128
    )
    live = t5_buckets(count, CPU)
    assert torch.equal(live, theirs)
    assert live.unique().tolist() == list(range(32))
    assert live[112:115].tolist() == [30, 31, 31]  # the last bucket starts at 16 · 8^(15/16)


@pytest.mark.parametrize("length", [1, 2, 17, 150, 700])
def test_t5_bias_is_that_of_transformers(length: int) -> None:
    position = position_method("t5")
    [theirs] = transformers_t5(position).compute_bias(length, length).detach()
    causal = torch.ones(length, length).tril().bool()
    live = position.bias(range(length), length, CPU).detach()
    assert live.dtype == torch.float32
    torch.testing.assert_close(live[:, causal], theirs[:, causal], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("first", "stop", "keys"), [(30, 37, 37), (3, 9, 9), (0, 8, 8), (4, 9, 40)]
)
def test_t5_bias_of_some_queries_is_a_slice_of_the_whole(first: int, stop: int, keys: int) -> None:
    position = position_method("t5")
    causal = torch.ones(keys, keys).tril().bool()[first:stop]
    whole = position.bias(range(keys), keys, CPU)[:, first:stop]
    part = position.bias(range(first, stop), keys, CPU)
    assert part.shape == (HEADS, stop - first, keys)
    torch.testing.assert_close(part[:, causal], whole[:, causal], atol=0, rtol=0)


def test_t5_tables_gradient_is_that_of_transformers() -> None:
    length = 300
    position = position_method("t5")
    theirs = transformers_t5(position)
    weights = torch.randn(HEADS, length, length, generator=torch.Generator().manual_seed(2)).tril()
    (theirs.compute_bias(length, length)[0] * weights).sum().backward()
    (position.bias(range(length), length, CPU) * weights).sum().backward()
    expected = theirs.relative_attention_bias.weight.grad.T
    assert (expected.abs() > 1e-3).all()
    torch.testing.assert_close(position.table.grad, expected, atol=1e-3, rtol=1e-4)


def test_t5_score_mod_and_expected_bias_are_the_bias() -> None:
    position = position_method("t5")
    bias = position.bias(range(200, 300), 300, CPU).detach()
    add_bias = position.score_mod(200, 300, CPU)
    for head in range(HEADS):
        for query, key in [(0, 0), (0, 200), (50, 250), (99, 299), (99, 0), (20, 103), (7, 190)]:
            index = [torch.tensor(number) for number in (0, head, query, key)]
            added = add_bias(torch.tensor(0.5), *index).detach() - 0.5
            distance = torch.tensor([200.0 + query - key], dtype=torch.float64)
            assert float(added) == pytest.approx(float(bias[head, query, key]), abs=1e-6)
            assert float(position.expected_bias(head, distance)) == pytest.approx(float(added))


def test_t5_holds_the_rows_of_its_heads_only() -> None:
    part = position_method("t5", HeadSlice.of(8, 1, 2), num_attention_heads=8)
    assert part.table.shape == (4, 32)
    one = torch.ones(1, dtype=torch.float64)
    assert float(part.expected_bias(6, one)) == pytest.approx(float(part.table.detach()[2, 1]))


def draw(queries: int, keys: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query [S, B, N, H] and key [K, B, G, H]."""
    generator = torch.Generator().manual_seed(queries)
    shapes = [(queries, HEADS), (keys, groups)]
    query, key = (
        torch.randn(length, 2, heads, HEAD_DIM, generator=generator) for length, heads in shapes
    )
    return query.to(dtype), key.to(dtype)


def transformers_tables(first: int, stop: int, model: str) -> tuple[Tensor, Tensor]:
    shape = {"hidden_size": HEADS * HEAD_DIM, "num_attention_heads": HEADS}
    ids = torch.arange(first, stop)[None]
    if model == "llama":
        return modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**shape))(torch.zeros(1), ids)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    config = GPTNeoXConfig(**shape, rope_parameters=rope)
    return modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)(torch.zeros(1), ids)


@pytest.mark.parametrize("model", ["gpt_neox", "llama"])
@pytest.mark.parametrize(("queries", "keys", "groups"), [(64, 64, HEADS), (64, 64, 2), (5, 300, 1)])
def test_rotary_is_that_of_transformers(model: str, queries: int, keys: int, groups: int) -> None:
    """Without a permutation of any weight; their angles are fp32."""
    query, key = draw(queries, keys, groups, torch.float32)
    module = modeling_gpt_neox if model == "gpt_neox" else modeling_llama
    live = position_method("rotary").rotate(query, key, keys - queries)
    for index, (tensor, first) in enumerate([(query, keys - queries), (key, 0)]):
        tables = transformers_tables(first, keys, model)
        heads_first = tensor.permute(1, 2, 0, 3)
        expected = module.apply_rotary_pos_emb(heads_first, heads_first, *tables)[0]
        torch.testing.assert_close(live[index].permute(1, 2, 0, 3), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(live[1], key, atol=0.1)


def test_rotary_is_complex_multiplication_and_exact_far_out() -> None:
    position = position_method("rotary")
    far = 100_000
    turned, _ = position.rotate(*draw(3, 1, 1, torch.float32), far)
    query, _ = draw(3, 1, 1, torch.float64)
    expected = position.expected_rotation(query[:, 0, 0], torch.arange(far, far + 3))
    torch.testing.assert_close(turned[:, 0, 0].double(), expected, atol=1e-6, rtol=0)
    half = HEAD_DIM // 2
    for pair in range(half):  # the proof's own formula, written out
        number = complex(query[1, 0, 0, pair], query[1, 0, 0, pair + half])
        angle = (far + 1) * 10000 ** (-2 * pair / HEAD_DIM)
        number *= complex(math.cos(angle), math.sin(angle))
        assert complex(expected[1, pair], expected[1, pair + half]) == pytest.approx(number)


def test_rotary_scores_depend_on_the_distance_only_and_turn_in_fp32() -> None:
    position = position_method("rotary")
    query, key = draw(40, 40, HEADS, torch.float32)
    near = position.rotate(query, key, 0)[0][7, 0, 0] @ position.rotate(query, key, 0)[1][2, 0, 0]
    tables = rotary_table(1007, 1, HEAD_DIM, CPU), rotary_table(1002, 1, HEAD_DIM, CPU)
    assert all(table.dtype == torch.float32 for pair in tables for table in pair)
    far_query = position.rotate(query[7:8], key, 1007)[0][0, 0, 0]
    far_key = position.rotate(key[2:3], key, 1002)[0][0, 0, 0]
    assert float(far_query @ far_key) == pytest.approx(float(near), abs=1e-4)
    turned, _ = position.rotate(query.bfloat16(), key.bfloat16(), 5000)
    assert turned.dtype == torch.bfloat16
    exact, _ = position.rotate(query.bfloat16().float(), key, 5000)
    torch.testing.assert_close(turned, exact.bfloat16(), atol=0, rtol=0)


def test_rotary_needs_pairs() -> None:
    config = tiny_config(model={"hidden_size": 12, "num_attention_heads": 4}).model
    with pytest.raises(ConfigError, match=r"model\.num_attention_heads = 3 entries.*even"):
        Rotary(config, HeadSlice(0, 4, 4))


def test_learned_is_an_embedding_of_positions() -> None:
    position = position_method("learned", max_positions=50)
    theirs = nn.Embedding(50, 64)
    theirs.weight.data = position.table.detach().clone()
    hidden = torch.randn(20, 3, 64, generator=torch.Generator().manual_seed(0))
    live = position.embed(hidden, 30)
    expected = hidden + theirs(torch.arange(30, 50))[:, None, :]
    torch.testing.assert_close(live, expected, atol=0, rtol=0)
    live.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(position.table.grad, theirs.weight.grad)
    assert float(position.table.grad[:30].abs().max()) == 0.0


@pytest.mark.parametrize(("first", "length"), [(0, 51), (31, 20), (50, 1)])
def test_learned_refuses_what_is_past_its_table(first: int, length: int) -> None:
    position = position_method("learned", max_positions=50)
    with pytest.raises(ConfigError, match=rf"position {first + length - 1}: .*max_positions=50"):
        position.embed(torch.zeros(length, 1, 64), first)
