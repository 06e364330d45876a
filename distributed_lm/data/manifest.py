"""The manifest of a prepared data set: what it holds, and how to tell that it is whole.

A data set is a folder with ``{train,valid,test}.{bin,idx}`` in Megatron's format and a
``manifest.json``, written last: a folder without one is not a data set. Imports no torch.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from distributed_lm.errors import DataError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")
WORK_SUFFIX = ".partial"
"""``prepare-data --output X`` works in ``X.partial`` and renames to ``X`` at the end."""

# Header (magic, version, dtype, two counts), then int32 lengths, int64 pointers and int64
# document ends (one more than documents); see data/indexed.py.
_IDX_HEADER_BYTES = 34
_IDX_BYTES_PER_DOCUMENT = 4 + 8 + 8

NonNegative = Annotated[int, Field(ge=0)]
AnyRecord = TypeVar("AnyRecord", bound="Record")


class Record(pydantic.BaseModel):
    """One of the JSON files that we write beside data."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SplitRecord(Record):
    """One of train, valid and test."""

    documents: NonNegative
    tokens: NonNegative
    """Including one end-of-document token per document."""
    bytes: NonNegative
    """UTF-8 bytes of the text, for perplexity per byte."""
    bin_sha256: str
    idx_sha256: str


class TokenizerRecord(Record):
    kind: Literal["gpt2", "bytes", "words", "bpe", "json"]
    fingerprint: str
    """SHA-256 of what determines the token ids: equal means the same ids for the same text."""
    file: str | None = None
    """``tokenizer.json`` inside the data set; off = built into this package."""


class Manifest(Record):
    """What ``prepare-data`` made."""

    format_version: int = FORMAT_VERSION
    name: str
    vocab_size: Annotated[int, Field(ge=1)]
    """Token ids are below this; not padded."""
    end_of_document: NonNegative
    """Token id that follows every document."""
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "int32"]
    splits: dict[SplitName, SplitRecord]
    skipped: dict[str, NonNegative] = {}
    """Documents left out, by reason."""
    settings: dict[str, Any] = {}
    """What was asked for: running again with the same settings changes nothing."""

    @property
    def item_bytes(self) -> int:
        return 2 if self.dtype == "uint16" else 4

    @property
    def corpus_hash(self) -> str:
        """Identity of the training tokens, wherever the folder lies."""
        train = self.splits["train"]
        parts = (train.bin_sha256, train.idx_sha256, self.tokenizer.fingerprint)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a prepared data set and check its files' sizes.

    Raises:
        DataError: if the folder is missing, unfinished, damaged or of an unknown version.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing(folder)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the data set again") from None
    manifest = parse_record(Manifest, path, text, "prepare the data set again")
    for split, record in manifest.splits.items():
        for file, expected in expected_sizes(folder / split, record, manifest.item_bytes).items():
            _check_size(file, expected)
    return manifest


def verify_manifest(folder: str | Path) -> Manifest:
    """``read_manifest``, and every byte of the data against its SHA-256: reads the whole set.

    Raises:
        DataError: as ``read_manifest``, and naming a file whose content has changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for split, record in manifest.splits.items():
        damaged = find_damage(folder / split, record)
        if damaged:
            raise DataError(
                f"{damaged}: its SHA-256 is not the one in {folder / MANIFEST}; the file has "
                "changed or the disk is failing: prepare or copy the data set again"
            )
    return manifest


def find_damage(
    prefix: Path, record: SplitRecord, suffixes: Sequence[str] = (".bin", ".idx")
) -> Path | None:
    """The first of ``prefix``'s files that is missing or has another hash, if any."""
    expected = {".bin": record.bin_sha256, ".idx": record.idx_sha256}
    for suffix in suffixes:
        file = prefix.with_suffix(suffix)
        if not file.is_file() or sha256_of(file) != expected[suffix]:
            return file
    return None


def sha256_of(file: Path) -> str:
    """Hash a file without reading it into memory (``hashlib.file_digest`` needs Python 3.11)."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def expected_sizes(prefix: Path, record: SplitRecord, item_bytes: int) -> dict[Path, int]:
    """Bytes that the two files at ``prefix`` must have."""
    idx_bytes = _IDX_HEADER_BYTES + 8 + _IDX_BYTES_PER_DOCUMENT * record.documents
    return {
        prefix.with_suffix(".bin"): record.tokens * item_bytes,
        prefix.with_suffix(".idx"): idx_bytes,
    }


def parse_record(kind: type[AnyRecord], path: Path, text: str, remedy: str) -> AnyRecord:
    """Parse one of our own JSON files.

    Raises:
        DataError: naming the file, if it is damaged or of a version this program does not know.
    """
    try:
        values = json.loads(text)
    except ValueError:
        raise DataError(f"{path}: damaged (not valid JSON); {remedy}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {version}, this program reads {FORMAT_VERSION}; {remedy}"
        )
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "JSON"
        raise DataError(f"{path}: damaged ({where}: {problem['msg']}); {remedy}") from None


def _missing(folder: Path) -> str:
    work = folder.with_name(folder.name + WORK_SUFFIX)
    if not folder.exists() and work.is_dir():
        return (
            f"{folder}: this data set is not finished ({work.name} lies beside it); run the same "
            "prepare-data command again to resume it"
        )
    if not folder.exists():
        return f"{folder}: no such data set; make it with 'distributed-lm prepare-data'"
    return (
        f"{folder}: has no {MANIFEST}, so it is not a finished data set; make one with "
        "'distributed-lm prepare-data'"
    )


def _check_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        size = "missing" if found is None else f"{found} bytes long"
        raise DataError(
            f"{file}: is {size}, the manifest says {expected} bytes; copy or prepare the data "
            "set again"
        )
