"""Where a run's evaluations lie: ``evaluation/*.json``, one file per step, split and length."""

import json
from dataclasses import asdict

from distributed_lm.config import RunConfig
from distributed_lm.evaluation.perplexity import Perplexity


def evaluation_lengths(config: RunConfig) -> tuple[int, ...]:
    """Context lengths to score: as configured, or the trained one."""
    return config.evaluation.lengths or (config.data.sequence_length,)


def write_result(config: RunConfig, step: int, result: Perplexity) -> None:
    """One JSON file with everything that is needed to compare the number."""
    folder = config.run_dir / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{step:08d}_{result.split}_{result.protocol}_{result.length}.json"
    content = {"step": step, "run": config.name, **asdict(result)}
    (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
