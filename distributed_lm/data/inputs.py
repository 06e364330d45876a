"""Find a corpus's files and cut them into shards of work, without reading their text.

The list of shards depends only on the inputs' names and sizes, so jobs on several machines agree
on it without talking to one another.
"""

import dataclasses
import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_lm.data.manifest import SplitName
from distributed_lm.data.openers import open_hub_dataset, open_parquet
from distributed_lm.data.wikitext import HUB_SPLITS
from distributed_lm.errors import DataError

FORMATS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Piece:
    """A part of one input: a byte range, some Parquet row groups, or a shard of a hub data set."""

    format: str
    """``text``, ``jsonl``, ``parquet``, ``hub`` or ``wikitext`` (hub rows that are lines)."""
    path: str
    """File to open; for ``hub`` and ``wikitext`` the data set's name."""
    name: str
    """The path below the input that was given: the same on every machine."""
    start: int
    """First byte, first row group, or index of the hub shard."""
    stop: int
    """One past the last byte or row group; for ``hub`` the number of shards."""
    size: int
    """Bytes on disk, to balance shards and to show progress; 0 if not known."""
    config: str = ""
    """``hub`` and ``wikitext`` only: the data set's configuration."""
    hub_split: str = ""
    """``hub`` and ``wikitext`` only: the data set's own split."""

    def identity(self) -> dict[str, object]:
        """What makes the same piece on another machine."""
        values = dataclasses.asdict(self)
        del values["path"]
        return values

    @property
    def split(self) -> SplitName | None:
        """Where all its documents go; None = each by its text."""
        return HUB_SPLITS[self.hub_split] if self.format == "wikitext" else None


@dataclass(frozen=True)
class Shard:
    """Pieces that are tokenised together, in order, by one worker."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def find_pieces(inputs: Sequence[str], bytes_per_shard: int) -> list[Piece]:
    """The files named by ``inputs`` (files, folders, globs), large ones cut into ranges.

    Raises:
        DataError: if an input matches nothing or is of an unknown format.
    """
    pieces: list[Piece] = []
    for argument in inputs:
        found = [
            piece
            for path, name in _files_of(argument)
            for piece in _cut(path, name, bytes_per_shard)
        ]
        if not found:
            raise DataError(
                f"input {argument}: no text found; expected files that end in "
                f"{' '.join(FORMATS)} (or one of these with .gz)"
            )
        pieces.extend(found)
    return pieces


def find_hub_pieces(name: str, config: str | None, split: str) -> list[Piece]:
    """The shards of a data set that the ``datasets`` library can stream.

    Raises:
        DataError: if it cannot be opened.
    """
    count = open_hub_dataset(name, config, split).num_shards
    return [
        Piece("hub", name, name, index, count, 0, config or "", split) for index in range(count)
    ]


def find_wikitext_pieces(name: str, config: str | None) -> list[Piece]:
    """The three splits of a data set in WikiText's form, each whole: articles span its files.

    Raises:
        DataError: if one cannot be opened.
    """
    for split in HUB_SPLITS:
        open_hub_dataset(name, config, split)
    return [Piece("wikitext", name, name, 0, 1, 0, config or "", split) for split in HUB_SPLITS]


def group_pieces(pieces: Iterable[Piece], bytes_per_shard: int) -> list[Shard]:
    """Consecutive pieces in shards of about ``bytes_per_shard``; each hub piece stands alone."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not groups or piece.format in ("hub", "wikitext") or size + piece.size > bytes_per_shard:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return [Shard(shard_name(index), tuple(group)) for index, group in enumerate(groups)]


def shard_name(index: int) -> str:
    return f"shard-{index:06d}"


def _files_of(argument: str) -> Iterator[tuple[Path, str]]:
    """(path, name) of each file in an order that no file system decides."""
    path = Path(argument)
    if path.is_file():
        if format_of(path) is None:
            raise DataError(
                f"input {argument}: unknown format; expected a name that ends in "
                f"{' '.join(FORMATS)} (or one of these with .gz)"
            )
        yield path, path.name
    elif path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))
        yield from ((path / name, f"{path.name}/{name}") for name in names if _is_text(path / name))
    else:
        for match in sorted(glob.glob(argument, recursive=True)):
            if _is_text(Path(match)):
                yield Path(match), Path(match).name


def _is_text(path: Path) -> bool:
    return path.is_file() and format_of(path) is not None


def format_of(path: Path) -> str | None:
    """The format by the name's ending, ``.gz`` aside; None if it is not one of ours."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    found = FORMATS.get(name.suffix.lower())
    return None if found == "parquet" and path.suffix == ".gz" else found


def _cut(path: Path, name: str, bytes_per_shard: int) -> list[Piece]:
    size = path.stat().st_size
    kind = format_of(path)
    assert kind is not None
    if kind == "parquet":
        return _cut_parquet(path, name, bytes_per_shard)
    # A gzip stream can't be entered in the middle, and a text file is one document.
    if kind == "text" or path.suffix == ".gz":
        return [Piece(kind, str(path), name, 0, size, size)]
    starts = range(0, max(size, 1), bytes_per_shard)
    stops = [*starts[1:], size]
    return [
        Piece(kind, str(path), name, start, stop, stop - start)
        for start, stop in zip(starts, stops, strict=True)
    ]


def _cut_parquet(path: Path, name: str, bytes_per_shard: int) -> list[Piece]:
    metadata = open_parquet(str(path)).metadata
    pieces: list[Piece] = []
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= bytes_per_shard or group == metadata.num_row_groups - 1:
            pieces.append(Piece("parquet", str(path), name, start, group + 1, size))
            start, size = group + 1, 0
    return pieces
