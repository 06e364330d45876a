"""Whole runs of ``configs/runs/smoke.yaml`` through the ``train`` command, and what they wrote."""

import json
from pathlib import Path
from typing import Any

from distributed_lm.config import RunConfig, load_config
from tests.support.ranks import run_distributed

SMOKE = "configs/runs/smoke.yaml"


def train_run(config: RunConfig) -> None:
    from distributed_lm.train import train

    train(config)


class Runs:
    """Starts smoke runs with overrides and reads their records."""

    def __init__(self, data: Path, output_dir: Path) -> None:
        self.fixed = [f"data.path={data}", f"output_dir={output_dir}", "tracking.wandb=disabled"]

    def config(self, name: str, *overrides: str) -> RunConfig:
        return load_config(SMOKE, [*self.fixed, f"name={name}", *overrides])

    def train(self, name: str, *overrides: str, world_size: int = 1) -> dict[str, list[Any]]:
        config = self.config(name, *overrides)
        run_distributed(train_run, world_size, config)
        return self.records(config)

    @staticmethod
    def records(config: RunConfig) -> dict[str, list[Any]]:
        lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
        records: dict[str, list[Any]] = {"train": [], "evaluation": [], "event": []}
        for line in map(json.loads, lines):
            records[line["kind"]].append(line)
        return records


def losses(records: dict[str, list[Any]]) -> list[float]:
    """The ``loss`` column of a run's train lines."""
    return [line["loss"] for line in records["train"]]


def messages(records: dict[str, list[Any]], event: str) -> list[str]:
    """What the events of that name say."""
    return [line["message"] for line in records["event"] if line["event"] == event]
