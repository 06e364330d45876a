"""The baseline's position embeddings against fairseq's formula written out and others' code."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.xglm.modeling_xglm import XGLMSinusoidalPositionalEmbedding

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.positions import HeadSlice, build_position
from distributed_lm.model.positions.sinusoidal import sinusoidal_table
from distributed_lm.process_groups import Process
from tests.support.ranks import run_distributed
from tests.support.training import VOCAB, tiny_config

PADDING_INDEX = 1  # of fairseq's dictionary; its positions count from the next integer
CPU = torch.device("cpu")
WIDTHS = [4, 7, 64, 65]


def fairseq_row(position: int, width: int) -> list[float]:
    """``SinusoidalPositionalEmbedding.get_embedding`` of fairseq, entry by entry: the row of the
    token at ``position``, counted from 0, in a sequence without padding."""
    half = width // 2
    decay = math.log(10000) / (half - 1)
    angles = [(PADDING_INDEX + 1 + position) * math.exp(-decay * index) for index in range(half)]
    row = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return row + [0.0] * (width % 2)


def fairseq_table(first: int, length: int, width: int) -> Tensor:
    rows = [fairseq_row(position, width) for position in range(first, first + length)]
    return torch.tensor(rows, dtype=torch.float64)


def sinusoidal(**model: Any) -> Any:
    config = tiny_config(model={"position": "sinusoidal", **model}).model
    return build_position(config, HeadSlice.of(config.num_attention_heads, 0, 1))


def assert_close(live: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(live.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("first", [0, 1, 31, 16_000])
def test_table_is_fairseqs_formula_from_any_first_position(first: int, width: int) -> None:
    table = sinusoidal_table(first, 40, width, CPU)
    assert table.dtype == torch.float32
    assert_close(table, fairseq_table(first, 40, width))


def test_first_token_has_position_2() -> None:
    """padding_idx + 1: sin 2 and cos 2 at the highest frequency, and the last one 10,000 slower."""
    [first] = sinusoidal_table(0, 1, 8, CPU).tolist()
    assert first[0] == pytest.approx(0.9092974)
    assert first[4] == pytest.approx(-0.4161468)
    assert first[3] == pytest.approx(2e-4)


def test_odd_width_ends_in_zeros() -> None:
    table = sinusoidal_table(0, 50, 65, CPU)
    assert (table[:, 64] == 0).all()
    assert (table[:, :64] != 0).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_table_is_that_of_the_fairseq_models_in_transformers(width: int) -> None:
    """Their rows are positions as fairseq counts them; their angles are fp32."""
    theirs = XGLMSinusoidalPositionalEmbedding.get_embedding(202, width, PADDING_INDEX)
    live = sinusoidal_table(0, 200, width, CPU)
    torch.testing.assert_close(live, theirs[PADDING_INDEX + 1 :], rtol=0, atol=5e-5)


@pytest.mark.parametrize("times", [1, 4, 5, 16])
def test_any_length_after_a_short_first_call(times: int) -> None:
    """A table sized at the first call would be too short, or its values would move."""
    position, length = sinusoidal(), 32
    position.embed(torch.zeros(length, 1, 64), 0)
    live = position.embed(torch.zeros(times * length, 1, 64), 0)
    assert_close(live[:, 0], fairseq_table(0, times * length, 64))
    again = position.embed(torch.zeros(length, 1, 64), (times - 1) * length)
    torch.testing.assert_close(again, live[-length:], rtol=0, atol=0)


def test_embed_adds_the_row_of_its_position_to_every_sequence() -> None:
    hidden_SBD = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
    added = sinusoidal().embed(hidden_SBD, 7) - hidden_SBD
    for sequence in range(3):
        assert_close(added[:, sequence], fairseq_table(7, 5, 64))


def test_the_proofs_own_formula_is_fairseqs() -> None:
    position = sinusoidal()
    for place, width in ((0, 64), (1, 64), (5000, 64), (3, 65)):
        expected = torch.tensor(fairseq_row(place, width), dtype=torch.float64)
        torch.testing.assert_close(
            position.expected_embedding(place, width), expected, rtol=0, atol=1e-9
        )


TOKENS = torch.randint(0, VOCAB, (3, 32), generator=torch.Generator().manual_seed(5))


def embed(config: RunConfig) -> dict[str, np.ndarray]:
    """What the first stage gives its first layer: [S, B, D], whole again; and its embedding."""
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    [stage] = build_stages(config, VOCAB, groups)
    initialize_weights(parameter_shards([stage], groups), config.model, config.seed)
    with torch.no_grad():
        hidden = stage._embed(TOKENS)
    if config.parallel.sequence:
        parts = [torch.empty_like(hidden) for _ in range(groups.layout.tensor)]
        torch.distributed.all_gather(parts, hidden, group=groups.tensor)
        assert {part.size(0) for part in parts} == {TOKENS.size(1) // groups.layout.tensor}
        hidden = torch.cat(parts)
    return {"hidden": hidden.numpy(), "words": stage.embedding.weight.detach().numpy()}


@pytest.fixture(scope="module")
def serial() -> dict[str, np.ndarray]:
    return run_distributed(embed, 1, tiny_config(model={"position": "sinusoidal"}))[0]


def test_built_stage_scales_words_by_sqrt_width_and_adds_the_table(
    serial: dict[str, np.ndarray],
) -> None:
    words_SBD = torch.from_numpy(serial["words"])[TOKENS].transpose(0, 1).double()
    expected = 8.0 * words_SBD + fairseq_table(0, 32, 64)[:, None, :]  # √64
    assert float(words_SBD.abs().max()) > 0.01  # or the factor would not show
    assert_close(torch.from_numpy(serial["hidden"]), expected)


@pytest.mark.parametrize("sequence", [False, True])
def test_split_stage_embeds_as_the_whole_one(serial: dict[str, np.ndarray], sequence: bool) -> None:
    """With sequence parallelism the second rank's first token is in the middle of the sequence."""
    split = {"tensor": 2, "sequence": sequence}
    config = tiny_config(model={"position": "sinusoidal"}, parallel=split)
    for result in run_distributed(embed, 2, config):
        np.testing.assert_array_equal(result["hidden"], serial["hidden"])
