"""Our engine for a benchmark's config. Apart from the benchmarks, whose forked ranks have the
engines loaded already: who measures something else need not wait for them."""

import torch

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.pipeline import Microbatch, split_batch
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.training.engine import TrainingEngine


def build_engine(config: RunConfig) -> tuple[TrainingEngine, ProcessGroups]:
    """On every rank; the vocabulary is the config's."""
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    assert config.model.vocab_size is not None
    stages = build_stages(config, config.model.vocab_size, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    return TrainingEngine(config, stages, groups), groups


def random_batch(config: RunConfig) -> list[Microbatch]:
    """The microbatches of one step of one process; each call returns the same."""
    assert config.model.vocab_size is not None
    shape = (config.batch.global_batch_size, config.data.sequence_length + 1)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return split_batch(tokens[:, :-1], tokens[:, 1:], config.batch.micro_batch_size)
