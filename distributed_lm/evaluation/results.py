"""Where a run's evaluations lie: ``evaluation/*.json``, one file per result, never overwritten by a
result of something else: step, split, protocol, length, data and tokens scored are in the name."""

import json
from dataclasses import asdict

from distributed_lm.config import RunConfig
from distributed_lm.evaluation.perplexity import Perplexity


def write_result(
    config: RunConfig, step: int, result: Perplexity, data_identity: dict[str, str]
) -> None:
    """One JSON file with everything that is needed to compare the number."""
    folder = config.run_dir / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    name = (
        f"step_{step:08d}_{result.split}_{data_identity['corpus_hash'][:8]}_"
        f"{result.tokens_scored}tokens_{result.protocol}_{result.length}.json"
    )
    content = {
        "run": config.name,
        "step": step,
        "trained_length": config.data.sequence_length,
        "precision": config.precision,
        **data_identity,
        **asdict(result),
    }
    (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
