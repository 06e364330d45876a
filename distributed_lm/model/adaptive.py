"""Adaptive embedding and adaptive softmax with shared weights, as in fairseq's
``transformer_lm_wiki103`` (Baevski and Auli 2019; the softmax: Grave et al. 2017).

Words are sorted by frequency into bands. A word of band b has an embedding of D / factor^b numbers,
which that band's projection brings to width D. The softmax is over the words of band 0 and one
class for each other band; a word of another band has its class's probability times its own within
the band, whose logits come from the same embeddings behind the transposed projection. Band 0 is
projected on input only.

On tensor-parallel ranks every band is split by words, like any embedding; projections and classes
(0.6% of the paper's weights) are whole on every rank. What they multiply is replicated, or with
sequence parallelism this rank's slice of the tokens, so they are tagged as the norms are.

Shapes: S sequence, B batch, T tokens (S · B), D hidden, C classes, V the whole vocabulary.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from distributed_lm.config import AdaptiveConfig, ModelConfig
from distributed_lm.model.dropout import replicated_dropout
from distributed_lm.model.loss import TokenLosses
from distributed_lm.process_groups import ProcessGroups

TIED_COPY = "output_layer.tables."
"""Where a last pipeline stage apart from the first keeps its copy of the embedding."""


class Matrix(nn.Module):
    """A weight to multiply with: [rows, columns].

    Args:
        split_rows: these are this tensor-parallel rank's rows; else every rank has them all.
    """

    def __init__(
        self, config: TransformerConfig, rows: int, columns: int, *, split_rows: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype))
        if split_rows:
            self.weight.partition_dim = 0  # type: ignore[attr-defined]
        else:
            self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class AdaptiveEmbedding(nn.Module):
    """Word embeddings in bands.

    Args:
        vocab_size: rows over all bands and tensor-parallel ranks.
        is_copy: the last pipeline stage's copy, which only the softmax reads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        vocab_size: int,
        groups: ProcessGroups,
        is_copy: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        adaptive = _adaptive(model)
        self.widths = adaptive.band_widths(model.hidden_size)
        self.starts = (0, *adaptive.cutoffs)
        size = groups.layout.tensor
        self.bands = nn.ModuleList(
            Matrix(config, words // size, width, split_rows=True)
            for words, width in zip(adaptive.band_sizes(vocab_size), self.widths, strict=True)
        )
        self.projections = nn.ModuleDict(
            {
                str(band): Matrix(config, model.hidden_size, width)
                for band, width in enumerate(self.widths)
                if band > 0 or not is_copy
            }
        )

    def tied_weights(self) -> list[nn.Parameter]:
        """What the softmax shares, in an order that no stage changes."""
        count = len(self.bands)
        words = [self.words(band) for band in range(count)]
        return words + [self.projection(band) for band in range(1, count)]

    def words(self, band: int) -> nn.Parameter:
        """[this rank's words of the band, its width]"""
        return cast(Matrix, self.bands[band]).weight

    def projection(self, band: int) -> nn.Parameter:
        """[D, width of the band]"""
        return cast(Matrix, self.projections[str(band)]).weight

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, D], or with sequence parallelism this rank's slice of [S, B, D]: as Megatron's
        ``VocabParallelEmbedding``."""
        rows = torch.cat(
            [self._look_up(band, tokens_BS) for band in range(len(self.bands))], dim=-1
        )
        group = self.groups.tensor
        # Summed while narrow, so that each rank projects whole embeddings.
        if self.config.sequence_parallel:
            rows = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                rows.transpose(0, 1).contiguous(), group=group
            )
        else:
            rows = tensor_parallel.reduce_from_tensor_model_parallel_region(rows, group=group)
        parts = rows.split(self.widths, dim=-1)
        projected = [F.linear(part, self.projection(band)) for band, part in enumerate(parts)]
        return torch.stack(projected).sum(dim=0)

    def _look_up(self, band: int, tokens_BS: Tensor) -> Tensor:
        """[B, S, width of the band]: zeros for words of other bands and other ranks."""
        weight = self.words(band)
        first = self.starts[band] + self.groups.coordinates.tensor * weight.size(0)
        row = tokens_BS - first
        is_here = (row >= 0) & (row < weight.size(0))
        found = F.embedding(row.masked_fill(~is_here, 0), weight)
        return found.masked_fill(~is_here[..., None], 0.0)


class AdaptiveSoftmax(nn.Module):
    """Losses of the next words.

    Args:
        embedding: the weights to share, if they are on this stage; else a copy is made.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        vocab_size: int,
        groups: ProcessGroups,
        embedding: AdaptiveEmbedding | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        adaptive = _adaptive(model)
        self.dropout = adaptive.dropout
        self.edges = (*adaptive.cutoffs, vocab_size)
        self.classes = Matrix(config, len(adaptive.cutoffs), model.hidden_size)
        self.tables: AdaptiveEmbedding
        if embedding is None:
            self.tables = AdaptiveEmbedding(config, model, vocab_size, groups, is_copy=True)
        else:  # not as a submodule: the stage has it already
            object.__setattr__(self, "tables", embedding)

    def forward(
        self,
        hidden_SBD: Tensor,
        labels_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
    ) -> Tensor | TokenLosses:
        """Losses, or without labels the log probabilities [S, B, V] of all words.

        Args:
            hidden_SBD: with sequence parallelism, this rank's slice of S.
            mask_BS: 1 where the label is scored, 0 elsewhere; None scores all.
        """
        features = self._features(hidden_SBD)
        if labels_BS is None:
            return self._log_probabilities(features).unflatten(0, (-1, hidden_SBD.size(1)))
        targets = labels_BS.transpose(0, 1).flatten()
        losses = tensor_parallel.vocab_parallel_cross_entropy(
            self._head_logits(features), self._head_targets(targets)
        )
        for band in range(1, len(self.edges)):
            # Empty selections go through too: every weight must get a gradient every time.
            chosen = ((targets >= self.edges[band - 1]) & (targets < self.edges[band])).nonzero()
            chosen = chosen.squeeze(1)
            within = tensor_parallel.vocab_parallel_cross_entropy(
                self._band_logits(features[band][chosen], band),
                targets[chosen] - self.edges[band - 1],
            )
            losses = losses.index_add(0, chosen, within)
        length = labels_BS.size(1)
        return TokenLosses.of(losses.view(length, -1).transpose(0, 1).contiguous(), mask_BS)

    def _features(self, hidden_SBD: Tensor) -> list[Tensor]:
        """What each band's embeddings are multiplied with, [T, width], and last the classes' logits
        [T, C]; of all tokens, and with gradients that sum over the tensor-parallel ranks."""
        hidden_SBD = self._drop(hidden_SBD)
        parts = [hidden_SBD]
        for band in range(1, len(self.edges)):
            parts.append(self._drop(hidden_SBD @ self.tables.projection(band)))
        parts.append(F.linear(hidden_SBD, self.classes.weight))
        sizes = [part.size(-1) for part in parts]
        joined = torch.cat(parts, dim=-1)
        group = self.groups.tensor
        if self.config.sequence_parallel:
            joined = tensor_parallel.gather_from_sequence_parallel_region(joined, group=group)
        else:
            joined = tensor_parallel.copy_to_tensor_model_parallel_region(joined, group=group)
        return list(joined.flatten(0, 1).split(sizes, dim=-1))

    def _drop(self, values: Tensor) -> Tensor:
        return replicated_dropout(values, self.dropout, self.training, self.config)

    def _head_logits(self, features: list[Tensor]) -> Tensor:
        """[T, band 0's words of this rank + C] fp32. Every rank has columns for the classes, but
        only the last one's count."""
        words = F.linear(features[0], self.tables.words(0))
        classes = features[-1]
        if self.groups.coordinates.tensor < self.groups.layout.tensor - 1:
            classes = classes.masked_fill(torch.ones_like(classes, dtype=torch.bool), -math.inf)
        return torch.cat([words, classes], dim=-1).float()

    def _head_targets(self, targets: Tensor) -> Tensor:
        """Column of each target, or of its class, counted over all ranks' head logits."""
        words, classes = self.tables.words(0).size(0), self.classes.weight.size(0)
        last = self.groups.layout.tensor - 1
        edges = torch.tensor(self.edges[:-1], device=targets.device)
        band = torch.bucketize(targets, edges, right=True)
        word = targets // words * (words + classes) + targets % words
        return torch.where(band == 0, word, last * (words + classes) + words + band - 1)

    def _band_logits(self, features: Tensor, band: int) -> Tensor:
        """[tokens, the band's words of this rank] fp32."""
        return F.linear(features, self.tables.words(band)).float()

    def _log_probabilities(self, features: list[Tensor]) -> Tensor:
        """[T, V] fp32 of all words, on every rank; T in the order of S, then B."""
        gather: Any = tensor_parallel.gather_from_tensor_model_parallel_region
        group = self.groups.tensor
        words = gather(F.linear(features[0], self.tables.words(0)).float(), group=group)
        head = torch.log_softmax(torch.cat([words, features[-1].float()], dim=-1), dim=-1)
        parts = [head[:, : self.edges[0]]]
        for band in range(1, len(self.edges)):
            logits = gather(self._band_logits(features[band], band), group=group)
            prior = head[:, self.edges[0] + band - 1, None]
            parts.append(prior + torch.log_softmax(logits, dim=-1))
        return torch.cat(parts, dim=-1)


def _adaptive(model: ModelConfig) -> AdaptiveConfig:
    assert model.adaptive is not None
    return model.adaptive
