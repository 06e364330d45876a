"""T5's relative bias: a learnt number for each head and bucket of distances, in all layers."""

import functools
import math

import torch
from torch import Tensor, nn

from distributed_lm.config import T5_BUCKETS, T5_MAX_DISTANCE, ModelConfig
from distributed_lm.model.positions.base import HeadSlice, PositionMethod, ScoreMod


class T5(PositionMethod):
    """Raffel et al. 2020, §2.1, in its causal form, added to the scaled scores in fp32.

    The table is [N, buckets]: each tensor-parallel rank holds the rows of its heads.
    """

    has_bias = True

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__(model, heads)
        self.table = nn.Parameter(torch.zeros(heads.count, T5_BUCKETS))
        self.table.partition_dim = 0  # type: ignore[attr-defined]

    def bias(self, queries: range, num_keys: int, device: torch.device) -> Tensor:
        # Key 0 of the last query is farthest. Flipped, entry t of a row is of the distance
        # farthest − t, and a window of ``num_keys`` entries is one query's row of the bias; those
        # past distance 0 are above the diagonal, and masked. Gathering [N, Q, K] numbers one by one
        # takes many times longer, in backward most of all.
        farthest = queries.stop - 1
        values_NT = self._by_distance(queries.stop, device).flip(1)
        above = num_keys - 1 - queries.start
        values_NT = nn.functional.pad(values_NT, (0, max(0, above)))
        return values_NT.unfold(1, num_keys, 1)[:, : farthest - queries.start + 1].flip(1)

    def score_mod(self, first_query: int, num_keys: int, device: torch.device) -> ScoreMod:
        # By distance and not by bucket: in backward each score adds to the number it was given, and
        # most scores of a long input share the last bucket.
        values_ND = self._by_distance(num_keys, device)

        def add_bias(
            score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            distance = (query + first_query - key).clamp(min=0, max=num_keys - 1)
            return score + values_ND[head, distance]

        return add_bias

    def expected_bias(self, head: int, distance: Tensor) -> Tensor:
        row = self.table[head - self.heads.first].detach().double().cpu()
        exact = T5_BUCKETS // 2
        # Bucket exact + n begins at exact · (longest / exact)^(n / exact).
        starts = list(range(exact))
        starts += [exact * (T5_MAX_DISTANCE / exact) ** (n / exact) for n in range(exact)]
        edges = torch.tensor(starts, dtype=torch.float64)
        return row[torch.searchsorted(edges, distance.double().contiguous(), right=True) - 1]

    def _by_distance(self, count: int, device: torch.device) -> Tensor:
        """[N, count] fp32: the bias at distances 0 … count − 1."""
        return self.table.float()[:, t5_buckets(count, device)]


@functools.lru_cache(maxsize=8)
def t5_buckets(count: int, device: torch.device) -> Tensor:
    """[count] int64: the buckets of distances 0 … count − 1.

    Half of the buckets are one distance each; the others widen as the logarithm does up to the
    longest distance, and the last takes everything past it (``_relative_position_bucket`` of
    transformers' T5, ``bidirectional=False``, after Mesh TensorFlow).
    """
    exact = T5_BUCKETS // 2
    distances = torch.arange(count)  # on the CPU: a GPU may round a logarithm the other way
    ratio = torch.log(distances.clamp(min=1).float() / exact) / math.log(T5_MAX_DISTANCE / exact)
    wide = (exact + (ratio * (T5_BUCKETS - exact)).long()).clamp(max=T5_BUCKETS - 1)
    return torch.where(distances < exact, distances, wide).to(device)
