"""Results of evaluations that no model was scored for."""

from typing import Any

import numpy as np

from distributed_lm.evaluation.results import Result

NO_DOCUMENTS = (np.zeros(0), np.zeros(0))


def make_result(**changes: Any) -> Result:
    """A nonoverlapping result at length 64 of step 20, with fields changed."""
    values: dict[str, Any] = {
        "run": "run",
        "step": 20,
        "checkpoint": "c" * 64,
        "position": "alibi",
        "trained_length": 64,
        "precision": "fp32",
        "split": "valid",
        "corpus_hash": "a" * 64,
        "data_digest": "d" * 64,
        "tokenizer": "b" * 64,
        "protocol": "nonoverlapping",
        "length": 64,
        "targets": "all",
        "tokens_scored": 1000,
        "loss": 1.0,
    } | changes
    return Result(**{"stride": values["length"], **values})
