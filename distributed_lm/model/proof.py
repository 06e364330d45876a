"""The start-up proof: the live model does what the paper says, on this rank, in this dtype.

The live attention modules (after slicing over heads, casting by the engine and choice of kernel)
attend with queries and keys made so that every probed key keeps a weight that can be read off, also
for steep heads at long distance: the content score cancels most of the bias. The weights are
compared with the softmax of an fp64 reference whose bias comes from the paper's formula by global
head index. A wrong slope, sign, head offset, scale of the bias, or a distance rounded to bf16 moves
some log weight by far more than the kernel's own rounding does.

A method that turns queries and keys is probed with one key vector at all positions instead, so that
a weight depends on nothing but the angle between query and key. Weights that a method learns on the
attention are others while it is proved: those of a first step are too small to tell right from
wrong, and a trained bias may leave a weight too small to read.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distributed_lm.errors import ProofError
from distributed_lm.model.core_attention import CoreAttention, core_attentions
from distributed_lm.model.gpt import GPTStage
from distributed_lm.model.positions import PositionMethod
from distributed_lm.model.positions.lending import LentPosition
from distributed_lm.process_groups import ProcessGroups

# Distances from the last query. Past 256 they lie halfway between two bf16 numbers, where a
# distance held in bf16 is off by most.
DISTANCES = (0, 1, 2, 7, 33, 64, 255, 257, 515, 1030, 2056, 4112)

# (queries, keys): a training-like square, and the last queries of a context longer than 4,096. For
# fewer than 128 queries FlexAttention has another kernel, which training never runs.
SHAPES = ((130, 130), (130, max(DISTANCES) + 130))

# Largest difference of a log weight, in nats. fp32: rounding of scores of size 3,000. 16 bits:
# a few units in the last place of a weight, rounded once in the kernel and once in its output.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 8e-3}

# Positions whose embeddings are compared, of those that the method has.
EMBEDDED = (0, 1, 257, 5000)


@dataclass(frozen=True)
class Proof:
    """What was compared, for the log and for W&B."""

    fingerprint: str
    """Of method, head count and per-head bias: equal for equal models at any layout."""
    backend: str
    """Attention kernel that was proved."""
    largest_error: float
    """Of all probed log weights on all ranks, in nats."""
    tolerance: float
    """What rounding alone may cause, in nats."""


def prove_positions(stages: list[GPTStage], groups: ProcessGroups) -> Proof:
    """Compare every live attention module and position embedding with the reference. Collective.

    Raises:
        ProofError: on every rank, naming the worst rank, layer, head and distance.
    """
    findings = []
    with _whole_weights(stages[0].position), _drawn_weights(stages[0].lent_position):
        for stage in stages:
            if stage.pre_process:
                findings.append(_embedding_finding(stage))
            for attention in core_attentions([stage]):
                findings += [_attention_finding(stage, attention, *shape) for shape in SHAPES]
    gathered: list[tuple[float, str]] = groups.gather(max(findings))
    error, where, rank = max((*finding, rank) for rank, finding in enumerate(gathered))
    position = stages[0].position
    tolerance = TOLERANCES[_dtype(stages[0])]
    if error > tolerance:
        raise ProofError(
            f"position method {type(position).__name__}, rank {rank}, {where}: the live module "
            f"differs from the reference by {error:.3g} nats, rounding allows {tolerance:.3g}; "
            "training would not be what the config says, so it stops here (if you changed the "
            "attention code, undo that; else try attention.backend=reference)"
        )
    return Proof(
        fingerprint=_fingerprint(position),
        backend=core_attentions(stages)[0].backend,
        largest_error=error,
        tolerance=tolerance,
    )


def _attention_finding(
    stage: GPTStage, attention: CoreAttention, num_queries: int, num_keys: int
) -> tuple[float, str]:
    """(largest error in nats, where) over heads and probed distances of one layer."""
    distances = [distance for distance in DISTANCES if distance < num_keys]
    query_NH, key_KH = _probe(stage, num_keys)
    live = _live_log_weights(stage, attention, query_NH, key_KH, num_queries, distances)
    expected = _expected_log_weights(attention.position, query_NH, key_KH)
    expected = expected[:, [num_keys - 1 - distance for distance in distances]]
    errors = torch.nan_to_num((live - expected).abs(), nan=math.inf)
    head, index = divmod(int(errors.argmax()), len(distances))
    return float(errors.max()), (
        f"layer {attention.layer_number - 1}, head {stage.position.heads.first + head}, "
        f"distance {distances[index]} of {num_queries}×{num_keys}"
    )


def _probe(stage: GPTStage, num_keys: int) -> tuple[Tensor, Tensor]:
    """Queries [N, H] and keys [K, H], exact in the training dtype. Keys are the same for every
    head. The score q·k/√H is about minus the bias, so that no weight underflows; or, before they
    are turned, one number for all."""
    position, dtype = stage.lent_position.copy, _dtype(stage)
    head_dim = stage.config.kv_channels
    if position.has_rotation:
        generator = torch.Generator().manual_seed(1)
        shape = (position.heads.count + 1, head_dim)
        signs = torch.randint(0, 2, shape, generator=generator) - 0.5
        return signs[1:].to(dtype), (2 * signs[:1]).expand(num_keys, head_dim).to(dtype)
    farthest = torch.tensor([num_keys - 1.0], dtype=torch.float64)
    query = torch.zeros(position.heads.count, head_dim, dtype=torch.float64)
    for head in range(position.heads.count):
        slope = -position.expected_bias(position.heads.first + head, farthest) / farthest
        query[head, 0] = slope * math.sqrt(head_dim)
    key = torch.zeros(num_keys, head_dim, dtype=torch.float64)
    key[:, 0] = torch.arange(num_keys - 1, -1, -1)
    return query.to(dtype), key.to(dtype)


def _expected_log_weights(position: PositionMethod, query_NH: Tensor, key_KH: Tensor) -> Tensor:
    """[N, K] fp64: log of the last query's attention weights, from the paper's formula."""
    distance = torch.arange(key_KH.size(0) - 1, -1, -1, dtype=torch.float64)
    heads = range(position.heads.first, position.heads.first + position.heads.count)
    bias = torch.stack([position.expected_bias(head, distance) for head in heads])
    last = torch.full((query_NH.size(0),), key_KH.size(0) - 1)
    query_NH = position.expected_rotation(query_NH.double(), last)
    key_KH = position.expected_rotation(key_KH.double(), torch.arange(key_KH.size(0)))
    scores = query_NH @ key_KH.T / math.sqrt(query_NH.size(1))
    return torch.log_softmax(scores + bias, dim=1)


def _live_log_weights(
    stage: GPTStage,
    attention: CoreAttention,
    query_NH: Tensor,
    key_KH: Tensor,
    num_queries: int,
    distances: list[int],
) -> Tensor:
    """[N, distances] fp64: what the live module gives the last query, read off through values that
    each single out one key. A value vector holds head_dim of them at a time."""
    device = next(stage.parameters()).device
    heads, head_dim = query_NH.shape
    num_keys = key_KH.size(0)
    groups = heads * stage.config.num_query_groups // stage.config.num_attention_heads
    query = query_NH.to(device).expand(num_queries, 1, heads, head_dim)
    key = key_KH.to(device)[:, None, None, :].expand(num_keys, 1, groups, head_dim)
    columns = []
    for first in range(0, len(distances), head_dim):
        probed = distances[first : first + head_dim]
        value = torch.zeros(num_keys, 1, groups, head_dim, dtype=key.dtype, device=device)
        for slot, distance in enumerate(probed):
            value[num_keys - 1 - distance, :, :, slot] = 1.0
        with torch.no_grad():
            context = attention(query, key, value).view(num_queries, heads, head_dim)
        columns.append(context[-1, :, : len(probed)].double().cpu())
    return torch.cat(columns, dim=1).log()


def _embedding_finding(stage: GPTStage) -> tuple[float, str]:
    """(largest error of what the method adds to a zero embedding, where)."""
    width, device = stage.config.hidden_size, next(stage.parameters()).device
    error = 0.0
    limit = stage.position.max_positions or math.inf
    for position in (position for position in EMBEDDED if position < limit):
        zeros = torch.zeros(1, 1, width, dtype=_dtype(stage), device=device)
        live = stage.position.embed(zeros, position).double().cpu().flatten()
        expected = stage.position.expected_embedding(position, width)
        error = max(error, float((live - expected).abs().max()))
    return error, "position embedding"


@contextmanager
def _whole_weights(position: PositionMethod) -> Iterator[None]:
    """ZeRO 3 leaves each rank a part of a weight, and gathers it only for its module's forward."""
    parts: list[Any] = [weight for weight in position.parameters() if hasattr(weight, "ds_tensor")]
    for weight in parts:
        weight.all_gather()
    yield
    for weight in parts:
        weight.partition()


@contextmanager
def _drawn_weights(lent: LentPosition) -> Iterator[None]:
    """What the layers use, drawn from N(0, 1), and at the end again the owner's."""
    if not lent.has_copy:
        yield
        return
    generator = torch.Generator().manual_seed(lent.owner.heads.first)
    for weight in lent.copy.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    yield
    lent.refresh()


def _fingerprint(position: PositionMethod) -> str:
    one = torch.ones(1, dtype=torch.float64)
    biases: list[float] = []  # those that are trained are the checkpoint's, not the method's
    if position.embeds_only or next(position.parameters(), None) is None:
        biases = [float(position.expected_bias(head, one)) for head in range(position.heads.total)]
    content: list[Any] = [type(position).__name__, biases, position.embedding_scale]
    if position.has_rotation:
        turned = position.expected_rotation(torch.ones(1, 8, dtype=torch.float64), one)
        content += turned.flatten().tolist()
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _dtype(stage: GPTStage) -> torch.dtype:
    return next(stage.parameters()).dtype
