"""ALiBi's arithmetic: slopes and the bias −m·(i − j). Pure functions, always in fp32.

Source: Press, Smith and Lewis, "Train Short, Test Long" (ICLR 2022), §3, and ``get_slopes`` in the
authors' fairseq fork for head counts that are not a power of two.
"""

import functools
import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> list[float]:
    """The slopes m of all heads, in head order.

    For a power of two, the geometric sequence that starts at 2^(−8/n) with that same ratio. For
    any other n, the slopes of the largest power of two c ≤ n, then every second slope of 2c.

    Raises:
        ValueError: if ``num_heads`` is not positive.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, found {num_heads}")
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


@functools.lru_cache(maxsize=32)
def slopes_tensor(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """[heads] fp32 on ``device``. Kept: every layer asks for it, and each copy to a GPU waits for
    all work queued there."""
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def alibi_bias(slopes: Tensor, queries: range, num_keys: int) -> Tensor:
    """The bias that is added to the scaled scores: −m·(i − j), itself not scaled by 1/√d.

    Args:
        slopes: [heads] fp32.
        queries: positions i of the queries, counted from the first key.
        num_keys: keys at positions j = 0 … num_keys − 1.

    Returns:
        [heads, queries, keys] fp32; entries with j > i are positive and must be masked.
    """
    query_positions = torch.arange(queries.start, queries.stop, device=slopes.device)
    key_positions = torch.arange(num_keys, device=slopes.device)
    # Distances stay integers until here: bf16 would round every one past 256.
    distance = (query_positions[:, None] - key_positions[None, :]).to(torch.float32)
    return -slopes.to(torch.float32)[:, None, None] * distance
