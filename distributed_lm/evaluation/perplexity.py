"""From a plan to its result."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from distributed_lm import platform
from distributed_lm.config import RunConfig
from distributed_lm.errors import DataError
from distributed_lm.evaluation.bootstrap import loss_interval
from distributed_lm.evaluation.protocols import ALL_TARGETS, Plan
from distributed_lm.evaluation.results import Result, exp
from distributed_lm.evaluation.scored_data import ScoredData
from distributed_lm.evaluation.scoring import Advance, Score, Sums, score_windows
from distributed_lm.evaluation.windows import position_edges
from distributed_lm.process_groups import ProcessGroups


@dataclass(frozen=True)
class Measurement:
    """What scoring a plan gave."""

    plan: Plan
    sums: Sums
    seconds: float
    peak_memory_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.sums.nats / self.sums.tokens

    @property
    def perplexity(self) -> float:
        return exp(self.loss)


def measure(
    plan: Plan,
    data: ScoredData,
    tokens_per_batch: int,
    groups: ProcessGroups,
    score: Score,
    advance: Advance = lambda done, total: None,
) -> Measurement:
    """Score a plan's windows. Collective; arguments as of ``score_windows``."""
    platform.forget_peak_memory(groups.device)
    started = time.perf_counter()
    sums = score_windows(
        data.stream, data.document_ends, plan.build(), tokens_per_batch, groups, score, advance
    )
    seconds = time.perf_counter() - started
    peak = max(groups.gather(platform.peak_memory_bytes(groups.device)))
    return Measurement(plan, sums, seconds, peak)


def expected_result(
    config: RunConfig, step: int, checkpoint: str | None, data: ScoredData, plan: Plan
) -> Result:
    """What is known of a plan's result before it is scored; all of it if the plan is a gap."""
    return Result(
        run=config.name,
        step=step,
        checkpoint=checkpoint,
        position=config.model.position,
        trained_length=config.data.sequence_length,
        precision=config.precision,
        split=data.split,
        corpus_hash=data.corpus_hash,
        data_digest=data.digest,
        tokenizer=data.tokenizer,
        protocol=plan.protocol,
        stride=plan.stride,
        length=plan.length,
        targets=plan.targets,
        gap=plan.gap,
        versions=platform.describe_environment(),
    )


def complete_result(
    expected: Result,
    measured: Measurement,
    data: ScoredData,
    groups: ProcessGroups,
    say: Callable[[str], None],
) -> Result:
    """The result, with its interval, and words and bytes where whole documents were scored.

    Args:
        say: told if words and bytes cannot be counted for want of the tokenizer.
    """
    sums = measured.sums
    result = replace(
        expected,
        tokens_scored=sums.tokens,
        nats=sums.nats,
        loss=measured.loss,
        perplexity=measured.perplexity,
        interval=loss_interval(sums.document_nats, sums.document_tokens),
        by_position={} if expected.protocol == "context" else by_position(sums),
        seconds=measured.seconds,
        peak_memory_bytes=measured.peak_memory_bytes,
        layout=groups.layout.describe(),
    )
    if expected.protocol != "documents" and expected.targets != ALL_TARGETS:
        return result
    try:
        text = data.count_text(sums.document_tokens)
    except DataError as error:
        say(f"words and bytes of the scored text are not counted: {error}")
        return result
    return replace(
        result,
        words=text.words,
        word_perplexity=exp(sums.nats / text.words) if text.words else math.nan,
        bytes=text.size,
        bits_per_byte=sums.nats / (text.size * math.log(2)) if text.size else math.nan,
    )


def by_position(sums: Sums) -> dict[str, list[float]]:
    """Nats and tokens summed over bins of the context; see ``position_edges``."""
    edges = position_edges(len(sums.position_nats))
    starts = np.array(edges[:-1]) - 1
    return {
        "edges": list(edges),
        "nats": np.add.reduceat(sums.position_nats, starts).tolist(),
        "tokens": np.add.reduceat(sums.position_tokens, starts).astype(np.int64).tolist(),
    }
