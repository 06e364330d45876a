"""Tokenise one shard of a corpus into a folder of its own, or find that this is already done.

A shard's folder holds ``{train,valid,test}.{bin,idx}`` and ``shard.json``. It is written under a
temporary name and renamed when complete, so a folder with the right name is a finished shard.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_lm.data.corpus import Skipped, read_all
from distributed_lm.data.indexed import SplitWriter, dtype_for
from distributed_lm.data.inputs import Shard
from distributed_lm.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    Record,
    SplitName,
    SplitRecord,
    find_damage,
    parse_record,
)
from distributed_lm.data.tokenizer import Tokenizer
from distributed_lm.errors import DataError

SHARD_RECORD = "shard.json"
# Often enough for a smooth bar, seldom enough to cost nothing.
_REPORT_EVERY_BYTES = 1 << 18

Report = Callable[[int, int], None]
"""Called with (documents, UTF-8 bytes) done since the last call."""


@dataclass(frozen=True)
class Recipe:
    """What is done to every document."""

    text_field: str
    seed: int
    split: tuple[float, float, float]
    """Shares of train, valid and test; they sum to 1."""


class ShardRecord(Record):
    """``shard.json``: what a finished shard holds and what it was made from."""

    format_version: int = FORMAT_VERSION
    key: str
    """Hash of recipe, tokenizer and inputs: another key is another shard."""
    splits: dict[SplitName, SplitRecord]
    skipped: dict[str, int]
    examples: dict[str, list[str]]
    """First places of each reason to skip."""


def choose_split(text: bytes, seed: int, shares: tuple[float, float, float]) -> SplitName:
    """The split of a document: a function of its text, so equal texts never fall on both sides."""
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "big")).digest()
    point = int.from_bytes(digest, "big") / 2**64
    if point < shares[0]:
        return "train"
    # A point beyond the sum of shares, by rounding, must not fall into an empty test split.
    return "valid" if point < shares[0] + shares[1] or shares[2] == 0.0 else "test"


def shard_key(shard: Shard, recipe: Recipe, fingerprint: str) -> str:
    parts: dict[str, Any] = {
        "recipe": [recipe.text_field, recipe.seed, recipe.split],
        "tokenizer": fingerprint,
        "pieces": [piece.identity() for piece in shard.pieces],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_shard(
    shard: Shard, folder: Path, recipe: Recipe, tokenizer: Tokenizer, report: Report
) -> ShardRecord:
    """Tokenise ``shard`` into ``folder / shard.name``, unless it is there and whole.

    Raises:
        DataError: naming an input file that cannot be read, or ``folder`` if the disk is full.
    """
    key = shard_key(shard, recipe, tokenizer.record.fingerprint)
    finished = read_finished_shard(folder / shard.name, key)
    if finished is not None:
        splits = finished.splits.values()
        report(sum(s.documents for s in splits), sum(s.bytes for s in splits))
        return finished
    # Another process may be at the same shard; both write the same, each under its own name.
    temporary = folder / f".{shard.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writable(folder):
            temporary.mkdir(parents=True)
            record = _tokenize(shard, temporary, key, recipe, tokenizer, report)
            shutil.rmtree(folder / shard.name, ignore_errors=True)
            os.rename(temporary, folder / shard.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn errors of writing below ``folder`` into a sentence (reading has its own).

    Raises:
        DataError: naming the folder and what the system said.
    """
    try:
        yield
    except ConnectionError:  # an OSError, but it means that the parent process is gone
        raise
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror or error}); free space or change its "
            "permissions and run the same command again, which keeps the finished shards"
        ) from None


def read_finished_shard(folder: Path, key: str, check_hashes: bool = True) -> ShardRecord | None:
    """The record of the finished shard in ``folder``; None if absent, damaged or another's."""
    path = folder / SHARD_RECORD
    try:
        record = parse_record(ShardRecord, path, path.read_text(encoding="utf-8"), "")
    except (OSError, UnicodeDecodeError, DataError):
        return None
    if record.key != key:
        return None
    if not check_hashes:
        return record
    damaged = any(find_damage(folder / split, record.splits[split]) for split in SPLITS)
    return None if damaged else record


def _tokenize(
    shard: Shard, folder: Path, key: str, recipe: Recipe, tokenizer: Tokenizer, report: Report
) -> ShardRecord:
    dtype, end = dtype_for(tokenizer.vocab_size), tokenizer.end_of_document
    writers = {split: SplitWriter(folder / split, dtype, end) for split in SPLITS}
    skipped = Skipped()
    documents = size = 0
    own_split = shard.pieces[0].split
    with contextlib.ExitStack() as files:
        for writer in writers.values():
            files.enter_context(writer)
        for text in read_all(shard.pieces, recipe.text_field, skipped):
            encoded = text.encode("utf-8")
            split = own_split or choose_split(encoded, recipe.seed, recipe.split)
            writers[split].add(tokenizer.encode(text), len(encoded))
            documents, size = documents + 1, size + len(encoded)
            if size >= _REPORT_EVERY_BYTES:
                report(documents, size)
                documents = size = 0
    report(documents, size)
    record = ShardRecord(
        key=key,
        splits={split: writer.finish() for split, writer in writers.items()},
        skipped=dict(skipped.counts),
        examples=skipped.examples,
    )
    write_durably(folder / SHARD_RECORD, record.model_dump_json(indent=2))
    return record


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is on disk, whole, before anything that follows."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
