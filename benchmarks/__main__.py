"""All benchmarks one after the other, and whether their ratios have held.

    python -m benchmarks            at their default sizes; results go to benchmarks/results
    python -m benchmarks --light    the smaller ones, in less than a minute; results are thrown away
    python -m benchmarks --record   what was measured becomes benchmarks/baseline.json

Exit code 1 if a ratio is worse than on record, is missing, or a benchmark fails. A ratio that seems
worse is measured once more before that is said.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import gate, harness
from benchmarks.gate import Judgement

# Each a module of this package with a parser and a measure; arguments of its run.
FULL: dict[str, tuple[str, ...]] = {
    "startup": (),
    "data": (),
    "checkpoint": (),
    "train_step": (),
    "attention": (),
    "claims": (),
    "parallel": (),
    "bubble": (),
}
LIGHT: dict[str, tuple[str, ...]] = {
    "startup": ("--light", "--rounds", "1"),
    "data": ("--light", "--rounds", "3"),
    "train_step": (
        *("--size", "tiny", "--precision", "fp32", "--cases", "ours", "transformers MPT"),
        *("--no-memory", "--rounds", "5"),
    ),
    "parallel": ("--light", "--rounds", "5"),
    "bubble": ("--light", "--rounds", "3"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, judge, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--light", action="store_true", help="the smaller set")
    parser.add_argument("--record", action="store_true", help="write the baseline")
    parser.add_argument("--only", nargs="+", choices=FULL, help="these benchmarks only")
    parser.add_argument("--baseline", type=Path, default=gate.BASELINE)
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    chosen = {
        name: given
        for name, given in (LIGHT if options.light else FULL).items()
        if not options.only or name in options.only
    }
    kind = "light" if options.light else "full"
    device = harness.device_name(harness.device())
    recorded = {
        name: values
        for name, values in gate.read_baseline(device, kind, options.baseline).items()
        if benchmark_of(name) in chosen
    }
    measured, errors = run_all(chosen, keep=not options.light, console=console)
    if options.record:
        return _record(options, device, kind, measured, errors, console)
    judgements = gate.compare(measured, recorded)
    again = {benchmark_of(judgement.name) for judgement in judgements if judgement.is_bad}
    if again:
        console.print(f"measured again: {', '.join(sorted(again))}")
        second, still = run_all(
            {name: chosen[name] for name in again}, keep=not options.light, console=console
        )
        errors = {name: error for name, error in errors.items() if name not in again} | still
        better = {name: max(value, measured.get(name, value)) for name, value in second.items()}
        judgements = gate.compare({**measured, **better}, recorded)
    _print(judgements, errors, console)
    return int(bool(errors) or any(judgement.is_bad for judgement in judgements))


def benchmark_of(ratio: str) -> str:
    return ratio.partition(": ")[0]


def run_all(
    chosen: dict[str, tuple[str, ...]], keep: bool, console: Console
) -> tuple[dict[str, float], dict[str, str]]:
    """Each benchmark in a process of its own; ``keep`` its JSON in ``benchmarks/results``.

    Returns:
        Ratios by ``BENCHMARK: NAME``, and by benchmark what went wrong.
    """
    measured: dict[str, float] = {}
    errors: dict[str, str] = {}
    for name, given in chosen.items():
        command = ["-m", f"benchmarks.{name}", *given]
        console.print(f"python {' '.join(command)}", highlight=False)
        with tempfile.TemporaryDirectory() as scratch:
            folder = harness.RESULTS if keep else Path(scratch)
            output = [] if keep else ["--output", scratch]
            started = time.time()
            done = subprocess.run(
                [sys.executable, *command, *output], text=True, capture_output=True
            )
            console.print(done.stdout.rstrip(), highlight=False, markup=False)
            if done.returncode:
                errors[name] = (done.stderr.strip() or "no message").splitlines()[-1]
                continue
            # In the folder of whatever device it measured.
            paths = folder.glob(f"*/{name}.json")
            [path] = [path for path in paths if path.stat().st_mtime >= started - 1.0]
            for ratio, values in json.loads(path.read_text())["ratios"].items():
                measured[f"{name}: {ratio}"] = values["value"]
    return measured, errors


def _record(
    options: argparse.Namespace,
    device: str,
    kind: str,
    measured: dict[str, float],
    errors: dict[str, str],
    console: Console,
) -> int:
    """Nothing is recorded of a run in which a benchmark failed."""
    if errors:
        _print([], errors, console)
        return 1
    before = gate.read_baseline(device, kind, options.baseline)
    tolerance = gate.LIGHT_TOLERANCE if options.light else gate.DEFAULT_TOLERANCE
    others = {
        name: values
        for name, values in before.items()
        if options.only and benchmark_of(name) not in options.only
    }
    values = {**others, **gate.record(measured, before, tolerance)}
    gate.write_baseline(device, kind, values, options.baseline)
    console.print(f"{options.baseline}: {len(measured)} ratios recorded for {device}, {kind}")
    return 0


def _print(judgements: list[Judgement], errors: dict[str, str], console: Console) -> None:
    table = Table("ratio (higher is better)", "measured", "baseline", "least", "verdict")
    for judgement in judgements:
        numbers = (judgement.measured, judgement.baseline, judgement.limit)
        texts = ["" if number is None else f"{number:.3f}" for number in numbers]
        table.add_row(judgement.name, *texts, judgement.verdict.value)
    console.print(table)
    for name, error in errors.items():
        console.print(f"{name} failed: {error}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
