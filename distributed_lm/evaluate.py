"""``distributed-lm evaluate``: score a trained run at any context length and any layout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from distributed_lm import platform, process_groups
from distributed_lm.checkpoint import store
from distributed_lm.checkpoint.blocks import model_blocks
from distributed_lm.checkpoint.folders import checkpoint_path, read_state, saved_steps
from distributed_lm.checkpoint.manifest import MANIFEST
from distributed_lm.config import RunConfig, load_run_config
from distributed_lm.data.corpora import open_corpora
from distributed_lm.data.manifest import sha256_of
from distributed_lm.errors import CheckpointError, ConfigError
from distributed_lm.evaluation.perplexity import complete_result, expected_result, measure
from distributed_lm.evaluation.protocols import (
    PROTOCOLS,
    Plan,
    Request,
    make_plans,
)
from distributed_lm.evaluation.results import Result, read_results, write_result
from distributed_lm.evaluation.scored_data import ScoredData
from distributed_lm.evaluation.scoring import Advance
from distributed_lm.evaluation.tables import results_table
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import GPTStage, build_stages
from distributed_lm.model.parameters import parameter_shards
from distributed_lm.model.proof import prove_positions
from distributed_lm.pipeline import Microbatch, run_schedule
from distributed_lm.planner.vocabulary import padded_vocab_size
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.supervision import Supervision, supervision


def evaluate(
    path: Path,
    lengths: tuple[int, ...],
    checkpoint: int | None,
    overrides: list[str],
    *,
    protocol: str = "nonoverlapping",
    stride: int | None = None,
    longer_than: int | None = None,
    force: bool = False,
) -> None:
    """Score a run's checkpoint and write ``evaluation/*.json``, each when it is done; what is there
    already for the same checkpoint and tokens is not scored again. Every rank calls it.

    The layout of training does not bind: without overrides every process holds the whole model.

    Args:
        path: run folder, or the folder of one of its checkpoints.
        lengths: context lengths in tokens; none = ``evaluation.lengths`` of the run.
        checkpoint: step; None = that of ``path``, or the newest.
        protocol, stride, longer_than: see ``Request``.
        force: score again what is there.

    Raises:
        UserError: if there is nothing to evaluate, or not at that length or on that data.
    """
    run, checkpoint = _run_and_step(path, checkpoint)
    config = load_run_config(run, overrides)
    platform.check_precision(config.precision)
    data = ScoredData.of(config)
    request = _request(lengths or config.evaluation_lengths, protocol, stride, longer_than)
    plans = make_plans(request, config, data)
    step = _step_to_load(config, checkpoint, data.tokenizer)
    manifest = _manifest_hash(config, step)
    expected = [expected_result(config, step, manifest, data, plan) for plan in plans]
    process = Process.from_environment()
    supervised = supervision(process.supervisor, process.rank)
    layout = Layout.grid(config.parallel, process.world_size)
    with process_groups.joined(config, process, layout) as groups:
        # Rank 0 alone looks: it writes while others might still be looking.
        there = [] if force or process.rank else read_results(config.run_dir)
        done = groups.gather([any(old.is_of(new) for old in there) for new in expected])[0]
        planned = zip(plans, expected, done, strict=True)
        todo = [(plan, new) for plan, new, is_done in planned if not is_done]
        if todo:
            _evaluate(config, step, todo, data, groups, supervised)
    if process.rank == 0:
        results = [old for old in read_results(config.run_dir) if any(map(old.is_of, expected))]
        skipped = len(plans) - len(todo)
        note = f"{skipped} of {len(plans)} had been scored before" if skipped else ""
        for part in results_table(results, note):
            Console().print(part)
    supervised.leave("finished")


def _run_and_step(path: Path, checkpoint: int | None) -> tuple[Path, int | None]:
    """A checkpoint's folder names its run and its step."""
    path = path.resolve()
    number = path.name.removeprefix("step_")
    if path.parent.name != "checkpoints" or path.name == number or not number.isdecimal():
        return path, checkpoint
    if checkpoint not in (None, int(number)):
        raise ConfigError(
            f"--checkpoint {checkpoint}: {path} is the checkpoint of step {int(number)}; give one "
            "of the two"
        )
    return path.parent.parent, int(number)


def _request(
    lengths: tuple[int, ...], protocol: str, stride: int | None, longer_than: int | None
) -> Request:
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol}: expected one of {', '.join(PROTOCOLS)}")
    lengths = tuple(dict.fromkeys(lengths))
    return Request(lengths, protocol, stride, longer_than)


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


def _manifest_hash(config: RunConfig, step: int) -> str:
    path = checkpoint_path(config.run_dir, step) / MANIFEST
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {error.strerror}; a checkpoint without it is not whole: evaluate another "
            "with --checkpoint STEP"
        ) from None


def _evaluate(
    config: RunConfig,
    step: int,
    todo: list[tuple[Plan, Result]],
    data: ScoredData,
    groups: ProcessGroups,
    supervised: Supervision,
) -> None:
    """Score and write one plan after the other, all with the model loaded once."""
    stages = _load_stages(config, step, groups)

    def score(microbatches: list[Microbatch], on_losses: Callable[[Tensor], None]) -> None:
        supervised.should_stop()  # a sign of life; there is nothing to save, so it ends at once
        with torch.no_grad():
            run_schedule(list(stages), microbatches, groups, forward_only=True, on_losses=on_losses)

    console = Console()
    for plan, result in todo:
        if plan.gap is not None:
            if groups.is_first_rank:
                write_result(config.run_dir, result, None)
            continue
        with _progress(console, plan, groups.is_first_rank) as advance:
            measured = measure(
                plan, data, config.evaluation.tokens_per_batch, groups, score, advance
            )
        if groups.is_first_rank:
            say = partial(console.print, soft_wrap=True, markup=False)
            result = complete_result(result, measured, data, groups, say)
            write_result(config.run_dir, result, measured.sums.documents)


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


@contextmanager
def _progress(console: Console, plan: Plan, is_first_rank: bool) -> Iterator[Advance]:
    """A bar on rank 0's terminal, nothing elsewhere."""
    title = f"{plan.protocol} {plan.length}"
    disable = not (is_first_rank and console.is_terminal)
    with Progress(console=console, transient=True, disable=disable) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
