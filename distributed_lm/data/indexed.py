"""Write Megatron's ``.bin``/``.idx`` pairs, one document at a time or by joining finished ones.

The layout is that of ``megatron.core.datasets.indexed_dataset`` (tests compare the bytes with its
``IndexedDatasetBuilder``). That builder is not used because it keeps about a hundred bytes of
Python objects per document until the end, gigabytes for a corpus of 400 GB, and would make every
tokenising process import torch. Here joining takes constant memory.

``.idx``: magic, version 1, dtype code, number of sequences, number of documents + 1; then
int32 length of each sequence, int64 byte offset of each in ``.bin``, and int64 number of the first
sequence of each document, closed by the total. One sequence is one document here.
"""

import array
import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from distributed_lm.data.manifest import SplitRecord, find_damage
from distributed_lm.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = "<9sQBQQ"
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_CHUNK_BYTES = 1 << 24
_LONGEST_DOCUMENT = 2**31 - 1


def dtype_for(vocab_size: int) -> str:
    """Two bytes per token where every id fits."""
    return "uint16" if vocab_size <= 2**16 else "int32"


class HashedFile:
    """A file being written, its SHA-256 known at the end, safely on disk after ``with``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class SplitWriter:
    """Append documents to ``prefix.bin`` inside ``with``; ``finish`` then writes ``prefix.idx``."""

    def __init__(self, prefix: Path, dtype: str, end_of_document: int) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._end = np.array([end_of_document], dtype=self._dtype).tobytes()
        self._bin = HashedFile(prefix.with_suffix(".bin"))
        self._lengths = array.array("i")
        self._text_bytes = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bin.__exit__(kind, error, trace)

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document, given without its end-of-document token.

        Raises:
            DataError: if it is longer than the format can say.
        """
        if len(ids) >= _LONGEST_DOCUMENT:
            raise DataError(
                f"a document of {len(ids)} tokens is longer than the format allows "
                f"({_LONGEST_DOCUMENT}); cut it into several"
            )
        self._bin.write(ids.astype(self._dtype, copy=False).tobytes())
        self._bin.write(self._end)
        self._lengths.append(len(ids) + 1)
        self._text_bytes += text_bytes

    def finish(self) -> SplitRecord:
        """Write the index. After ``with``, when the tokens are on disk."""
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        idx_sha256 = write_index(self._prefix, self._dtype, len(lengths), lambda: iter([lengths]))
        return SplitRecord(
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            bytes=self._text_bytes,
            bin_sha256=self._bin.sha256,
            idx_sha256=idx_sha256,
        )


def join_splits(
    prefix: Path,
    dtype: str,
    parts: Sequence[tuple[Path, SplitRecord]],
) -> SplitRecord:
    """Write ``prefix.{bin,idx}`` from finished parts in order, checking each part's hash.

    Args:
        parts: (prefix, record) of each part.

    Raises:
        DataError: naming a part whose content is not what its record says.
    """
    with HashedFile(prefix.with_suffix(".bin")) as joined:
        for part, record in parts:
            if find_damage(part, record, (".idx",)):
                raise DataError(_changed(part.with_suffix(".idx")))
            _copy_checked(part.with_suffix(".bin"), record.bin_sha256, joined)
    documents = sum(record.documents for _, record in parts)
    idx_sha256 = write_index(
        prefix, np.dtype(dtype), documents, lambda: (read_lengths(part, r) for part, r in parts)
    )
    return SplitRecord(
        documents=documents,
        tokens=sum(record.tokens for _, record in parts),
        bytes=sum(record.bytes for _, record in parts),
        bin_sha256=joined.sha256,
        idx_sha256=idx_sha256,
    )


def write_index(
    prefix: Path, dtype: np.dtype, documents: int, lengths: Callable[[], Iterable[np.ndarray]]
) -> str:
    """Write ``prefix.idx`` and return its SHA-256.

    Args:
        lengths: gives the documents' lengths in tokens, int32, part by part, each time it is
            called: the file needs them twice, and all of them may not fit in memory.
    """
    code = _DTYPE_CODES[dtype.name]
    with HashedFile(prefix.with_suffix(".idx")) as index:
        index.write(struct.pack(_HEADER, _MAGIC, 1, code, documents, documents + 1))
        for part in lengths():
            index.write(part.tobytes())
        for offsets in _offsets(lengths(), dtype.itemsize):
            index.write(offsets.tobytes())
        for first in range(0, documents + 1, _CHUNK_BYTES // 8):
            last = min(first + _CHUNK_BYTES // 8, documents + 1)
            index.write(np.arange(first, last, dtype=np.int64).tobytes())
    return index.sha256


def read_lengths(prefix: Path, record: SplitRecord) -> np.ndarray:
    """Lengths of the documents at ``prefix`` in tokens, int32."""
    offset = struct.calcsize(_HEADER)
    path = prefix.with_suffix(".idx")
    return np.fromfile(path, dtype=np.int32, count=record.documents, offset=offset)


def _offsets(lengths: Iterable[np.ndarray], item_bytes: int) -> Iterator[np.ndarray]:
    start = 0
    for part in lengths:
        ends = start + np.cumsum(part, dtype=np.int64) * item_bytes
        yield np.concatenate(([start], ends[:-1])).astype(np.int64) if len(part) else ends
        start = int(ends[-1]) if len(part) else start


def _copy_checked(source: Path, sha256: str, target: HashedFile) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
    except FileNotFoundError:
        raise DataError(_changed(source)) from None
    if digest.hexdigest() != sha256:
        raise DataError(_changed(source))


def _changed(file: Path) -> str:
    return (
        f"{file}: is not as it was written (missing, or another SHA-256); run its prepare-data "
        "command again, which makes damaged shards anew"
    )
