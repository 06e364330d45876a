"""Decoder layers, each compiled into one graph that all of them share."""

from collections.abc import Sequence
from typing import Any

import torch

from distributed_lm.config import RunConfig, compile_obstacle
from distributed_lm.model.loss import OutputLayer

# A graph is made for each shape: training and every evaluated length, with and without gradients.
MAX_COMPILED_SHAPES = 128


def wants_compilation(config: RunConfig, device: torch.device) -> bool:
    """As ``train.compile`` says; ``auto`` compiles on a GPU if nothing stands in the way."""
    if config.train.compile == "auto":
        return device.type == "cuda" and compile_obstacle(config) is None
    return config.train.compile


def compile_stages(stages: Sequence[Any], is_asked_for: bool) -> None:
    """Have every layer of these stages, and the loss, compiled when it is first called.

    Args:
        is_asked_for: then a layer is compiled in one piece or not at all: a break in its graph, or
            a shape too many, is an error. Else torch goes on without a word, only slower.
    """
    torch._dynamo.config.recompile_limit = MAX_COMPILED_SHAPES
    for stage in stages:
        for layer in stage.decoder.layers:
            layer.compile(fullgraph=is_asked_for, dynamic=False)
        if isinstance(stage.output_layer, OutputLayer):
            stage.output_layer.compile_losses()
