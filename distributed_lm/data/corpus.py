"""Read the documents of a piece of a corpus, counting what has to be left out.

A document that is not usable (not UTF-8, empty, no text field) is skipped, counted and reported
with the first few places. A file that is not readable stops the work: a training set that
silently lacks half a file is worse than an error.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from distributed_lm.data.inputs import Piece
from distributed_lm.data.openers import hub_rows, open_bytes, open_parquet, unreadable
from distributed_lm.data.wikitext import articles
from distributed_lm.errors import DataError

INVALID_UTF8 = "invalid UTF-8"
EMPTY = "empty document"
BROKEN_JSON = "broken JSON line"
NO_FIELD = "no text field"
NOT_TEXT = "text field is not a string"

EXAMPLES_PER_REASON = 3


class Skipped:
    """Documents left out: how many for each reason, and where the first of them stand."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, place: str) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES_PER_REASON:
            examples.append(place)


def read_all(pieces: Iterable[Piece], text_field: str, skipped: Skipped) -> Iterator[str]:
    """The usable documents of ``pieces`` in order; each holds something besides white space.

    Raises:
        DataError: naming a file that cannot be read to its end.
    """
    readers = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "hub": _read_hub,
        "wikitext": _read_wikitext,
    }
    for piece in pieces:
        for value, place in readers[piece.format](piece, text_field, skipped):
            text = _usable_text(value, place, skipped)
            if text is not None:
                yield text


def _usable_text(value: Any, place: str, skipped: Skipped) -> str | None:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            skipped.add(INVALID_UTF8, place)
            return None
    if not isinstance(value, str):
        skipped.add(NOT_TEXT, place)
        return None
    if not value.strip():
        skipped.add(EMPTY, place)
        return None
    if not value.isascii() and _has_surrogates(value):
        skipped.add(INVALID_UTF8, place)
        return None
    return value


def _has_surrogates(text: str) -> bool:
    """JSON may spell half of a surrogate pair, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _read_text(piece: Piece, text_field: str, skipped: Skipped) -> Iterator[tuple[Any, str]]:
    with open_bytes(piece.path) as stream:
        content = stream.read()
    yield content.removeprefix(b"\xef\xbb\xbf"), piece.path


def _read_jsonl(piece: Piece, text_field: str, skipped: Skipped) -> Iterator[tuple[Any, str]]:
    for line, place in _lines(piece):
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            skipped.add(INVALID_UTF8, place)
            continue
        except (ValueError, RecursionError):
            skipped.add(BROKEN_JSON, place)
            continue
        if not isinstance(row, dict) or text_field not in row:
            found = f" (found: {', '.join(row)})"[:100] if isinstance(row, dict) else ""
            skipped.add(NO_FIELD, place + found)
            continue
        yield row[text_field], place


def _lines(piece: Piece) -> Iterator[tuple[bytes, str]]:
    """Non-blank lines that begin in the piece's byte range, with their places."""
    compressed = piece.path.endswith(".gz")
    with open_bytes(piece.path) as stream:
        if piece.start:
            # The line under way at ``start`` belongs to the piece before.
            stream.seek(piece.start - 1)
            stream.readline()
        place, number = stream.tell(), 0
        while compressed or place < piece.stop:
            line = stream.readline()
            if not line:
                return
            number += 1
            if line.strip():
                at = f":{number}" if piece.start == 0 else f" at byte {place}"
                yield line.removeprefix(b"\xef\xbb\xbf"), piece.path + at
            place += len(line)


def _read_parquet(piece: Piece, text_field: str, skipped: Skipped) -> Iterator[tuple[Any, str]]:
    import pyarrow

    file = open_parquet(piece.path)
    if text_field not in file.schema_arrow.names:
        raise DataError(
            f"{piece.path}: has no column {text_field!r}, found "
            f"{', '.join(file.schema_arrow.names)}; name one with --text-field"
        )
    row = 0
    groups = range(piece.start, piece.stop)
    try:
        for batch in file.iter_batches(1024, row_groups=groups, columns=[text_field]):
            column = batch.column(0)
            if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                # As bytes: one invalid string must not fail the whole batch.
                column = column.cast(pyarrow.large_binary())
            for value in column:
                yield value.as_py(), f"{piece.path}: row {row} from row group {piece.start}"
                row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(unreadable(piece.path, error)) from None


def _read_hub(piece: Piece, text_field: str, skipped: Skipped) -> Iterator[tuple[Any, str]]:
    rows = hub_rows(piece.path, piece.config or None, piece.hub_split, piece.start, piece.stop)
    for number, row in enumerate(rows):
        place = f"{piece.path}: row {number} of shard {piece.start}"
        if text_field in row:
            yield row[text_field], place
        else:
            skipped.add(NO_FIELD, f"{place} (found: {', '.join(row)})"[:200])


def _read_wikitext(piece: Piece, text_field: str, skipped: Skipped) -> Iterator[tuple[Any, str]]:
    yield from articles(_read_hub(piece, text_field, skipped))
