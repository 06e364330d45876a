"""Attention from batched matrix products, for 16-bit tensors on a CPU.

On the processor that was measured (AVX512-BF16), SDPA's kernel takes as long in bf16 as in fp32,
and batched products of bf16 run at four times the rate of fp32. So only the scores, which must not
be rounded to 16 bits, are computed in fp32.

Shapes: B batch, N heads, Q queries, K keys, H head dim. Queries are the last Q of the K positions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

# Queries of one product: they leave out the keys that none of them sees, nearly half of all in the
# end. Fewer leave out more and lose as much to smaller products.
QUERIES = 128
# Scores of one product, in fp32 (64 MiB); their softmax is there beside them.
MAX_SCORES = 1 << 24


# One operator to torch.compile: what it makes of the backward's loop takes twice as long.
@custom_op("distributed_lm::matmul_attention", mutates_args=())
def matmul_attention(
    query_BNQH: Tensor, key_BNKH: Tensor, value_BNKH: Tensor, bias_NQK: Tensor
) -> Tensor:
    """softmax(q·kᵀ/√H + bias) · v, the scores in fp32. Keeps no scores for its backward, which
    computes them again.

    Args:
        bias_NQK: fp32 [N, Q, K] or [1, Q, K], −inf for keys after the query; gets no gradient.

    Returns:
        [B, N, Q, H] in the query's dtype.
    """
    context_BNQH = torch.empty_like(query_BNQH)
    for row in range(len(query_BNQH)):
        # Megatron's are slices of one tensor, a row of memory per head and token.
        query, key, value = (one[row].contiguous() for one in (query_BNQH, key_BNKH, value_BNKH))
        for weights_NQK, queries, keys in _chunks(query, key, bias_NQK):
            context_BNQH[row, :, queries] = weights_NQK @ value[:, keys]
    return context_BNQH


@custom_op("distributed_lm::matmul_attention_backward", mutates_args=())
def _matmul_attention_backward(
    upstream_BNQH: Tensor,
    query_BNQH: Tensor,
    key_BNKH: Tensor,
    value_BNKH: Tensor,
    bias_NQK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = query_BNQH, key_BNKH, value_BNKH
    by_query_BNQH, by_key_BNKH, by_value_BNKH = (torch.empty_like(one) for one in inputs)
    scale = query_BNQH.size(-1) ** -0.5
    for row in range(len(query_BNQH)):
        query, key, value = (one[row].contiguous() for one in inputs)
        upstream = upstream_BNQH[row].contiguous()
        by_key, by_value = (torch.zeros_like(one, dtype=torch.float32) for one in (key, value))
        for weights_NQK, queries, keys in _chunks(query, key, bias_NQK):
            by_value[:, keys] += weights_NQK.transpose(1, 2) @ upstream[:, queries]
            by_weights_NQK = upstream[:, queries] @ value[:, keys].transpose(1, 2)
            by_scores_NQK = torch.ops.aten._softmax_backward_data(
                by_weights_NQK, weights_NQK, -1, weights_NQK.dtype
            )
            by_query_BNQH[row, :, queries] = by_scores_NQK @ key[:, keys]
            by_key[:, keys] += by_scores_NQK.transpose(1, 2) @ query[:, queries]
        by_key_BNKH[row], by_value_BNKH[row] = by_key.mul_(scale), by_value
    return by_query_BNQH.mul_(scale), by_key_BNKH, by_value_BNKH


def _chunks(
    query_NQH: Tensor, key_NKH: Tensor, bias_NQK: Tensor
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Attention weights of so many queries, which they are, and the keys that they see."""
    heads, num_queries, head_dim = query_NQH.shape
    scale = head_dim**-0.5
    num_keys = key_NKH.size(1)
    query, key_NHK = query_NQH.float(), key_NKH.float().transpose(1, 2)
    chunk = min(QUERIES, max(1, MAX_SCORES // (heads * num_keys)))
    for start in range(0, num_queries, chunk):
        queries = slice(start, min(start + chunk, num_queries))
        keys = slice(0, num_keys - num_queries + queries.stop)
        # Without names: none of these is to stay while its successor is used.
        weights_NQK = (
            torch.baddbmm(
                bias_NQK[:, queries, keys], query[:, queries], key_NHK[:, :, keys], alpha=scale
            )
            .softmax(-1)
            .to(query_NQH.dtype)
        )
        yield weights_NQK, queries, keys


@matmul_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(query)


@_matmul_attention_backward.register_fake
def _(
    upstream: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return (*_matmul_attention_backward(upstream, *ctx.saved_tensors), None)


matmul_attention.register_autograd(_backward, setup_context=_keep_inputs)
