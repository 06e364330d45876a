"""Ranks that stay alive between timings, so that whole layouts can be timed in turns.

Each rank is forked with the engines loaded, is given its threads, builds what it is to time, and
then waits, using no processor, until it is told to take a turn.
"""

import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import torch

from launch.ports import free_port
from tests.support.ranks import CONTEXT, become_rank

BUILD_SECONDS = 300.0
TURN_SECONDS = 300.0

Turn = Callable[..., Any]


class Ranks:
    """``world_size`` processes on this machine that each built a ``Turn``.

    Args:
        build: called once on every rank; what it returns is a turn.
        arguments: of ``build``.
        threads: of each rank, as a launcher would set them.
        context: how processes are made; ``spawn`` for one that owns the GPU, since the fork server
            has the engines loaded for CPUs.

    Raises:
        RuntimeError: from any method, with the traceback of a rank that failed.
    """

    def __init__(
        self,
        build: Callable[..., Turn],
        *arguments: Any,
        world_size: int,
        threads: int,
        context: BaseContext = CONTEXT,
    ) -> None:
        port = free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_main, args=(theirs, rank, world_size, port, threads, build, arguments)
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._is_built = False

    def turn(self, *arguments: Any) -> list[Any]:
        """Call every rank's turn with ``arguments``, and return what each returned. The first waits
        for the ranks to be built, which goes on beside other ranks' building."""
        if not self._is_built:
            self._answers(BUILD_SECONDS)
            self._is_built = True
        for connection in self._connections:
            connection.send(arguments)
        return self._answers(TURN_SECONDS)

    def close(self) -> None:
        """End the ranks. They hold nothing that is worth a farewell."""
        for process in self._processes:
            process.kill()
            process.join()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answers(self, timeout_seconds: float) -> list[Any]:
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(timeout_seconds):
                self.close()
                raise RuntimeError(f"rank {rank} did not answer in {timeout_seconds:.0f} s")
            try:
                is_well, value = connection.recv()
            except EOFError:
                is_well, value = False, "it died without a word"
            if not is_well:
                self.close()
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            answers.append(value)
        return answers


def _main(
    connection: Connection,
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    build: Callable[..., Turn],
    arguments: tuple[Any, ...],
) -> None:
    become_rank(rank, world_size, port)
    torch.set_num_threads(threads)
    try:
        turn = build(*arguments)
        connection.send((True, None))
        while True:
            connection.send((True, turn(*connection.recv())))
    except EOFError:  # the benchmark has ended
        pass
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        os._exit(0)  # gloo's threads need not be waited for
