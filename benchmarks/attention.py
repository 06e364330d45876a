"""What does ALiBi cost in the attention kernel? Every backend against PyTorch's own causal kernel
without a bias, and FlashAttention-2 without one where it is installed.

TFLOP/s counts the causal half: 2 matrix products forward and 5 backward, of L²/2 scores each. Each
backend is first compared with the reference, on this device. Peak memory is what a call takes
beyond its inputs, the bias included, which all layers of a model share.

    python -m benchmarks.attention [--lengths 512,1024,…]
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Result, Samples
from distributed_lm import platform
from distributed_lm.config import ModelConfig
from distributed_lm.model.attention_backends import BACKENDS
from distributed_lm.model.backend_choice import unavailable_reason
from distributed_lm.model.positions import HeadSlice, PositionMethod, build_position

UNBIASED = {f"{backend}, no bias": backend for backend in ("sdpa", "flash", "matmul")}
BASELINE = "sdpa, no bias"
PASSES = ("forward", "forward + backward")
PRODUCTS = {"forward": 2, "forward + backward": 7}
# Of the norm of output and gradients; bf16 rounds inputs, weights and output once each.
TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
# [B, N, L, L] fp32 that the reference has at once: scores, with bias, weights, and two gradients.
REFERENCE_COPIES = 5
LENGTHS = {"cpu": "512,1024,2048,4096", "cuda": "512,1024,2048,4096,8192,16384"}
LONGEST_FP32 = {"cpu": 16384, "cuda": 1024}
# A GPU needs many tokens to be busy; on a CPU more only take longer.
TOKENS = {"cpu": 2048, "cuda": 16384}
HEADS = {"cpu": 4, "cuda": 16}


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype
    head_dim: int
    length: int
    heads: int
    tokens: int
    """In all sequences together, at least one."""

    @property
    def sequences(self) -> int:
        return max(1, self.tokens // self.length)

    @property
    def name(self) -> str:
        return f"{dtype_name(self.dtype)}, head dim {self.head_dim}, L={self.length}"

    def flops(self, which: str) -> float:
        """2 operations for each multiply-add of the scores below the diagonal."""
        scores = self.sequences * self.heads * self.length**2 / 2
        return PRODUCTS[which] * 2.0 * scores * self.head_dim

    def reference_bytes(self) -> int:
        return REFERENCE_COPIES * 4 * self.sequences * self.heads * self.length**2


def parser() -> argparse.ArgumentParser:
    device = harness.device().type
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default=LENGTHS[device], help="tokens, with commas")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--precisions", default="bf16,fp32")
    longest = LONGEST_FP32[device]
    parser.add_argument("--longest-fp32", type=int, default=longest, help="tokens")
    parser.add_argument("--heads", type=int, default=HEADS[device])
    parser.add_argument("--tokens", type=int, default=TOKENS[device], help="per batch")
    return parser


def measure(options: argparse.Namespace) -> Result:
    device = harness.device()
    result = Result("attention", device)
    shapes = [
        Shape(platform.DTYPES[precision], head_dim, length, options.heads, options.tokens)
        for precision in options.precisions.split(",")
        for head_dim in _numbers(options.head_dims)
        for length in _numbers(options.lengths)
        if precision != "fp32" or length <= options.longest_fp32
    ]
    limit = memory_limit(device)
    for dtype in dict.fromkeys(shape.dtype for shape in shapes):
        for backend in BACKENDS:
            reason = unavailable_reason(
                backend, position_method("alibi", options.heads), device, dtype
            )
            if reason:
                result.absent[f"{backend}, {dtype_name(dtype)}"] = reason
    matmul: dict[str, list[float]] = {}
    for shape in shapes:
        if shape.reference_bytes() > limit:
            result.absent[f"reference, {shape.name}"] = (
                f"would take about {shape.reference_bytes() / 2**30:.0f} GiB, and "
                f"{limit / 2**30:.0f} GiB are free for it"
            )
        errors = check(_checked(shape, shapes), device, limit)
        ceiling = _measure_shape(result, shape, errors, options.rounds, limit)
        matmul.setdefault(dtype_name(shape.dtype), []).append(ceiling)
    for precision, rates in matmul.items():
        result.ceilings[f"matrix product, {precision}, TFLOP/s"] = statistics.median(rates)
    return result


def position_method(name: str, heads: int) -> PositionMethod:
    model = ModelConfig(num_layers=1, hidden_size=heads, num_attention_heads=heads, position=name)
    return build_position(model, HeadSlice(0, heads, heads))


def kernels(shape: Shape, device: torch.device, limit: float) -> dict[str, Callable[..., Tensor]]:
    """What can run here: the baselines without a bias first, then the backends with ALiBi's."""
    unbiased = position_method("none", shape.heads)
    found = {
        label: partial(BACKENDS[name], position=unbiased)
        for label, name in UNBIASED.items()
        if not unavailable_reason(name, unbiased, device, shape.dtype)
    }
    for name, backend in BACKENDS.items():
        position = position_method("alibi", shape.heads)
        fits = name != "reference" or shape.reference_bytes() <= limit
        if fits and not unavailable_reason(name, position, device, shape.dtype):
            found[name] = partial(backend, position=position)
    return found


@functools.lru_cache
def check(shape: Shape, device: torch.device, limit: float) -> dict[str, float]:
    """Each ALiBi kernel's largest relative error of output and gradients, from the reference.

    Raises:
        RuntimeError: if one is wrong.
    """
    leaves, upstream = draw(shape, device)
    reference = partial(BACKENDS["reference"], position=position_method("alibi", shape.heads))
    expected = _output_and_gradients(reference, leaves, upstream)
    errors = {}
    for name, kernel in kernels(shape, device, limit).items():
        if name in (*UNBIASED, "reference"):
            continue
        live = _output_and_gradients(kernel, leaves, upstream)
        errors[name] = max(
            float((one - other).norm() / other.norm())
            for one, other in zip(live, expected, strict=True)
        )
        if not errors[name] < TOLERANCES[shape.dtype]:
            raise RuntimeError(f"{name} is wrong by {errors[name]:.2g} at {shape.name}")
    return errors


def draw(shape: Shape, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Query, key, value [B, N, L, H], laid out as Megatron hands them over, and a gradient."""
    generator = torch.Generator(device).manual_seed(shape.length)
    size = (shape.length, shape.sequences, shape.heads, shape.head_dim)
    tensors = [
        torch.randn(size, device=device, generator=generator).to(shape.dtype).permute(1, 2, 0, 3)
        for _ in range(4)
    ]
    return [tensor.requires_grad_() for tensor in tensors[:3]], tensors[3]


def memory_limit(device: torch.device) -> float:
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return 4.0 * 2**30


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in platform.DTYPES.items() if value == dtype)


def _checked(shape: Shape, shapes: list[Shape]) -> Shape:
    """Where the reference is cheap, and bf16 cannot tell the distances apart any more."""
    lengths = sorted({other.length for other in shapes})
    return replace(shape, length=max([lengths[0], *(n for n in lengths if n <= 1024)]))


def _measure_shape(
    result: Result, shape: Shape, errors: dict[str, float], rounds: int, limit: float
) -> float:
    """Adds rows and a ratio. Returns the TFLOP/s of a large matrix product beside them."""
    device = result.device
    leaves, upstream = draw(shape, device)
    running = kernels(shape, device, limit)
    cases = _cases(running, leaves, upstream)
    product, product_flops = harness.matmul_case(device, shape.dtype)
    samples = harness.alternate(
        {**cases, "matmul": product}, rounds, device, warmup=2, seconds_each=0.02
    )
    ceiling = product_flops / samples["matmul"].median / 1e12
    anew = _cases(kernels(shape, device, limit), leaves, upstream)  # whose bias is yet to be made
    for which in PASSES:
        baseline = samples[f"{BASELINE}, {which}"]
        for name in running:
            case = f"{name}, {which}"
            memory = harness.peak_memory_bytes(anew[case], device)
            row = _row(shape, name, which, samples[case], baseline, ceiling)
            result.rows.append({**row, "peak MiB": memory / 2**20, "error": errors.get(name)})
    both = {name: samples[f"{name}, forward + backward"] for name in running}
    unbiased, biased = (
        min((both[name] for name in running if name in names), key=lambda case: case.median)
        for names in (UNBIASED, BACKENDS)
    )
    ratio = unbiased.ratio_to(biased)
    result.ratios[f"no bias / ALiBi, each with its fastest, {shape.name}"] = ratio
    rates = {
        f"{name}, TFLOP/s": shape.flops(PASSES[-1]) / both[name].median / 1e12
        if name in both
        else None
        for name in (*UNBIASED, *BACKENDS)
    }
    result.summary.append(
        {
            "precision": dtype_name(shape.dtype),
            "head dim": shape.head_dim,
            "L": shape.length,
            **rates,
            "matrix product, TFLOP/s": ceiling,
            "no bias / ALiBi": ratio.value,
        }
    )
    return ceiling


def _cases(
    running: dict[str, Callable[..., Tensor]], leaves: list[Tensor], upstream: Tensor
) -> dict[str, Callable[[], Any]]:
    cases: dict[str, Callable[[], Any]] = {}
    for name, kernel in running.items():
        # With gradients in both: what training's forward does, and compiled once.
        cases[f"{name}, forward"] = partial(kernel, *leaves)
        cases[f"{name}, forward + backward"] = partial(_forward_backward, kernel, leaves, upstream)
    return cases


def _row(
    shape: Shape, name: str, which: str, case: Samples, baseline: Samples, ceiling: float
) -> dict[str, Any]:
    rate = shape.flops(which) / case.median / 1e12
    low, high = case.quartiles()
    return {
        "precision": dtype_name(shape.dtype),
        "head dim": shape.head_dim,
        "L": shape.length,
        "sequences": shape.sequences,
        "pass": which,
        "kernel": name,
        "ms": case.median * 1e3,
        "quartiles": f"{low * 1e3:.3g}–{high * 1e3:.3g}",
        "TFLOP/s": rate,
        "of matrix product": rate / ceiling,
        "time / sdpa without bias": case.ratio_to(baseline).value,
    }


def _forward_backward(
    kernel: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(kernel(*leaves), leaves, upstream)


def _output_and_gradients(
    kernel: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    output = kernel(*leaves)
    gradients = torch.autograd.grad(output, leaves, upstream)
    return [output.detach().float(), *(gradient.float() for gradient in gradients)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    harness.main(parser(), measure)
