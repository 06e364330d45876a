"""A study of seconds: two arms and the baseline in the other's time, two seeds."""

from pathlib import Path
from typing import Any

import yaml

SHORT, LONG, IN_ITS_TIME = "alibi-16", "sinusoidal-32", "sinusoidal-32-short"


def tiny_study(output_dir: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """The study's file as values."""
    values: dict[str, Any] = {
        "name": "tiny",
        "description": "Seconds.",
        "base": str(Path("configs/runs/study_demo.yaml").resolve()),
        "output_dir": str(output_dir),
        "fields": {
            "data.path": str(data),
            "train.steps": 12,
            "train.log_every": 2,
            "schedule.warmup_steps": 2,
            "evaluation.every": 4,
            "evaluation.max_tokens": 4096,
            "model.num_layers": 2,
            "model.hidden_size": 32,
            "model.num_attention_heads": 2,
        },
        "tokens_per_update": 512,
        "tokens_per_microbatch": 512,
        "seeds": [1, 2],
        "teraflops_per_device": 0.05,
        "arms": [
            {"name": SHORT, "position": "alibi", "length": 16},
            {"name": LONG, "position": "sinusoidal", "length": 32},
            {"name": IN_ITS_TIME, "position": "sinusoidal", "length": 32, "time_of": SHORT},
        ],
        "tuning": {"learning_rates": [1e-3, 1e-2], "fields": {"train.steps": 6}, "seed": 9},
        "speed": {"rounds": 2, "steps": 4},
        "scorings": [{"lengths": [16, 32, 64]}],
        "claims": [
            claim("no worse", (SHORT, 32), (LONG, 32), less_than=5.0),
            claim("false on purpose", (SHORT, 32), (SHORT, 16), greater_than=3.0),
            claim("too small to tell", (LONG, 32), (LONG, 32), greater_than=0.0),
            {
                "name": "halted",
                "paper": "8.92 against 9.01",
                "left": {"arm": SHORT, "length": 32},
                "right": {
                    "arm": LONG, "length": 32, "measure": "halted_loss", "time_of": SHORT,
                },
                "less_than": 0.0,
            },
            {
                "name": "memory",
                "paper": "26.2 against 29.3 GB",
                "left": {"arm": SHORT, "measure": "memory"},
                "right": {"arm": LONG, "measure": "memory"},
                "less_than": -0.9,
            },
        ],
    }  # fmt: skip
    return {**values, **changes}


def claim(
    name: str, left: tuple[str, int], right: tuple[str, int], **relation: float
) -> dict[str, Any]:
    sides = [{"arm": arm, "length": length} for arm, length in (left, right)]
    return {
        "name": name, "paper": "8.92 against 8.83", "left": sides[0], "right": sides[1], **relation,
    }  # fmt: skip


def write_study(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
