"""Run a function on several ranks, forked from a server that has the engines preloaded.

A cold start costs 15 s for four ranks, a fork two. The server forks before any process group or
thread exists, so its children are as clean as new processes.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from launch.ports import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preload"])


def run_distributed(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """Call ``function(*arguments)`` on every rank and return what each returned, by rank.

    A rank that raises, dies or hangs fails the test with its traceback; the others are killed.
    """
    port = free_port()
    connections, processes = [], []
    for rank in range(world_size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_rank_main, args=(theirs, rank, world_size, port, function, arguments)
        )
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    try:
        return _collect(connections, timeout_seconds)
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def become_rank(rank: int, world_size: int, port: int) -> None:
    """In a forked process: what a launcher would have set, and one thread."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)


def _collect(connections: list[Connection], timeout_seconds: float) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    results: dict[Connection, Any] = {}
    while len(results) < len(connections):
        pending = [connection for connection in connections if connection not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            ranks = [connections.index(connection) for connection in pending]
            pytest.fail(f"ranks {ranks} did not finish in {timeout_seconds} s")
        for connection in ready:
            rank = connections.index(connection)
            try:
                ok, value = connection.recv()
            except EOFError:
                pytest.fail(f"rank {rank} died without a word")
            if not ok:
                pytest.fail(f"rank {rank} failed:\n{value}")
            results[connection] = value
    return [results[connection] for connection in connections]


def _rank_main(
    connection: Connection,
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    become_rank(rank, world_size, port)
    try:
        connection.send((True, function(*arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        os._exit(0)  # gloo's threads need not be waited for
