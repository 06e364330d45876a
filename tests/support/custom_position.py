"""Position methods of a user, in a file of his own: the logarithmic bias of KERPLE, as a constant
and learnt."""

import math

import torch
from torch import Tensor, nn

from distributed_lm.config import ModelConfig
from distributed_lm.model.positions import HeadSlice, PositionMethod


class LogarithmicBias(PositionMethod):
    """−r·log(1 + i − j), with r = 1, 2, 3, … by global head index (Chi et al. 2022, §4)."""

    has_bias = True

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        self.rates = heads.take([1.0 + head for head in range(heads.total)])

    def bias(self, queries: range, num_keys: int, device: torch.device) -> Tensor:
        rows = torch.arange(queries.start, queries.stop, device=device)[:, None]
        distance = (rows - torch.arange(num_keys, device=device)).clamp(min=0)
        return -torch.tensor(self.rates, device=device)[:, None, None] * distance.float().log1p()

    def expected_bias(self, head: int, distance: Tensor) -> Tensor:
        return -(head + 1) * torch.log1p(distance)


class TrainedLogarithmicBias(PositionMethod):
    """−r·log(1 + s·(i − j)) with r of each head, and here one s for all of them, learnt (ibid.)."""

    has_bias = True

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        self.rates = nn.Parameter(torch.zeros(heads.count))
        self.rates.partition_dim = 0  # type: ignore[attr-defined]
        self.scale = nn.Parameter(torch.zeros(1))

    def bias(self, queries: range, num_keys: int, device: torch.device) -> Tensor:
        rows = torch.arange(queries.start, queries.stop, device=device)[:, None]
        distance = (rows - torch.arange(num_keys, device=device)).clamp(min=0)
        growth = torch.log1p(self.scale.float().exp() * distance.float())
        return -self.rates.float().exp()[:, None, None] * growth

    def expected_bias(self, head: int, distance: Tensor) -> Tensor:
        rate = math.exp(float(self.rates[head - self.heads.first]))
        return -rate * torch.log1p(math.exp(float(self.scale)) * distance)
