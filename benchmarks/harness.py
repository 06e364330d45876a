"""What every benchmark here needs: ceilings of the same run, interleaved timing, a table, JSON.

Machines are shared and noisy, so what is compared is timed alternately, round by round, and a ratio
is the median of the rounds' ratios: what slows a whole round down cancels.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distributed_lm import platform

RESULTS = Path(__file__).parent / "results"

MOST_CALLS = 1000
"""In one timing."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one case, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        return _quartiles(self.seconds)

    def ratio_to(self, other: "Samples") -> "Ratio":
        """How many times as long as ``other``, compared round by round."""
        return Ratio.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles over the rounds. Higher must be better where it is a result's ratio."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        return cls(statistics.median(values), *_quartiles(values))


@dataclass
class Result:
    """One benchmark's outcome, as written to JSON."""

    benchmark: str
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The table; all rows have the same keys, and units stand in the keys."""
    summary: list[dict[str, Any]] = field(default_factory=list)
    """Where the table is long, a short one of what it comes to."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """What this machine can do at best, measured in the same run; the unit is in the name."""
    ratios: dict[str, Ratio] = field(default_factory=dict)
    """What the regression gate compares: higher is better."""
    absent: dict[str, str] = field(default_factory=dict)
    """What could not be measured here, and why."""
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    """Mean number of processes that wanted a core in the minute before: noise, unless near 0."""

    def write(self, folder: Path = RESULTS) -> Path:
        """Prints the table and writes ``folder/DEVICE/NAME.json``."""
        content = {
            "benchmark": self.benchmark,
            "command": " ".join(["python -m", f"benchmarks.{self.benchmark}", *sys.argv[1:]]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "load": self.load,
            "ceilings": self.ceilings,
            "ratios": {name: asdict(ratio) for name, ratio in self.ratios.items()},
            "absent": self.absent,
            "summary": self.summary,
            "rows": self.rows,
        }
        self._print()
        path = folder / device_name(self.device) / f"{self.benchmark}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path

    def _print(self) -> None:
        console = Console(width=None if sys.stdout.isatty() else 160)
        for rows in filter(None, (self.rows, self.summary)):
            table = Table(*rows[0], title=self.benchmark)
            for row in rows:
                table.add_row(*(shown(value) for value in row.values()))
            console.print(table)
        for name, reason in self.absent.items():
            console.print(f"not measured: {name}: {reason}")
        for name, value in self.ceilings.items():
            console.print(f"ceiling: {name} {shown(value)}")
        for name, ratio in self.ratios.items():
            console.print(f"ratio: {name} {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")


def main(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Result]) -> None:
    """What ``python -m benchmarks.NAME`` does. Every benchmark module has a ``parser()`` for its
    own options and a ``measure(options)``."""
    options = arguments(parser)
    measure(options).write(options.output)


def arguments(
    parser: argparse.ArgumentParser, given: Sequence[str] | None = None
) -> argparse.Namespace:
    """Adds ``--rounds`` and ``--output``, parses ``given`` (off: the command line), and quiets the
    engines."""
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each case")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    parsed = parser.parse_args(given)
    platform.quiet_engines()
    return parsed


def alternate(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    seconds_each: float = 0.0,
) -> dict[str, Samples]:
    """Time all cases ``rounds`` times, one after the other in each round, after ``warmup``.

    A case that takes less than ``seconds_each`` is called again and again for about as long in each
    round: launching one short kernel takes longer than the kernel does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    calls = dict.fromkeys(cases, 1)
    for turn in range(warmup + rounds):
        for name, case in cases.items():
            elapsed = timed(case, device, calls[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
            elif turn == warmup - 1 and seconds_each > 0.0:
                again = timed(case, device)  # the first call may have compiled
                calls[name] = max(1, min(MOST_CALLS, round(seconds_each / again)))
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def timed(case: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call of ``calls``, waiting for the device before and after them all."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        case()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def peak_memory_bytes(case: Callable[[], Any], device: torch.device) -> int:
    """What one call takes at most beyond what is there before it: allocated on the GPU, resident on
    a CPU. Call it once before, so that what is kept for the next call is there."""
    gc.collect()
    synchronize(device)
    forget_peak_memory(device)
    before = peak_memory_so_far(device)
    case()
    synchronize(device)
    return peak_memory_so_far(device) - before


def forget_peak_memory(device: torch.device) -> None:
    """The peak becomes what is there now. On a CPU freed memory is given back to Linux first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_so_far(device: torch.device) -> int:
    """Bytes since ``forget_peak_memory``: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    [most] = [line for line in lines if line.startswith("VmHWM:")]
    return int(most.split()[1]) * 1024  # given in kB


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device() -> torch.device:
    return torch.device("cuda", 0) if platform.has_cuda() else torch.device("cpu")


def matmul_case(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A large square matrix product to time beside the cases, and its FLOPs."""
    size = 8192 if device.type == "cuda" else 1536
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return lambda: left @ right, 2.0 * size**3


def copy_case(device: torch.device) -> tuple[Callable[[], Any], float]:
    """A large copy within memory to time beside the cases, and the bytes it reads and writes."""
    elements = 1 << (28 if device.type == "cuda" else 25)
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8.0 * elements


def machine() -> dict[str, Any]:
    """Device, cores and versions, without the host's name."""
    described = platform.describe_environment()
    described.pop("host")
    described["threads"] = torch.get_num_threads()
    described["processor"] = _processor()
    if platform.has_cuda():
        described["cuda"] = torch.version.cuda
    return described


def device_name(device: torch.device) -> str:
    """``cpu``, or the GPU's name as a folder: ``nvidia-h100-80gb-hbm3``."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


def commit() -> str:
    """The commit, marked where the working tree differs from it in more than results."""
    but_results = ["--", ":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs"]
    try:
        name = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", *but_results)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent)
    return found.stdout.strip()


def _processor() -> str:
    """The CPU's name and the bf16 instructions it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([fields.get("model name", "unknown"), *bf16])


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def shown(value: Any) -> str:
    """A table's cell: four digits, or whole numbers from 1,000 on; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
