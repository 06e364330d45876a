"""The shape of a model, and what all sections of a config file have in common."""

from itertools import pairwise
from typing import Annotated, Literal

import pydantic
from pydantic import Field

Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
DropoutRate = Annotated[float, Field(ge=0.0, lt=1.0)]

# The relative bias of T5 (Raffel et al. 2020, §2.1): buckets of distances, and the distance from
# which on all share the last.
T5_BUCKETS = 32
T5_MAX_DISTANCE = 128


class Section(pydantic.BaseModel):
    """One block of a config file. Unknown keys are errors; values do not change after loading."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class AdaptiveConfig(Section):
    """Words in bands by frequency, rarer ones narrower (Baevski and Auli 2019), tied with an
    adaptive softmax over the same bands (Grave et al. 2017). Token ids must be sorted by frequency,
    as ``prepare-data --tokenizer words`` does."""

    cutoffs: Annotated[tuple[Count, ...], Field(min_length=1)]
    """First token id of every band after the first, ascending."""
    factor: Annotated[int, Field(ge=2)] = 4
    """A band's embeddings are this many times narrower than those of the band before it."""
    dropout: DropoutRate = 0.0
    """In the softmax: of its input, and of each projection of it; off = 0."""

    def band_sizes(self, vocab_size: int) -> list[int]:
        """Words of each band."""
        edges = (0, *self.cutoffs, vocab_size)
        return [stop - start for start, stop in pairwise(edges)]

    def band_widths(self, hidden_size: int) -> list[int]:
        """Width of each band's embeddings."""
        return [hidden_size // self.factor**band for band in range(len(self.cutoffs) + 1)]


class DropoutConfig(Section):
    """Share of values that are zeroed in training; off = 0."""

    hidden: DropoutRate = 0.0
    """Of the embeddings, and of what each block adds to the residual stream."""
    attention: DropoutRate = 0.0
    """Of the attention weights."""
    activation: DropoutRate = 0.0
    """Inside the feed-forward block, after the activation."""


class ModelConfig(Section):
    num_layers: Count
    """Decoder layers."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Query heads; must divide ``hidden_size``."""
    num_key_value_heads: Count | None = None
    """Key and value heads (grouped-query attention); off = one per query head."""
    ffn_hidden_size: Count | None = None
    """Width inside the feed-forward block; off = 4 × ``hidden_size``."""
    vocab_size: Count | None = None
    """Rows of the embedding; off = the data set's vocabulary, padded to a multiple of 64."""
    position: str = "alibi"
    """``alibi``, ``sinusoidal``, ``rotary``, ``t5``, ``learned``, ``none``, or
    ``package.module:Class`` of your own position method."""
    max_positions: Count | None = None
    """Longest input the model accepts, in tokens, and the rows of ``learned``'s table; off = any
    length, or for ``learned`` the trained one."""
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] = "gelu"
    """``gelu`` is the exact (erf) one, ``gelu_tanh`` its approximation."""
    bias: bool = True
    """Additive biases in the linear layers and in LayerNorm; off = none anywhere."""
    tie_embeddings: bool = True
    """The output projection is the input embedding."""
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Applied before each block and once at the end (pre-norm)."""
    final_norm: bool = True
    """The norm at the end; off = the last block's output goes to the output projection as it is."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get
    this divided by √(2 × num_layers)."""
    initialization: Literal["normal", "fairseq"] = "normal"
    """Initial weights: normal with ``init_std``, or by fairseq's rules, which need no number."""
    adaptive: AdaptiveConfig | None = None
    """Adaptive embedding and softmax; off = one matrix for all words."""
    dropout: DropoutConfig = DropoutConfig()
    """Dropout rates while training."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size
