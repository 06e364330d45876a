"""Worker functions for tests of evaluation: tiny models with random weights, scored in one go."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.evaluation.protocols import Request, make_plans
from distributed_lm.evaluation.scored_data import ScoredData
from distributed_lm.evaluation.scoring import score_windows
from distributed_lm.layout import Layout
from distributed_lm.model import loss
from distributed_lm.model.gpt import GPTStage, build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.pipeline import Microbatch, run_schedule
from distributed_lm.process_groups import Process, ProcessGroups


def random_data(vocab_size: int, document_lengths: list[int], seed: int = 0) -> ScoredData:
    """A stream of random tokens, cut into documents."""
    ends = np.cumsum(document_lengths)
    stream = np.random.default_rng(seed).integers(0, vocab_size, int(ends[-1]))
    return ScoredData("valid", stream, ends, "digest", [])


def join_with_model(config: RunConfig, vocab_size: int) -> tuple[list[GPTStage], ProcessGroups]:
    """Stages whose weights depend on the seed alone, spread wide enough that losses differ."""
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.grid(config.parallel, process.world_size))
    stages = build_stages(config, vocab_size, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    for stage in stages:
        stage.eval()
    return stages, groups


def scorer(stages: list[GPTStage], groups: ProcessGroups) -> Callable[..., None]:
    """As ``evaluate`` has it."""

    def score(microbatches: list[Microbatch], on_losses: Callable[[Tensor], None]) -> None:
        with torch.no_grad():
            run_schedule(list(stages), microbatches, groups, forward_only=True, on_losses=on_losses)

    return score


def score_requests(
    config: RunConfig,
    vocab_size: int,
    data: ScoredData,
    requests: list[Request],
    max_logits: int,
) -> list[dict[str, Any]]:
    """Sums by position and by document of each plan of each request.

    Args:
        max_logits: elements of logits to keep at once.
    """
    loss.MIN_ROWS, loss.MAX_LOGITS = 1, {"cpu": max_logits}
    stages, groups = join_with_model(config, vocab_size)
    score = scorer(stages, groups)
    results = []
    for request in requests:
        for plan in make_plans(request, config, data):
            sums = score_windows(
                data.stream, data.document_ends, plan.build(),
                config.evaluation.tokens_per_batch, groups, score,
            )  # fmt: skip
            results.append({"protocol": plan.protocol, "length": plan.length, **vars(sums)})
    return results


def whole_model_losses(
    config: RunConfig, vocab_size: int, data: ScoredData, cases: list[tuple[int, int]]
) -> list[float]:
    """By hand, one process: the loss of each (target, tokens of context), one forward each."""
    [stage], _ = join_with_model(config, vocab_size)
    losses = []
    with torch.no_grad():
        for target, context in cases:
            tokens = torch.from_numpy(data.stream[target - context : target])[None]
            logits_SBV = stage(tokens)
            logs = torch.log_softmax(logits_SBV[-1, 0].double(), dim=-1)
            losses.append(-float(logs[int(data.stream[target])]))
    return losses
