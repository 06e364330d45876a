"""Make shards in several processes. Which process makes a shard does not change its bytes."""

import contextlib
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from distributed_lm.data.inputs import Shard
from distributed_lm.data.progress import TokenizingProgress
from distributed_lm.data.shards import Recipe, Report, make_shard
from distributed_lm.data.tokenizer import open_tokenizer
from distributed_lm.errors import DataError


@dataclass(frozen=True)
class Workshop:
    """All that a process needs in order to make shards; passed to it at start."""

    folder: Path
    """Where the shards' folders go."""
    recipe: Recipe
    tokenizer_kind: str
    tokenizer_file: Path | None
    end_of_document: str | None


def make_shards(
    shards: Sequence[Shard], workshop: Workshop, workers: int, progress: TokenizingProgress
) -> None:
    """Make every shard that is not there yet.

    Raises:
        DataError: as ``make_shard``, or if a worker process dies; finished shards are kept.
    """
    workers = min(workers, len(shards))
    if workers > 1:
        _in_processes(shards, workshop, workers, progress)
        return
    make = _maker(workshop)
    for shard in shards:
        make(shard, progress.update)
        progress.finish_shard(shard.size)


def _maker(workshop: Workshop) -> Callable[[Shard, Report], None]:
    tokenizer = open_tokenizer(
        workshop.tokenizer_kind, workshop.tokenizer_file, workshop.end_of_document
    )

    def make(shard: Shard, report: Report) -> None:
        make_shard(shard, workshop.folder, workshop.recipe, tokenizer, report)

    return make


def _in_processes(
    shards: Sequence[Shard], workshop: Workshop, workers: int, progress: TokenizingProgress
) -> None:
    """Hand out one shard at a time over pipes: the fastest worker does the most."""
    waiting = iter(shards)
    with _started(workshop, workers) as connections:
        busy = {connection for connection in connections if _hand_out(connection, waiting)}
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                assert isinstance(connection, Connection)
                kind, content = _receive(connection)
                if kind == "progress":
                    progress.update(*content)
                elif kind == "error":
                    raise DataError(content)
                else:
                    progress.finish_shard(content)
                    if not _hand_out(connection, waiting):
                        busy.discard(connection)


@contextlib.contextmanager
def _started(workshop: Workshop, workers: int) -> Iterator[list[Connection]]:
    # Not fork: the parent may have threads (the progress bar, tokenizers' pool).
    context = multiprocessing.get_context("spawn")
    connections: list[Connection] = []
    processes = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, workshop), daemon=True)
            process.start()
            # With our copy closed, a dead worker is an EOF here instead of a wait for ever.
            theirs.close()
            connections.append(ours)
            processes.append(process)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
            process.join()


def _hand_out(connection: Connection, waiting: Iterator[Shard]) -> bool:
    shard = next(waiting, None)
    if shard is not None:
        with contextlib.suppress(BrokenPipeError):  # _receive says what happened
            connection.send(shard)
    return shard is not None


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = connection.recv()
    except (EOFError, ConnectionResetError):
        raise DataError(
            "a worker process died, perhaps for lack of memory; finished shards are kept: run "
            "the same command again to resume, with fewer --workers"
        ) from None
    return message


def _work(connection: Connection, workshop: Workshop) -> None:
    """A worker: make the shards that arrive until the parent is gone."""
    try:
        make = _maker(workshop)
        while True:
            shard = connection.recv()
            make(shard, lambda *counts: connection.send(("progress", counts)))
            connection.send(("done", shard.size))
    except DataError as error:
        connection.send(("error", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
