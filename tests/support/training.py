"""Worker functions for distributed tests: build a tiny model, step it, hand back what it became."""

from typing import Any

import numpy as np
import torch

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.pipeline import Microbatch, split_batch
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.training.engine import TrainingEngine

VOCAB = 192
TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "precision": "fp32",
    "model": {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCAB},
    "data": {"path": "unused", "sequence_length": 32},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "train": {"steps": 20},
    "optimizer": {"learning_rate": 1e-3},
}


def tiny_config(**sections: Any) -> RunConfig:
    """``TINY`` with sections changed: ``tiny_config(parallel={"tensor": 2})``."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(values)


def build_engine(config: RunConfig) -> tuple[TrainingEngine, ProcessGroups]:
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    stages = build_stages(config, VOCAB, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    return TrainingEngine(config, stages, groups), groups


def random_microbatches(config: RunConfig, groups: ProcessGroups, step: int) -> list[Microbatch]:
    """This rank's share of a batch that depends on the step alone."""
    batch, micro, data = (
        config.batch.global_batch_size,
        config.batch.micro_batch_size,
        groups.layout,
    )
    generator = torch.Generator().manual_seed(1000 + step)
    length = config.data.sequence_length
    tokens = torch.randint(0, VOCAB, (batch, length + 1), generator=generator)
    rows = torch.arange(batch).view(-1, data.data, micro)[:, groups.coordinates.data].flatten()
    return split_batch(tokens[rows, :-1], tokens[rows, 1:], micro)


def train_tiny(config: RunConfig, steps: int) -> dict[str, Any]:
    """Losses and gradient norms of ``steps`` steps, and this rank's weights by global name."""
    engine, groups = build_engine(config)
    results = [
        engine.train_step(
            random_microbatches(config, groups, step), 1e-3 * min(1.0, (step + 1) / 5)
        )
        for step in range(steps)
    ]
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "weights": local_weights(engine),
    }


def local_weights(engine: TrainingEngine) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    """(name, global shape, global offset, values) of every block that this rank holds."""
    import deepspeed

    blocks = []
    for shard in engine.shards:
        with deepspeed.zero.GatheredParameters(
            [shard.parameter], enabled=engine.config.zero.stage == 3
        ):
            values = shard.parameter.detach().float().cpu().numpy().copy()
        for piece in shard.pieces:
            rows = values[piece.first_row : piece.first_row + piece.rows]
            blocks.append((piece.name, piece.global_shape, piece.global_offset, rows))
    return blocks


def assemble_weights(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Whole tensors from all ranks' blocks; copies of one block must agree."""
    whole: dict[str, np.ndarray] = {}
    for result in results:
        for name, shape, offset, values in result["weights"]:
            tensor = whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
            block = tuple(
                slice(start, start + size) for start, size in zip(offset, values.shape, strict=True)
            )
            known = tensor[block]
            if not np.isnan(known).all():
                np.testing.assert_allclose(known, values, atol=1e-6, err_msg=f"copies of {name}")
            tensor[block] = values
    assert not any(np.isnan(tensor).any() for tensor in whole.values())
    return whole
