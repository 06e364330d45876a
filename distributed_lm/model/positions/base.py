"""What a position method may do: to embeddings, to queries and keys, and to attention scores.

Shapes: S sequence, B batch, N heads of this rank, H head dim, D hidden, Q queries, K keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distributed_lm.config import ModelConfig

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadSlice:
    """Which of the model's heads this tensor-parallel rank holds: ``first … first + count − 1``."""

    first: int
    count: int
    total: int

    @classmethod
    def of(cls, total: int, rank: int, size: int) -> "HeadSlice":
        count = total // size
        return cls(first=rank * count, count=count, total=total)

    def take(self, values: list[float]) -> list[float]:
        """This rank's part of a list with one entry per head of the whole model."""
        return values[self.first : self.first + self.count]


class PositionMethod(nn.Module):
    """A method that does nothing: tokens are a bag with a causal mask. Override what differs.

    One instance serves all layers of this rank. State that must stay fp32 belongs in plain Python
    attributes, since the engines cast buffers and parameters to the training dtype.

    Weights of its own are parameters of one or two dimensions, used either in ``embed`` (then set
    ``embeds_only``) or on the attention, which works with an fp32 copy (``lending.py``). One with a
    row for each of this rank's heads says so by ``parameter.partition_dim = 0``; any other is the
    same on every rank. So is each stage's copy: gradients are summed over pipeline stages and,
    where they are partial, over tensor-parallel ranks. All start from N(0, ``init_std``²).
    """

    embedding_scale: float = 1.0
    """Factor on the word embeddings before ``embed``."""

    linear_slopes: tuple[float, ...] | None = None
    """Slopes of this rank's heads, if ``bias`` is −m·(i − j): what FlashAttention-2 can do."""

    has_bias: bool = False
    """Whether ``bias`` returns something."""

    has_rotation: bool = False
    """Whether ``rotate`` does something."""

    embeds_only: bool = False
    """Only ``embed`` does something: weights stay on the first pipeline stage."""

    max_positions: int | None = None
    """Longest input that ``embed`` takes, in tokens; None = any."""

    def __init__(self, model: ModelConfig, heads: HeadSlice) -> None:
        super().__init__()
        self.heads = heads

    def drop_weights(self) -> None:
        """For a pipeline stage that does not embed."""
        for module in self.modules():
            for name, _ in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, None)

    def embed(self, hidden_SBD: Tensor, first_position: int) -> Tensor:
        """Add to the (scaled) embeddings of tokens at positions first_position … + S − 1.

        Raises:
            ConfigError: past ``max_positions``.
        """
        return hidden_SBD

    def rotate(
        self, query_SBNH: Tensor, key_SBNH: Tensor, first_query: int
    ) -> tuple[Tensor, Tensor]:
        """Turn queries at positions first_query … and keys at positions 0 … K − 1."""
        return query_SBNH, key_SBNH

    def bias(self, queries: range, num_keys: int, device: torch.device) -> Tensor | None:
        """[N, Q, K] fp32, added to the scaled scores; None adds nothing."""
        return None

    def score_mod(self, first_query: int, num_keys: int, device: torch.device) -> ScoreMod | None:
        """The same bias for FlexAttention, ``(score, batch, head, query, key) -> score`` with
        indices local to this rank and any tensors on ``device``; None where ``bias`` is None or
        cannot be put this way."""
        return None

    def expected_bias(self, head: int, distance: Tensor) -> Tensor:
        """For the start-up proof: the bias of the model's ``head`` (global index) at each
        i − j = ``distance`` (fp64), from the paper's formula and not from the code above."""
        return torch.zeros_like(distance)

    def expected_embedding(self, position: int, hidden_size: int) -> Tensor:
        """For the start-up proof: [D] fp64 that ``embed`` adds at ``position``, independently."""
        return torch.zeros(hidden_size, dtype=torch.float64)

    def expected_rotation(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """For the start-up proof: ``vectors`` [P, H] fp64 turned as ``rotate`` turns queries and
        keys at ``positions`` [P], independently."""
        return vectors
