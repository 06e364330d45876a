"""Attention with linear biases: −m·(i − j) on the scores, nothing on the embeddings."""

import torch
from torch import Tensor

from distributed_lm.config import ModelConfig
from distributed_lm.model.alibi import alibi_bias, alibi_slopes, slopes_tensor
from distributed_lm.model.positions.base import HeadSlice, PositionMethod, ScoreMod


class Alibi(PositionMethod):
    """Press, Smith and Lewis 2022, §3. Each rank holds its slopes by global head index."""

    has_bias = True

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        self.linear_slopes = tuple(heads.take(alibi_slopes(heads.total)))

    def slopes(self, device: torch.device) -> Tensor:
        """[N] fp32."""
        return slopes_tensor(self.linear_slopes, device)

    def bias(self, queries: range, num_keys: int, device: torch.device) -> Tensor:
        return alibi_bias(self.slopes(device), queries, num_keys)

    def score_mod(self, first_query: int, num_keys: int, device: torch.device) -> ScoreMod:
        first_head, total = self.heads.first, self.heads.total
        slopes = self.slopes(device)

        def add_computed(
            score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            slope = torch.exp2((head + (first_head + 1)) * (-8.0 / total))
            return score - slope * (query + first_query - key)

        def add_looked_up(
            score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            return score - slopes[head] * (query + first_query - key)

        # A kernel that looks nothing up can work on several scores at once. The slopes of a power
        # of two heads are one geometric sequence; those of other counts have no such short formula.
        is_geometric = total & (total - 1) == 0
        return add_computed if is_geometric else add_looked_up

    def expected_bias(self, head: int, distance: Tensor) -> Tensor:
        power = 1 << (self.heads.total.bit_length() - 1)
        if head < power:
            exponent = -8.0 * (head + 1) / power
        else:  # every second slope of twice that power, from the first on
            exponent = -8.0 * (2 * (head - power) + 1) / (2 * power)
        return -(2.0**exponent) * distance
