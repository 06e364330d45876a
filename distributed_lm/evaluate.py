"""``distributed-lm evaluate``: perplexity of a trained run at any context length and any layout."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from distributed_lm import platform, process_groups
from distributed_lm.checkpoint import store
from distributed_lm.checkpoint.blocks import model_blocks
from distributed_lm.checkpoint.folders import read_state, saved_steps
from distributed_lm.config import RunConfig, load_run_config
from distributed_lm.data.batches import evaluation_stream
from distributed_lm.data.corpora import corpora_hash, open_corpora
from distributed_lm.errors import CheckpointError, ConfigError
from distributed_lm.evaluation.perplexity import (
    Perplexity,
    check_lengths,
    nonoverlapping_perplexity,
)
from distributed_lm.evaluation.results import write_result
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import GPTStage, build_stages, padded_vocab_size
from distributed_lm.model.parameters import parameter_shards
from distributed_lm.model.proof import prove_positions
from distributed_lm.pipeline import Microbatch, run_schedule
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.supervision import Supervision, supervision


def evaluate(
    run: Path, lengths: tuple[int, ...], checkpoint: int | None, overrides: list[str]
) -> None:
    """Score a run's checkpoint and write ``evaluation/*.json``. Every rank calls it.

    The layout of training does not bind: without overrides every process holds the whole model.

    Args:
        run: run folder.
        lengths: context lengths in tokens; none = ``evaluation.lengths`` of the run.
        checkpoint: step; None = the newest.

    Raises:
        UserError: if there is nothing to evaluate, or not at that length or on that data.
    """
    config = load_run_config(run, overrides)
    lengths = lengths or config.evaluation_lengths
    platform.check_precision(config.precision)
    identity = _data_identity(config)
    check_lengths(config, lengths, len(evaluation_stream(config)) - 1)
    step = _step_to_load(config, checkpoint, identity["tokenizer"])
    process = Process.from_environment()
    supervised = supervision(process.supervisor, process.rank)
    layout = Layout.grid(config.parallel, process.world_size)
    with process_groups.joined(config, process, layout) as groups:
        stages = _load_stages(config, step, groups)
        results = [_score(config, stages, groups, length, supervised) for length in lengths]
    if process.rank == 0:
        for result in results:
            write_result(config, step, result, identity)
        _print_table(config, step, results)
    supervised.leave("finished")


def _data_identity(config: RunConfig) -> dict[str, str]:
    corpora = open_corpora(config)
    tokenizer = corpora[0].manifest.tokenizer.fingerprint
    return {"corpus_hash": corpora_hash(corpora), "tokenizer": tokenizer}


def _step_to_load(config: RunConfig, checkpoint: int | None, tokenizer: str) -> int:
    steps = saved_steps(config.run_dir)
    if not steps:
        raise CheckpointError(f"{config.run_dir}: no checkpoint in this run folder; train it first")
    step = steps[-1] if checkpoint is None else checkpoint
    trained_with = read_state(config.run_dir, step)["data"]["tokenizer"]
    if trained_with != tokenizer:
        raise ConfigError(
            f"data.path: tokenizer {tokenizer[:12]}, but {config.run_dir} was trained with "
            f"{trained_with[:12]}; evaluate on data prepared with the same --tokenizer"
        )
    return step


def _load_stages(config: RunConfig, step: int, groups: ProcessGroups) -> list[GPTStage]:
    damage = store.find_damage(config.run_dir, step, groups)
    if damage:
        raise CheckpointError(f"{damage}; evaluate another with --checkpoint STEP")
    data_vocab_size = open_corpora(config)[0].manifest.vocab_size
    stages = build_stages(config, padded_vocab_size(config.model, data_vocab_size), groups)
    store.load(config.run_dir, step, model_blocks(parameter_shards(stages, groups), groups), groups)
    for stage in stages:
        stage.eval()
    prove_positions(stages, groups)
    return stages


def _score(
    config: RunConfig,
    stages: list[GPTStage],
    groups: ProcessGroups,
    length: int,
    supervised: Supervision,
) -> Perplexity:
    def score(microbatches: list[Microbatch]) -> tuple[float, float]:
        supervised.should_stop()  # a sign of life; there is nothing to save, so it ends at once
        with torch.no_grad():
            loss_sum, tokens = run_schedule(
                list(stages), microbatches, groups, forward_only=True
            ).tolist()
        return loss_sum, tokens

    stream = evaluation_stream(config)
    return nonoverlapping_perplexity(stream, length, config.evaluation, groups, score)


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
