"""How long until the command line answers, and until the first training step?

Whole processes, from nothing: limits are 0.5 s for ``--help`` and 1 s for what plans without torch.
The first step is that of ``configs/runs/smoke.yaml`` on one process, over prepared bytes; beside it
the import of torch alone, which no run can be quicker than.

    python -m benchmarks.startup [--light]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.data import speeches_folder
from benchmarks.harness import Result, Samples

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[1] / "configs"
SMOKE = str(CONFIGS / "runs" / "smoke.yaml")
PAPER = str(CONFIGS / "runs" / "alibi_1p3b_L1024.yaml")
HELP_LIMIT, PLAN_LIMIT = 0.5, 1.0
# What the command line itself is made of: importing it is the least that an answer takes.
LIBRARIES = "import typer.rich_utils, pydantic, omegaconf, numpy"

Command = Callable[[], object]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--light", action="store_true", help="without the first step")
    return parser


def measure(options: argparse.Namespace) -> Result:
    result = Result("startup", CPU)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).resolve()
        data = str(folder / "bytes")
        texts = str(speeches_folder())
        prepare = ["prepare-data", "--output", data, "--tokenizer", "bytes"]
        module("distributed_lm", *prepare, "--split", "0.9,0.05,0.05", texts)()
        place = [f"data.path={data}", f"output_dir={folder / 'runs'}"]
        cluster = ["--cluster", str(CONFIGS / "clusters" / "h100_8x16.yaml")]
        test_cluster = ["--cluster", str(CONFIGS / "clusters" / "local_test.yaml")]
        cases: dict[str, tuple[float | None, Command]] = {
            "import of the command line's libraries": (None, python("-c", LIBRARIES)),
            "distributed-lm --help": (HELP_LIMIT, module("distributed_lm", "--help")),
            "launch slurm --dry-run": (
                PLAN_LIMIT,
                module("launch", "slurm", SMOKE, *place, *test_cluster, "--dry-run"),
            ),
        }
        if has_command("plan"):
            plan = module("distributed_lm", "plan", PAPER, *cluster)
            cases["distributed-lm plan"] = (PLAN_LIMIT, plan)
        timed = {name: case for name, (_, case) in cases.items()}
        samples = harness.alternate(timed, 2 * options.rounds, CPU)
        for name, (limit, _) in cases.items():
            result.rows.append(_row(name, samples[name], limit))
        if not options.light:
            _measure_first_step(result, folder, place, options.rounds)
    if not has_command("plan"):
        result.rows.append({"what": "distributed-lm plan", "seconds": "no such command",
                            "limit, s": PLAN_LIMIT, "within": ""})  # fmt: skip
    libraries = samples["import of the command line's libraries"]
    result.ceilings["import of the libraries, s"] = libraries.median
    for name, sample in samples.items():
        if sample is not libraries:
            result.ratios[f"{name}: speed to importing its libraries"] = libraries.ratio_to(sample)
    return result


def _measure_first_step(result: Result, folder: Path, place: list[str], rounds: int) -> None:
    imports = python("-c", "import torch, deepspeed, megatron.core")
    seconds: dict[str, list[float]] = {"import of torch and the engines": [], "first step": []}
    for number in range(rounds):
        seconds["import of torch and the engines"].append(harness.timed(imports, CPU))
        started = time.time()
        fields = [*place, f"name=run{number}", "train.steps=1", "tracking.wandb=disabled"]
        module("distributed_lm", "train", SMOKE, *fields)()
        lines = (folder / "runs" / f"run{number}" / "metrics.jsonl").read_text().splitlines()
        [step] = [line for line in map(json.loads, lines) if line["kind"] == "train"]
        seconds["first step"].append(step["time"] - started)
    samples = {name: Samples(tuple(values)) for name, values in seconds.items()}
    for name, sample in samples.items():
        result.rows.append(_row(name, sample, None))
    imports_alone = samples["import of torch and the engines"]
    ratio = imports_alone.ratio_to(samples["first step"])
    result.ratios["first step: speed to importing the engines"] = ratio


def _row(name: str, sample: Samples, limit: float | None) -> dict[str, object]:
    return {
        "what": name,
        "seconds": sample.median,
        "limit, s": limit or "",
        "within": "" if limit is None else str(sample.median < limit),
    }


def module(name: str, *arguments: str) -> Command:
    """``python -m name arguments``, to be called."""
    return python("-m", name, *arguments)


def python(*arguments: str) -> Command:
    command: Sequence[str] = (sys.executable, *arguments)

    def start() -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")

    return start


def has_command(name: str) -> bool:
    """Whether ``distributed-lm`` has it."""
    command = [sys.executable, "-m", "distributed_lm", name, "--help"]
    return subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    harness.main(parser(), measure)
