"""Learnt absolute positions: a table with one row per position, added to the word embeddings."""

import torch
from torch import Tensor, nn

from distributed_lm.config import ModelConfig
from distributed_lm.errors import ConfigError
from distributed_lm.model.positions.base import HeadSlice, PositionMethod


class Learned(PositionMethod):
    """GPT-2's ``wpe``: ``model.max_positions`` rows, counted from 0, and no position past them."""

    embeds_only = True

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        if model.max_positions is None:
            raise ConfigError("model.max_positions: missing; model.position=learned has a row each")
        self.max_positions = self.rows = model.max_positions  # ZeRO 3 takes the table itself away
        self.table = nn.Parameter(torch.zeros(model.max_positions, model.hidden_size))

    def embed(self, hidden_SBD: Tensor, first_position: int) -> Tensor:
        stop = first_position + hidden_SBD.size(0)
        if stop > self.rows:
            raise ConfigError(
                f"model.position=learned has no row for position {stop - 1}: its table ends at "
                f"model.max_positions={self.rows}; use inputs of at most that length"
            )
        return hidden_SBD + self.table[first_position:stop, None, :].to(hidden_SBD.dtype)

    def expected_embedding(self, position: int, hidden_size: int) -> Tensor:
        one_hot = torch.zeros(self.rows, dtype=torch.float64)
        one_hot[position] = 1.0
        return one_hot @ self.table.detach().double().cpu()
