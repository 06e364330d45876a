"""Rotary embeddings: queries and keys turned by their positions, nothing added anywhere."""

import functools

import torch
from torch import Tensor

from distributed_lm.config import ModelConfig
from distributed_lm.errors import ConfigError
from distributed_lm.model.positions.base import HeadSlice, PositionMethod

BASE = 10000.0


class Rotary(PositionMethod):
    """Su et al. 2021 (RoFormer), §3.2, over the whole head: at position p, entries k and k + H/2
    turn as one complex number by p · 10000^(−2k/H). Pairing the halves of a head, not neighbours,
    is GPT-NeoX's layout, so weights go to its class (and Llama's) as they are."""

    has_rotation = True

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        if model.head_dim % 2:
            raise ConfigError(
                f"model.position=rotary turns pairs, and a head has model.hidden_size / "
                f"model.num_attention_heads = {model.head_dim} entries; choose an even number"
            )

    def rotate(
        self, query_SBNH: Tensor, key_KBGH: Tensor, first_query: int
    ) -> tuple[Tensor, Tensor]:
        return _turn(query_SBNH, first_query), _turn(key_KBGH, 0)

    def expected_rotation(self, vectors: Tensor, positions: Tensor) -> Tensor:
        half = vectors.size(-1) // 2
        exponents = torch.arange(half, dtype=torch.float64) / half
        angles = positions.double()[:, None] * torch.pow(BASE, -exponents)
        pairs = torch.complex(vectors[..., :half], vectors[..., half:])
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)


def _turn(vectors_SBNH: Tensor, first_position: int) -> Tensor:
    """In fp32 whatever the dtype: a bf16 angle is off by radians at position 1,000."""
    length, head_dim = vectors_SBNH.size(0), vectors_SBNH.size(-1)
    cosines, sines = rotary_table(first_position, length, head_dim, vectors_SBNH.device)
    first, second = vectors_SBNH.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return turned.to(vectors_SBNH.dtype)


@functools.lru_cache(maxsize=8)
def rotary_table(
    first: int, length: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, 1, 1, H/2] fp32 of positions first … first + length − 1.

    Kept: every layer asks for the same.
    """
    # Angles in fp64: in fp32 they are off by 1e-3 rad at position 16,384.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    positions = torch.arange(first, first + length, dtype=torch.float64, device=device)
    angles = (positions[:, None] * torch.pow(BASE, -exponents))[:, None, None, :]
    return angles.cos().float(), angles.sin().float()
