"""WikiText's form: three splits of its own, a row for each line, articles under ``= Title =``."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from distributed_lm.data.manifest import SplitName

HUB_SPLITS: dict[str, SplitName] = {"train": "train", "validation": "valid", "test": "test"}
"""The data set's names of the splits, and ours."""

# Sections are "= = Title = =".
_TITLE = re.compile(r"\s*= [^=]+ =\s*")


def articles(rows: Iterable[tuple[Any, str]]) -> Iterator[tuple[Any, str]]:
    """Join lines to articles: documents are shuffled, so a line must not be one.

    An article begins with a title line after an empty one. No line is lost, also no empty one, so
    that the articles in order are the rows in order. What is not text is handed on as it is.

    Args:
        rows: each with the place it stands.
    """
    lines: list[str] = []
    begun = ""
    for row, place in rows:
        if not isinstance(row, str):
            yield row, place
            continue
        is_after_blank = not lines or not lines[-1].strip()
        if is_after_blank and _TITLE.fullmatch(row) and any(line.strip() for line in lines):
            yield "".join(lines), begun
            lines = []
        begun = begun if lines else place
        lines.append(row.rstrip("\n") + "\n")
    if lines:
        yield "".join(lines), begun
