"""Decoder layers, each compiled into one graph that all of them share."""

from collections.abc import Sequence
from typing import Any

import torch

from distributed_lm.config import RunConfig, compile_obstacle

# A graph is made for each shape: training and every evaluated length, with and without gradients.
MAX_COMPILED_SHAPES = 128


def wants_compilation(config: RunConfig, device: torch.device) -> bool:
    """As ``train.compile`` says; ``auto`` compiles on a GPU if nothing stands in the way."""
    if config.train.compile == "auto":
        return device.type == "cuda" and compile_obstacle(config) is None
    return config.train.compile


def compile_layers(stages: Sequence[Any]) -> None:
    """Have every layer of these stages compiled when it is first called.

    In one piece or not at all: a break in the graph is an error. So is a shape too many, in place
    of the slow path without a word.
    """
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
    for stage in stages:
        for layer in stage.decoder.layers:
            layer.compile(fullgraph=True, dynamic=False)
