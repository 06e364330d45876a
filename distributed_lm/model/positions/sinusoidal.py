"""Sinusoidal embeddings as fairseq adds them: the paper's baseline."""

import math

import torch
from torch import Tensor

from distributed_lm.config import ModelConfig
from distributed_lm.errors import ConfigError
from distributed_lm.model.positions.base import HeadSlice, PositionMethod

# fairseq counts positions from padding_idx + 1, and its padding index is 1.
FIRST_POSITION = 2


class Sinusoidal(PositionMethod):
    """Word embeddings times √D, plus sines in the first half of the width and cosines in the
    second, with wavelengths from 2π to 10000·2π (fairseq ``SinusoidalPositionalEmbedding``)."""

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        if model.hidden_size < 4:
            raise ConfigError(
                f"model.hidden_size={model.hidden_size} is too narrow for sines and cosines of two "
                "wavelengths; use at least 4, or another model.position"
            )
        self.embedding_scale = math.sqrt(model.hidden_size)

    def embed(self, hidden_SBD: Tensor, first_position: int) -> Tensor:
        length, _, width = hidden_SBD.shape
        table_SD = sinusoidal_table(first_position, length, width, hidden_SBD.device)
        return hidden_SBD + table_SD[:, None, :].to(hidden_SBD.dtype)

    def expected_embedding(self, position: int, hidden_size: int) -> Tensor:
        half = hidden_size // 2
        angles = [
            (position + FIRST_POSITION) * 10000.0 ** (-index / (half - 1)) for index in range(half)
        ]
        values = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        values += [0.0] * (hidden_size - 2 * half)
        return torch.tensor(values, dtype=torch.float64)


def sinusoidal_table(first: int, length: int, width: int, device: torch.device) -> Tensor:
    """[length, width] fp32: positions first … first + length − 1."""
    half = width // 2
    # Angles in fp64: in fp32 they are off by 1e-3 rad at position 16,384.
    step = math.log(10000.0) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64, device=device) * -step)
    positions = torch.arange(first, first + length, dtype=torch.float64, device=device)
    angles = (positions + FIRST_POSITION)[:, None] * frequencies[None, :]
    table = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
    return torch.nn.functional.pad(table, (0, width - 2 * half)).to(torch.float32)
