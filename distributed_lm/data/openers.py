"""Open the kinds of input; whatever goes wrong becomes a sentence that names the input."""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from distributed_lm.errors import DataError


@contextlib.contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed if it is gzip; its errors while open name the file."""
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile is IO[bytes] but for its annotation
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(unreadable(path, error)) from None


def unreadable(path: str, error: Exception) -> str:
    """The sentence for a file that cannot be read to its end."""
    reason = " ".join(str(error).split())
    return (
        f"{path}: cannot be read ({reason}); download or copy it again, or leave it out; "
        "finished shards are kept"
    )


def open_parquet(path: str) -> Any:
    """``pyarrow.parquet.ParquetFile`` of ``path``.

    Raises:
        DataError: if it is not a readable Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(unreadable(path, error)) from None


def open_hub_dataset(name: str, config: str | None, split: str) -> Any:
    """A streaming ``datasets.IterableDataset``.

    Args:
        name: on the hub, or a folder with its files, or one that ``save_to_disk`` wrote.

    Raises:
        DataError: with the library's reason, if it cannot be opened.
    """
    import datasets

    with _hub_errors(name):
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split].to_iterable_dataset()
        return datasets.load_dataset(name, config, split=split, streaming=True)


def hub_rows(
    name: str, config: str | None, split: str, index: int, count: int
) -> Iterator[dict[str, Any]]:
    """The rows of one of a streaming data set's ``count`` shards.

    Raises:
        DataError: with the library's reason, if the stream breaks off.
    """
    dataset = open_hub_dataset(name, config, split)
    with _hub_errors(name):
        yield from dataset.shard(num_shards=count, index=index)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library and its backends raise dozens of types
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"--dataset {name}: cannot be read ({reason}); check the name, --dataset-config, "
            "--dataset-split and the network; finished shards are kept"
        ) from None
