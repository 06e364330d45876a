"""The kernels behind one signature: causal attention with the position method's bias.

Shapes: B batch, N query heads of this rank, G key/value heads, Q queries, K keys, H head dim.
Queries are the last Q of the K positions, so Q < K is a continuation. Each backend takes
``(query_BNQH, key_BGKH, value_BGKH, position, dropout)``, the last the share of attention weights
to zero, and returns [B, N, Q, H] in the query's dtype.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_lm.model.alibi import slopes_tensor
from distributed_lm.model.compilation import MAX_COMPILED_SHAPES
from distributed_lm.model.matmul_attention import matmul_attention
from distributed_lm.model.positions import PositionMethod

Attend = Callable[..., Tensor]

# Largest bias kept at once, in fp32 elements (256 MiB): longer inputs go through in query chunks.
MAX_BIAS_ELEMENTS = 1 << 26

# Queries of one call to SDPA on a CPU, whose kernel reads a mask but skips nothing for it: chunks
# leave out the keys that no query of theirs sees, nearly half of all in the end. Shorter ones skip
# more and lose as much to smaller matrix products.
CPU_QUERIES = 192


def reference(
    query_BNQH: Tensor,
    key_BGKH: Tensor,
    value_BGKH: Tensor,
    position: PositionMethod,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q·kᵀ/√H + bias) · v, every step in fp32 and in full."""
    query, key, value = (tensor.float() for tensor in (query_BNQH, key_BGKH, value_BGKH))
    key, value = _repeat_groups(key, query.size(1)), _repeat_groups(value, query.size(1))
    scores_BNQK = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
    num_queries, num_keys = scores_BNQK.shape[-2:]
    queries = range(num_keys - num_queries, num_keys)
    scores_BNQK = scores_BNQK + causal_bias(position, queries, num_keys, query.device)
    weights_BNQK = F.dropout(torch.softmax(scores_BNQK, dim=-1), dropout)
    return (weights_BNQK @ value).to(query_BNQH.dtype)


def sdpa(
    query_BNQH: Tensor,
    key_BGKH: Tensor,
    value_BGKH: Tensor,
    position: PositionMethod,
    dropout: float = 0.0,
) -> Tensor:
    """PyTorch's fused attention with the bias as an fp32 mask, in chunks of bounded memory."""
    grouped = key_BGKH.size(1) != query_BNQH.size(1)
    num_queries, num_keys = query_BNQH.size(2), key_BGKH.size(2)
    # A CPU's kernel gains less from being told so than from chunks.
    if not position.has_bias and num_queries == num_keys and query_BNQH.is_cuda:
        return F.scaled_dot_product_attention(
            query_BNQH,
            key_BGKH,
            value_BGKH,
            dropout_p=dropout,
            is_causal=True,
            enable_gqa=grouped,
        )
    dtype = query_BNQH.dtype
    if query_BNQH.is_cuda:
        # CUDA's fused kernels refuse an fp32 mask for 16-bit queries, or (cuDNN) misread it.
        query_BNQH, key_BGKH, value_BGKH = (
            tensor.float() for tensor in (query_BNQH, key_BGKH, value_BGKH)
        )

    def attend(query: Tensor, key: Tensor, value: Tensor, bias_NQK: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            # Four dimensions: with three, torch leaves the fused kernel and keeps all scores.
            attn_mask=bias_NQK[None],
            dropout_p=dropout,
            enable_gqa=grouped,
        )

    most_queries = num_queries if query_BNQH.is_cuda else CPU_QUERIES
    return _in_chunks(attend, query_BNQH, key_BGKH, value_BGKH, position, most_queries).to(dtype)


def matmul(
    query_BNQH: Tensor,
    key_BGKH: Tensor,
    value_BGKH: Tensor,
    position: PositionMethod,
    dropout: float = 0.0,
) -> Tensor:
    """Batched matrix products, in chunks of bounded memory: the fastest for bf16 on a CPU."""
    assert dropout == 0.0, "choose_backend lets no dropout through to matmul"
    key_BNKH, value_BNKH = (
        _repeat_groups(tensor, query_BNQH.size(1)) for tensor in (key_BGKH, value_BGKH)
    )
    most_queries = query_BNQH.size(2)  # it has chunks of its own
    return _in_chunks(matmul_attention, query_BNQH, key_BNKH, value_BNKH, position, most_queries)


def _in_chunks(
    attend: Attend,
    query_BNQH: Tensor,
    key_BGKH: Tensor,
    value_BGKH: Tensor,
    position: PositionMethod,
    most_queries: int,
) -> Tensor:
    """``attend(query, key, value, bias)`` for at most so many queries at a time, each with the keys
    that they see."""
    num_queries, num_keys = query_BNQH.size(2), key_BGKH.size(2)
    heads = query_BNQH.size(1) if position.has_bias else 1
    # Without gradients the inputs are long and nothing is kept: a quarter does.
    kept = MAX_BIAS_ELEMENTS if torch.is_grad_enabled() else MAX_BIAS_ELEMENTS // 4
    bias_queries = max(1, kept // (heads * num_keys))
    chunk = min(bias_queries, most_queries)
    first = num_keys - num_queries
    device = query_BNQH.device
    whole = None
    if bias_queries >= num_queries:  # every layer of a stage asks for the same
        whole = causal_bias(position, range(first, num_keys), num_keys, device)
    elif device.type == "cpu":
        chunk = min(chunk, CPU_QUERIES)  # whose bias is read while the cache has it
    outputs = []
    for start in range(0, num_queries, chunk):
        stop = min(start + chunk, num_queries)
        visible = first + stop  # no query of this chunk sees past it
        if whole is not None:
            bias = whole[:, start:stop, :visible]
        else:
            bias = causal_bias(position, range(first + start, visible), visible, device)
        seen = (tensor[:, :, :visible] for tensor in (key_BGKH, value_BGKH))
        outputs.append(attend(query_BNQH[:, :, start:stop], *seen, bias))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def flex(
    query_BNQH: Tensor,
    key_BGKH: Tensor,
    value_BGKH: Tensor,
    position: PositionMethod,
    dropout: float = 0.0,
) -> Tensor:
    """FlexAttention: causal block mask, bias computed in the kernel."""
    assert dropout == 0.0, "choose_backend lets no dropout through to FlexAttention"
    num_queries, num_keys = query_BNQH.size(2), key_BGKH.size(2)
    attend = _flex_module().flex_attention
    if query_BNQH.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled_flex()
    return attend(
        query_BNQH,
        key_BGKH,
        value_BGKH,
        score_mod=position.score_mod(num_keys - num_queries, num_keys, query_BNQH.device),
        block_mask=_causal_block_mask(position, num_queries, num_keys, query_BNQH.device),
        enable_gqa=key_BGKH.size(1) != query_BNQH.size(1),
    )


def flash(
    query_BNQH: Tensor,
    key_BGKH: Tensor,
    value_BGKH: Tensor,
    position: PositionMethod,
    dropout: float = 0.0,
) -> Tensor:
    """FlashAttention-2 with ``alibi_slopes``; its causal mask is aligned to the last key."""
    from flash_attn import flash_attn_func

    slopes = None
    if position.linear_slopes is not None:
        slopes = slopes_tensor(position.linear_slopes, query_BNQH.device)
    context_BQNH = flash_attn_func(
        *(tensor.transpose(1, 2) for tensor in (query_BNQH, key_BGKH, value_BGKH)),
        dropout_p=dropout,
        causal=True,
        alibi_slopes=slopes,
    )
    return context_BQNH.transpose(1, 2)


BACKENDS: dict[str, Attend] = {
    "reference": reference,
    "sdpa": sdpa,
    "matmul": matmul,
    "flex": flex,
    "flash": flash,
}


def causal_bias(
    position: PositionMethod, queries: range, num_keys: int, device: torch.device
) -> Tensor:
    """The position method's bias with −inf above the diagonal.

    Returns:
        fp32 [N, Q, K], or [1, Q, K] without a bias. The last one asked for is kept on the
        position method; not if it has weights, which training changes and which need a gradient
        each time.
    """

    def make() -> Tensor:
        bias = position.bias(queries, num_keys, device)
        if bias is None:
            bias = torch.zeros(1, len(queries), num_keys, device=device)
        keys = torch.arange(num_keys, device=device)
        rows = torch.arange(queries.start, queries.stop, device=device)
        return bias.masked_fill(keys[None, :] > rows[:, None], float("-inf"))

    if has_trained_bias(position):
        return make()
    return _kept(position, "_kept_bias", (queries, num_keys, device), make)


def has_trained_bias(position: PositionMethod) -> bool:
    """Whether the bias changes from step to step, and needs a gradient."""
    return position.has_bias and next(position.parameters(), None) is not None


def _repeat_groups(tensor_BGKH: Tensor, num_heads: int) -> Tensor:
    repeats = num_heads // tensor_BGKH.size(1)
    return tensor_BGKH if repeats == 1 else tensor_BGKH.repeat_interleave(repeats, dim=1)


def _flex_module() -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    # Past torch's default of 8 shapes it would run unfused, the whole matrix of scores in memory.
    compiled = torch.compile(_flex_module().flex_attention, dynamic=False)
    return torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES)(compiled)


def _causal_block_mask(
    position: PositionMethod, num_queries: int, num_keys: int, device: torch.device
) -> Any:
    first = num_keys - num_queries

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + first

    def make() -> Any:
        return _flex_module().create_block_mask(
            causal, None, None, num_queries, num_keys, device=device
        )

    return _kept(position, "_kept_block_mask", (num_queries, num_keys, device), make)


def _kept(
    position: PositionMethod, name: str, key: tuple[Any, ...], make: Callable[[], Any]
) -> Any:
    """What ``make`` returned when last asked for ``key``, kept on the position method: every layer
    of a stage asks for the same. An attribute and no cache of functools', which torch.compile sees
    through: it would make it again in every layer."""
    kept = getattr(position, name, None)
    if kept is None or kept[0] != key:
        kept = (key, make())
        object.__setattr__(position, name, kept)
    return kept[1]
