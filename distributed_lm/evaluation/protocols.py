"""The protocols, each as windows over the stream of tokens.

``nonoverlapping``: the stream cut into segments of the length (Press et al. 2022, §2.1: the paper's
default). ``sliding``: windows that overlap, see ``sliding_windows``. ``documents``: the same inside
documents longer than the length. ``context``: a sample of targets, each scored with exactly as many
tokens of context as the length says.

The first two score the same targets at every length and stride: all of the stream but its first
token, or the sample of them that ``evaluation.sample_tokens`` asks for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from distributed_lm.config import EvaluationConfig, RunConfig, longest_input
from distributed_lm.errors import ConfigError
from distributed_lm.evaluation.scored_data import ScoredData
from distributed_lm.evaluation.windows import (
    Windows,
    context_windows,
    document_windows,
    geometric_contexts,
    only_targets,
    sample_targets,
    sliding_windows,
)

ProtocolName = Literal["nonoverlapping", "sliding", "context", "documents"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
CONTEXT_SAMPLE_TOKENS = 1024
ALL_TARGETS = "all"


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    lengths: tuple[int, ...]
    """Context lengths, in tokens."""
    protocol: ProtocolName = "nonoverlapping"
    stride: int | None = None
    """Tokens between windows; None = the length."""
    longer_than: int | None = None
    """``documents`` only: documents of more tokens than this; None = the longest of ``lengths``, so
    that all of them score the same documents."""


@dataclass(frozen=True)
class Plan:
    """One result to be had."""

    protocol: str
    length: int
    stride: int
    """Targets scored by each window but the first."""
    targets: str
    """Which are scored: results are comparable where this and the data's digest are equal."""
    build: Callable[[], Windows]
    """Deferred: a sliding window of stride 1 over a large split has as many windows as targets."""
    gap: str | None = None
    """Why the model cannot be scored at this length."""


def make_plans(request: Request, config: RunConfig, data: ScoredData) -> list[Plan]:
    """One plan per length, or for ``context`` one per power of two up to the longest as well.

    Raises:
        ConfigError: if what is asked for makes no sense with this data.
    """
    _check(request, config, data)
    if request.protocol == "context":
        return _context_plans(request.lengths, config, data)
    return [_window_plan(request, length, config, data) for length in request.lengths]


def _window_plan(request: Request, length: int, config: RunConfig, data: ScoredData) -> Plan:
    stride = request.stride or length
    if request.protocol == "documents":
        longer_than = request.longer_than or max(request.lengths)
        targets = f"over_{longer_than}"

        def build() -> Windows:
            return document_windows(data.document_ends, length, stride, longer_than)
    else:
        chosen, targets = _sample(config.evaluation, 1, data, config.evaluation.sample_tokens)

        def build() -> Windows:
            windows = sliding_windows(data.num_targets, length, stride)
            return windows if chosen is None else only_targets(windows, chosen)

    return Plan(request.protocol, length, stride, targets, build, _gap(config, length))


def _context_plans(lengths: tuple[int, ...], config: RunConfig, data: ScoredData) -> list[Plan]:
    number = config.evaluation.sample_tokens or CONTEXT_SAMPLE_TOKENS
    # Every target has the longest context before it, also where the model cannot use it.
    chosen, targets = _sample(config.evaluation, max(lengths), data, number)
    assert chosen is not None

    def plan(context: int) -> Plan:
        gap = _gap(config, context)
        return Plan("context", context, 1, targets, lambda: context_windows(chosen, context), gap)

    return [plan(context) for context in geometric_contexts(lengths)]


def _sample(
    evaluation: EvaluationConfig, first: int, data: ScoredData, number: int
) -> tuple[np.ndarray | None, str]:
    if number == 0:
        return None, ALL_TARGETS
    seed = evaluation.sample_seed
    targets = sample_targets(first, data.num_targets, number, seed)
    return targets, f"sample_{len(targets)}_seed_{seed}_from_{first}"


def _gap(config: RunConfig, length: int) -> str | None:
    limit = longest_input(config)
    if limit is None or length <= limit:
        return None
    return f"{config.model.position} positions with model.max_positions={limit} end before {length}"


def check_lengths(config: RunConfig, lengths: tuple[int, ...], num_targets: int) -> None:
    """Raises ConfigError if some length cannot be evaluated with this config and this text."""
    limit = longest_input(config)
    for length in lengths:
        if limit is not None and length > limit:
            raise ConfigError(
                f"evaluation.lengths: {length} is longer than model.max_positions={limit}; "
                f"evaluate at {limit} or less"
            )
    _check_divisible_and_filled(config, lengths, num_targets)


def _check_divisible_and_filled(
    config: RunConfig, lengths: tuple[int, ...], num_targets: int
) -> None:
    for length in lengths:
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


def _check(request: Request, config: RunConfig, data: ScoredData) -> None:
    _check_divisible_and_filled(config, request.lengths, data.num_targets)
    protocol, stride = request.protocol, request.stride
    if stride is None and protocol == "sliding":
        raise ConfigError("--protocol sliding: needs --stride, as in --stride 512")
    if stride is not None:
        if protocol in ("nonoverlapping", "context"):
            raise ConfigError(
                f"--stride {stride}: --protocol {protocol} has none; use --protocol sliding"
            )
        if stride > min(request.lengths):
            raise ConfigError(
                f"--stride {stride} is longer than the length {min(request.lengths)}, so that "
                "tokens would not be scored; use a smaller stride or leave out that length"
            )
    if protocol == "documents":
        _check_documents(request, config, data)
    elif request.longer_than is not None:
        raise ConfigError(
            f"--longer-than {request.longer_than}: chooses documents, and --protocol {protocol} "
            "scores the whole stream; use --protocol documents"
        )


def _check_documents(request: Request, config: RunConfig, data: ScoredData) -> None:
    if config.evaluation.sample_tokens:
        raise ConfigError(
            f"evaluation.sample_tokens={config.evaluation.sample_tokens}: --protocol documents "
            "scores whole documents; leave it out, or use --protocol sliding"
        )
    longest = int(data.document_lengths.max())
    wanted = request.longer_than or max(request.lengths)
    if longest <= wanted:
        raise ConfigError(
            f"--protocol documents: no document in the {data.split} split is longer than {wanted} "
            f"tokens, the longest has {longest}; evaluate at less, set --longer-than, or raise "
            "evaluation.max_tokens"
        )
