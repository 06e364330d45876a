"""Writes ``docs/benchmarks.md`` and its plots from the results that are there.

python -m benchmarks.report
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from benchmarks import harness, plots

DOCS = Path(__file__).parents[1] / "docs"
TEMPLATE = Path(__file__).with_name("report.md.jinja")
GPU_COMMAND = "python -m benchmarks.gpu"

# By name, in the order of the page: title, what it asks, and whether it wants a GPU.
SECTIONS: dict[str, tuple[str, str, bool]] = {
    "train_step": (
        "Training step",
        "A whole step (forward, backward, clipping, update) of an ALiBi model: ours, Hugging "
        "Face's MPT and plain torch, same shape and tokens. Goal on one H100 for the 1.3B shape in "
        "bf16: 546 TFLOP/s, 62,000 tokens/s; on a CPU: 1.5 times MPT's tokens/s in bf16, 1.25 "
        "times in fp32.",
        True,
    ),
    "attention": (
        "Attention kernels",
        "ALiBi in each backend against PyTorch's causal kernel without a bias; TFLOP/s of forward "
        "and backward together.",
        True,
    ),
    "claims": (
        "The paper's claims about cost",
        'Whole training steps. Left over right: below 1, the left is cheaper. "Materialised" is '
        'the reference, which holds all scores in memory as the paper\'s models did; "fused" is '
        "what `attention.backend: auto` chooses. The other length has the same tokens per step and "
        "microbatch. Goal: ALiBi within 1% of sinusoidal in time and within 10 MB of memory. On a "
        "GPU it is the paper's 1.3B model; on a CPU one of 23M parameters in fp32, where attention "
        "is three times that share of the work, and resident memory has the libraries in it.",
        True,
    ),
    "parallel": ("Layouts", "Two processes against one with as many cores, same batch.", False),
    "bubble": ("The pipeline's bubble", "Measured against (p − 1) / (v · m).", False),
    "data": ("Data", "Text to tokens, and tokens to batches.", False),
    "checkpoint": ("Checkpoints", "Saving and loading against a plain copy.", False),
    "startup": ("Start-up", "What a user waits for.", False),
}


def main() -> None:
    results = load(harness.RESULTS)
    (DOCS / "benchmarks.md").write_text(render(results, DOCS / "images"))


def load(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """By benchmark and device, what ``Result.write`` wrote."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        results.setdefault(path.stem, {})[path.parent.name] = json.loads(path.read_text())
    return results


def render(results: dict[str, dict[str, dict[str, Any]]], images: Path) -> str:
    """The page; plots go to ``images``."""
    images.mkdir(parents=True, exist_ok=True)
    others = {name: (name, "", False) for name in sorted(results) if name not in SECTIONS}
    sections = []
    for name, (title, words, wants_gpu) in {**SECTIONS, **others}.items():
        outcomes = results.get(name, {})
        missing = {}
        if "cpu" not in outcomes:
            missing["CPU"] = f"python -m benchmarks.{name}"
        if wants_gpu and not set(outcomes) - {"cpu"}:
            missing["GPU"] = GPU_COMMAND
        sections.append(
            {
                "title": title,
                "words": words,
                "outcomes": [
                    _outcome(name, device, content, images) for device, content in outcomes.items()
                ],
                "missing": missing,
            }
        )
    environment = Environment(  # Markdown, not HTML
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    page = environment.from_string(TEMPLATE.read_text()).render(sections=sections)
    return re.sub(r"\n{3,}", "\n\n", page).rstrip() + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown; columns that are empty in all rows are left out."""
    columns = [
        name for name in rows[0] if any(row[name] is not None and row[name] != "" for row in rows)
    ]
    lines = [columns, ["---"] * len(columns)]
    lines += [[harness.shown(row[name]) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _outcome(name: str, device: str, content: dict[str, Any], images: Path) -> dict[str, Any]:
    ratios = [
        {"ratio": what, "median": one["value"], "quartiles": f"{one['low']:.3g}–{one['high']:.3g}"}
        for what, one in content["ratios"].items()
    ]
    short = [content["summary"]] if content["summary"] else [content["rows"], ratios]
    details = [content["rows"], ratios] if content["summary"] else []
    plot = f"benchmark_{name}_{device}.png"
    return {
        "device": "CPU" if device == "cpu" else content["machine"]["devices"],
        "command": content["command"],
        "machine": _machine(content["machine"]),
        "commit": content["commit"],
        "date": datetime.fromisoformat(content["date"]).strftime("%Y-%m-%d"),
        "load": f"{content['load']:.1f}",
        "plot": plot if plots.draw(name, content, images / plot) else None,
        "short": "\n\n".join(table(rows) for rows in short if rows),
        "details": "\n\n".join(table(rows) for rows in details if rows),
        "ceilings": ", ".join(
            f"{what} {harness.shown(value)}" for what, value in content["ceilings"].items()
        ),
        "absent": content["absent"],
    }


def _machine(machine: dict[str, Any]) -> str:
    parts = [f"{machine['processor']}, {machine['cpus']} cores, {machine['threads']} threads"]
    if "cuda" in machine:
        parts.insert(0, f"{machine['devices']}, CUDA {machine['cuda']}")
    names = ("python", "torch", "megatron-core", "deepspeed")
    return " · ".join([*parts, ", ".join(f"{name} {machine[name]}" for name in names)])


if __name__ == "__main__":
    main()
