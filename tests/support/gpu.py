"""Run a function in a fresh process that owns the GPU.

The fork server of ``ranks.py`` has the engines loaded for CPUs; here nothing is loaded yet.
"""

import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

NO_GPU = "needs a CUDA device, and torch sees none"
requires_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)


def run_on_gpu(
    function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 600.0
) -> Any:
    """Call ``function(*arguments)`` as the only rank of a run and return what it returned."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    name = f"{function.__module__}:{function.__qualname__}"  # imported there, after the environment
    process = context.Process(target=_main, args=(theirs, name, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout_seconds):
            pytest.fail(f"{name} did not finish in {timeout_seconds} s")
        try:
            ok, value = ours.recv()
        except EOFError:
            pytest.fail(f"{name} died without a word")
    finally:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
            process.join()
    if not ok:
        pytest.fail(f"{name} failed:\n{value}")
    return value


def _main(connection: Connection, name: str, arguments: tuple[Any, ...]) -> None:
    os.environ.update(DS_ACCELERATOR="cuda", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
        connection.send((True, function(*arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        sys.stdout.flush()
        os._exit(0)
