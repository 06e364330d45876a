"""Which attention kernel runs: the one asked for, or the fastest that fits."""

import importlib.util

import torch

from distributed_lm.errors import ConfigError
from distributed_lm.model.attention_backends import has_trained_bias
from distributed_lm.model.positions import PositionMethod

WITHOUT_DROPOUT = ("matmul", "flex")


def choose_backend(
    name: str,
    position: PositionMethod,
    device: torch.device,
    dtype: torch.dtype,
    dropout: float = 0.0,
) -> str:
    """The backend to use: ``name``, or for ``auto`` the fastest that fits.

    Raises:
        ConfigError: if the backend asked for cannot do this position method on this device in this
            dtype.
    """
    if name == "auto":
        return _fastest(position, device, dtype, dropout)
    problem = unavailable_reason(name, position, device, dtype)
    if name in WITHOUT_DROPOUT and dropout > 0.0:
        problem = problem or f"it has no dropout, and model.dropout.attention={dropout}"
    if problem:
        raise ConfigError(f"attention.backend={name}: {problem}; use attention.backend=auto")
    return name


def unavailable_reason(
    name: str, position: PositionMethod, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why backend ``name`` cannot train here, or None if it can."""
    if name == "matmul":
        return _matmul_obstacle(position, device)
    if name == "flex":
        return _flex_obstacle(position, device)
    if name == "flash":
        return _flash_obstacle(position, device, dtype)
    return None


def _fastest(
    position: PositionMethod, device: torch.device, dtype: torch.dtype, dropout: float
) -> str:
    if dropout > 0.0:
        return "sdpa"
    if device.type == "cuda":
        # Without a bias, scaled-dot-product attention is causal by itself and fused.
        return "flex" if position.has_bias and _flex_obstacle(position, device) is None else "sdpa"
    fits = dtype == torch.bfloat16 and _matmul_obstacle(position, device) is None
    return "matmul" if fits else "sdpa"


def _matmul_obstacle(position: PositionMethod, device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is for CPUs"
    if has_trained_bias(position):
        return f"{type(position).__name__}'s bias is trained, and would get no gradient"
    return None


def _flex_obstacle(position: PositionMethod, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "FlexAttention has no backward on CPU"
    if position.has_bias and type(position).score_mod is PositionMethod.score_mod:
        return f"{type(position).__name__} has no score_mod"
    return None


def _flash_obstacle(
    position: PositionMethod, device: torch.device, dtype: torch.dtype
) -> str | None:
    if device.type != "cuda":
        return "FlashAttention-2 needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if dtype == torch.float32:
        return "FlashAttention-2 takes precision=bf16 or fp16, not fp32"
    if position.has_bias and position.linear_slopes is None:
        return f"{type(position).__name__}'s bias is not linear"
    return None
