"""``distributed-lm evaluate``: perplexity of a trained run at any context length and any layout."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from distributed_lm import platform, process_groups
from distributed_lm.checkpoint import store
from distributed_lm.checkpoint.blocks import model_blocks
from distributed_lm.config import RunConfig, load_config
from distributed_lm.data.batches import evaluation_stream
from distributed_lm.data.manifest import read_manifest
from distributed_lm.errors import CheckpointError
from distributed_lm.evaluation.perplexity import (
    Perplexity,
    check_lengths,
    nonoverlapping_perplexity,
)
from distributed_lm.evaluation.results import evaluation_lengths, write_result
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import GPTStage, build_stages, padded_vocab_size
from distributed_lm.model.parameters import parameter_shards
from distributed_lm.model.proof import prove_positions
from distributed_lm.pipeline import Microbatch, run_schedule
from distributed_lm.process_groups import Process, ProcessGroups

# The layout of training does not bind: without overrides, every process holds the whole model.
OWN_LAYOUT = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.sequence=false",
]


def evaluate(
    run: Path, lengths: tuple[int, ...], checkpoint: int | None, overrides: list[str]
) -> None:
    """Score a run's checkpoint and write ``evaluation/*.json``. Every rank calls it.

    Args:
        run: run folder.
        lengths: context lengths in tokens; none = ``evaluation.lengths`` of the run.
        checkpoint: step; None = the newest.

    Raises:
        UserError: if there is nothing to evaluate, or not at that length.
    """
    config = load_config(run, [*OWN_LAYOUT, *overrides])
    # The folder may have been moved since the config was written into it.
    config = config.model_copy(
        update={"output_dir": str(run.resolve().parent), "name": run.resolve().name}
    )
    lengths = lengths or evaluation_lengths(config)
    check_lengths(config, lengths)
    platform.check_precision(config.precision)
    step = _step_to_load(config, checkpoint)
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.grid(config.parallel, process.world_size))
    try:
        stages = _load_stages(config, step, groups)
        results = [_score(config, stages, groups, length) for length in lengths]
    finally:
        process_groups.stop()
    if process.rank == 0:
        for result in results:
            write_result(config, step, result)
        _print_table(config, step, results)


def _step_to_load(config: RunConfig, checkpoint: int | None) -> int:
    steps = store.saved_steps(config.run_dir)
    if not steps:
        raise CheckpointError(f"{config.run_dir}: no checkpoint in this run folder; train it first")
    step = steps[-1] if checkpoint is None else checkpoint
    store.read_state(config.run_dir, step)
    return step


def _load_stages(config: RunConfig, step: int, groups: ProcessGroups) -> list[GPTStage]:
    data_vocab_size = read_manifest(config.data.corpora[0].path).vocab_size
    stages = build_stages(config, padded_vocab_size(config.model, data_vocab_size), groups)
    shards = parameter_shards(stages, groups)
    store.load(config.run_dir, step, model_blocks(shards, groups))
    for stage in stages:
        stage.eval()
    prove_positions(stages, groups)
    return stages


def _score(
    config: RunConfig, stages: list[GPTStage], groups: ProcessGroups, length: int
) -> Perplexity:
    def score(microbatches: list[Microbatch]) -> tuple[float, float]:
        with torch.no_grad():
            loss_sum, tokens = run_schedule(
                list(stages), microbatches, groups, forward_only=True
            ).tolist()
        return loss_sum, tokens

    return nonoverlapping_perplexity(
        evaluation_stream(config),
        config.evaluation.split,
        length,
        groups.layout,
        groups.coordinates.data,
        config.evaluation.tokens_per_batch,
        score,
    )


def _print_table(config: RunConfig, step: int, results: list[Perplexity]) -> None:
    title = f"{config.name}, step {step}, {results[0].split} split, {results[0].protocol}"
    table = Table(title=title, title_justify="left")
    for column in ("context", "perplexity", "nats per token", "tokens scored"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            str(result.length),
            f"{result.perplexity:.4f}",
            f"{result.loss:.6f}",
            str(result.tokens_scored),
        )
    Console().print(table)
