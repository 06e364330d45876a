"""A small WikiText: real text in the form of the hub's data set, and a tiny model for it."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

HUB_CONFIG = "wikitext-103-v1"
# Of the speeches: (train, validation, test).
SPLITS = {"train": slice(0, 12), "validation": slice(12, 14), "test": slice(14, 16)}

README = """---
configs:
- config_name: wikitext-103-v1
  data_files:
  - split: test
    path: wikitext-103-v1/test-*
  - split: train
    path: wikitext-103-v1/train-*
  - split: validation
    path: wikitext-103-v1/validation-*
---
"""

# The paper's model, scaled: every part of it is there.
ADAPTIVE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": None,
    "activation": "relu",
    "final_norm": False,
    "initialization": "fairseq",
    "adaptive": {"cutoffs": [64, 128], "factor": 2},
}
DROPOUT: dict[str, Any] = {
    **ADAPTIVE,
    "adaptive": {**ADAPTIVE["adaptive"], "dropout": 0.2},
    "dropout": {"hidden": 0.3, "attention": 0.1, "activation": 0.1},
}
NAG: dict[str, Any] = {
    "kind": "nag",
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "clip_grad_norm": 0.1,
}


def rows_of(speeches: list[Path]) -> list[str]:
    """Lines as the hub has them: an article is a blank row, its title, a blank row, its text."""
    rows = []
    for speech in speeches:
        rows += ["", f" = {speech.stem} = \n", ""]
        for line in speech.read_text(encoding="utf-8").splitlines():
            words = re.findall(r"\w+|[^\w\s]", line)
            rows.append(f" {' '.join(words)} \n" if words else "")
    return rows


def write_hub_folder(folder: Path, speeches: list[Path]) -> dict[str, list[str]]:
    """The data set's files, and the rows of each split. Training is in two files that part an
    article."""
    import pyarrow
    import pyarrow.parquet

    (folder / HUB_CONFIG).mkdir(parents=True)
    (folder / "README.md").write_text(README)
    rows = {split: rows_of(speeches[part]) for split, part in SPLITS.items()}
    for split, lines in rows.items():
        files = 2 if split == "train" else 1
        edges = [math.ceil(len(lines) * number / files) for number in range(files + 1)]
        for number, (start, stop) in enumerate(pairwise(edges)):
            name = f"{split}-{number:05d}-of-{files:05d}.parquet"
            table = pyarrow.table({"text": lines[start:stop]})
            pyarrow.parquet.write_table(table, folder / HUB_CONFIG / name)
    return rows
