"""Compare an interrupted run with its uninterrupted reference: steps, tokens, final state."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distributed_lm.checkpoint.folders import checkpoint_path
from distributed_lm.checkpoint.plain import PlainCheckpoint
from distributed_lm.errors import DataError
from distributed_lm.tracking.metrics_file import parse_records

Records = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that pass; 0 = equal bit for bit."""

    loss: float = 0.0
    grad_norm: float = 0.0
    weights: float = 0.0
    """Of a final weight or master weight: norm of the difference over norm of the reference."""
    moments: float = 0.0
    """The same of Adam's moments."""

    @property
    def is_exact(self) -> bool:
        return self == Tolerance()


EXACT = Tolerance()
# Another layout sums in another order. Weights differ more than moments: softmax does not see the
# attention's key biases, so their gradient is rounding alone, which Adam scales up to full updates.
OTHER_LAYOUT = {
    "fp32": Tolerance(loss=5e-6, grad_norm=1e-4, weights=1e-2, moments=1e-3),
    "bf16": Tolerance(loss=2e-3, grad_norm=1e-1, weights=1e-1, moments=1e-1),
}

# Parts of a checkpoint by the start of their tensors' names.
WEIGHTS = {"weights": "model.", "master weights": "optimizer.master."}
ADAM = {"first moments": "optimizer.exp_avg.", "second moments": "optimizer.exp_avg_sq."}
NESTEROV = {"momenta": "optimizer.momentum_buffer."}


@dataclass(frozen=True)
class Verdict:
    """What one part of the comparison found."""

    part: str
    passed: bool
    finding: str


def compare_runs(
    reference: Path, drilled: Path, final_step: int, tolerance: Tolerance
) -> list[Verdict]:
    """Everything that must be equal after a drill.

    Raises:
        DataError: if a run has no record.
        CheckpointError: if a final checkpoint is missing or damaged.
    """
    return [
        *compare_records(read_records(reference), read_records(drilled), final_step, tolerance),
        *compare_states(
            PlainCheckpoint(checkpoint_path(reference, final_step)),
            PlainCheckpoint(checkpoint_path(drilled, final_step)),
            tolerance,
        ),
    ]


def read_records(run_dir: Path) -> Records:
    """step -> its train line; what was done again counts as done last."""
    path = run_dir / "metrics.jsonl"
    try:
        lines = parse_records(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return {line["step"]: line for line in lines if line["kind"] == "train"}


def compare_records(
    reference: Records, drilled: Records, final_step: int, tolerance: Tolerance
) -> list[Verdict]:
    """Loss, gradient norm and data ledger of every step."""
    steps = range(1, final_step + 1)
    missing = [step for step in steps if step not in reference or step not in drilled]
    if missing:
        return [Verdict("steps", False, f"step {missing[0]} is not on record in both runs")]
    return [
        _compare_numbers("loss", reference, drilled, tolerance.loss),
        _compare_numbers("grad_norm", reference, drilled, tolerance.grad_norm),
        _compare_digests(reference, drilled),
    ]


def _compare_numbers(name: str, reference: Records, drilled: Records, limit: float) -> Verdict:
    differences = {
        step: _relative(line[name], drilled[step][name]) for step, line in reference.items()
    }
    return _judge(name, differences, limit, f"{len(differences)} steps", "step {}".format)


def _compare_digests(reference: Records, drilled: Records) -> Verdict:
    part = "data ledger"
    for step, line in sorted(reference.items()):
        expected, found = line["data_digest"], drilled[step]["data_digest"]
        if expected != found:
            return Verdict(
                part, False, f"differs from step {step}: {expected[:16]} and {found[:16]}"
            )
    return Verdict(part, True, f"the same tokens in each of {len(reference)} steps")


def compare_states(
    reference: PlainCheckpoint, drilled: PlainCheckpoint, tolerance: Tolerance
) -> list[Verdict]:
    """Every tensor of two final checkpoints; random states only where the layout never changed,
    since another layout has other ranks to hold them."""
    parts = [(part, prefix, tolerance.weights) for part, prefix in WEIGHTS.items()]
    moments = NESTEROV if _with_prefix(reference, NESTEROV["momenta"]) else ADAM
    parts += [(part, prefix, tolerance.moments) for part, prefix in moments.items()]
    if tolerance.is_exact:
        parts.append(("random states", "random.", 0.0))
    return [_compare_part(*part, reference, drilled) for part in parts]


def _compare_part(
    part: str, prefix: str, limit: float, reference: PlainCheckpoint, drilled: PlainCheckpoint
) -> Verdict:
    names = _with_prefix(reference, prefix)
    unshared = set(names) ^ set(_with_prefix(drilled, prefix))
    if unshared or not names:
        return Verdict(part, False, f"not in both checkpoints: {min(unshared, default=prefix)}")
    differences = {
        name: tensor_difference(reference.read(name), drilled.read(name)) for name in names
    }
    return _judge(part, differences, limit, f"{len(names)} tensors", str)


def _with_prefix(names: Iterable[str], prefix: str) -> list[str]:
    return [name for name in names if name.startswith(prefix)]


def _judge(
    part: str,
    differences: dict[Any, float],
    limit: float,
    count: str,
    describe: Callable[[Any], str],
) -> Verdict:
    """Of the relative differences, the largest decides."""
    worst = max(differences, key=lambda key: differences[key])
    largest = differences[worst]
    if largest == 0.0:
        return Verdict(part, True, f"{count} equal bit for bit")
    allowed = f"at most {limit:.0e} allowed" if limit else "no difference allowed"
    return Verdict(
        part,
        largest <= limit,
        f"{count}, largest relative difference {largest:.1e} in {describe(worst)} ({allowed})",
    )


def _relative(expected: float | None, found: float | None) -> float:
    """0 only if equal; infinite where one is not a finite number."""
    if expected == found:
        return 0.0
    if expected is None or found is None:
        return math.inf
    return abs(found - expected) / max(abs(expected), 1e-30)


def tensor_difference(expected: Tensor, found: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; 0 only if equal, infinite if shape or dtype differ."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if torch.equal(expected, found):
        return 0.0
    exact, other = expected.double(), found.double()
    difference = ((other - exact).norm() / exact.norm().clamp_min(1e-300)).item()
    return difference if math.isfinite(difference) else math.inf
