"""Nonoverlapping perplexity: the stream cut into segments of the evaluated length, each scored from
its first token on with no context from before it (Press et al. 2022, §2.1: the paper's default)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from distributed_lm.config import EvaluationConfig, RunConfig
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.pipeline import Microbatch
from distributed_lm.process_groups import ProcessGroups

Score = Callable[[list[Microbatch]], tuple[float, float]]


@dataclass(frozen=True)
class Perplexity:
    """One number with what is needed to compare it."""

    split: str
    protocol: str
    length: int
    """Context length, in tokens."""
    loss: float
    """Nats per token, averaged over all scored tokens."""
    perplexity: float
    tokens_scored: int


def nonoverlapping_perplexity(
    stream: np.ndarray,
    length: int,
    evaluation: EvaluationConfig,
    groups: ProcessGroups,
    score: Score,
) -> Perplexity:
    """Score every token of ``stream`` but the first, exactly once, at any layout. Collective.

    Args:
        stream: token ids of the whole split.
        score: sums loss and token count of microbatches over the whole run.
    """
    total, tokens = 0.0, 0.0
    rank = groups.coordinates.data
    for batch in _batches(stream, length, groups.layout, rank, evaluation.tokens_per_batch):
        batch_total, batch_tokens = score(batch)
        total += batch_total
        tokens += batch_tokens
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 700.0 else math.inf
    return Perplexity(evaluation.split, "nonoverlapping", length, loss, perplexity, int(tokens))


def check_lengths(config: RunConfig, lengths: tuple[int, ...], num_targets: int) -> None:
    """Raises ConfigError if some length cannot be evaluated with this config and this text."""
    for length in lengths:
        limit = config.model.max_positions
        if limit is not None and length > limit:
            raise ConfigError(
                f"evaluation.lengths: {length} is longer than model.max_positions={limit}; "
                f"evaluate at {limit} or less"
            )
        if config.parallel.sequence and length % config.parallel.tensor:
            raise ConfigError(
                f"evaluation.lengths: {length} cannot be divided over "
                f"parallel.tensor={config.parallel.tensor} with parallel.sequence=true; "
                f"use multiples of {config.parallel.tensor} or parallel.sequence=false"
            )
        if length > num_targets:
            raise ConfigError(
                f"evaluation.lengths: {length} is longer than the {num_targets} tokens to score "
                f"in the {config.evaluation.split} split, so none would have that much context; "
                f"evaluate at {num_targets} or less, or raise evaluation.max_tokens"
            )


def _batches(
    stream: np.ndarray, length: int, layout: Layout, data_rank: int, tokens_per_batch: int
) -> Iterator[list[Microbatch]]:
    """This rank's microbatches, one list per schedule run: as many as pipeline stages, all of one
    shape. Segments are dealt to the data-parallel ranks in turn; what is missing at the end is
    padding that is not scored, behind the last token, where causal attention does not look."""
    targets = len(stream) - 1
    segments = -(-targets // length)
    rows = max(1, tokens_per_batch // (length * layout.pipeline))
    per_run = rows * layout.pipeline * layout.data
    for first in range(0, segments, per_run):
        batch = []
        for microbatch in range(layout.pipeline):
            start = first + (microbatch * layout.data + data_rank) * rows
            batch.append(_microbatch(stream, range(start, start + rows), length, targets))
        yield batch


def _microbatch(stream: np.ndarray, segments: range, length: int, targets: int) -> Microbatch:
    tokens = np.zeros((len(segments), length + 1), dtype=np.int64)
    mask = np.zeros((len(segments), length), dtype=np.float32)
    for row, segment in enumerate(segments):
        start = segment * length
        scored = max(0, min(length, targets - start))
        tokens[row, : scored + 1] = stream[start : start + scored + 1] if scored else 0
        mask[row, :scored] = 1.0
    whole = torch.from_numpy(tokens)
    return Microbatch(whole[:, :-1], whole[:, 1:], torch.from_numpy(mask))
