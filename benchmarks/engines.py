"""A real training engine on random tokens, in the process that calls."""

import torch

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.pipeline import Microbatch, split_batch
from distributed_lm.process_groups import Process
from distributed_lm.training.engine import TrainingEngine


def build(config: RunConfig) -> TrainingEngine:
    """As one process of one; ``config.model.vocab_size`` must be set."""
    assert config.model.vocab_size is not None
    groups = process_groups.start(config, Process.from_environment(), Layout.of(config, 1))
    stages = build_stages(config, config.model.vocab_size, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    return TrainingEngine(config, stages, groups)


def random_batch(config: RunConfig) -> list[Microbatch]:
    """The microbatches of one step; each call returns the same."""
    assert config.model.vocab_size is not None
    shape = (config.batch.global_batch_size, config.data.sequence_length + 1)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return split_batch(tokens[:, :-1], tokens[:, 1:], config.batch.micro_batch_size)
