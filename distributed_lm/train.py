"""``distributed-lm train``: from a config to a trained, evaluated and saved run."""

from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console

from distributed_lm import platform, process_groups
from distributed_lm.checkpoint.store import saved_steps
from distributed_lm.config import RunConfig
from distributed_lm.data.batches import (
    TrainingData,
    build_index_caches,
    check_shared_cache,
    evaluation_stream,
)
from distributed_lm.data.ledger import genesis
from distributed_lm.errors import ConfigError
from distributed_lm.evaluation.perplexity import check_lengths, nonoverlapping_perplexity
from distributed_lm.evaluation.results import evaluation_lengths, write_result
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages, check_vocab_size, padded_vocab_size
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.proof import Proof, prove_positions
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.tracking import Tracker, open_tracker
from distributed_lm.training.engine import TrainingEngine, explain_out_of_memory
from distributed_lm.training.loop import Progress, TrainingLoop, restore_progress
from distributed_lm.training.snapshot import load_snapshot
from distributed_lm.training.throughput import Throughput


def train(config: RunConfig) -> None:
    """Train a run to ``train.steps``, from its newest checkpoint if there is one. On every rank.

    Raises:
        UserError: one of its kinds, before anything on disk has changed if the config is at fault.
    """
    process = Process.from_environment()
    layout = Layout.of(config, process.world_size)
    platform.check_precision(config.precision)
    check_lengths(config, evaluation_lengths(config))
    first_step = _first_step(config)
    if first_step >= config.train.steps:
        _say_finished(config, first_step, process)
        return
    build_index_caches(config)
    groups = process_groups.start(config, process, layout)
    try:
        _train(config, groups, first_step)
    finally:
        process_groups.stop()


def _train(config: RunConfig, groups: ProcessGroups, first_step: int) -> None:
    data = TrainingData(config)
    vocab_size = padded_vocab_size(config.model, data.vocab_size)
    check_vocab_size(config, vocab_size, data.vocab_size)
    engine = _build_engine(config, vocab_size, groups)
    progress = Progress(data_digest=genesis(data.corpus_hash))
    if first_step:
        progress = restore_progress(load_snapshot(engine, config.run_dir, first_step))
    proof = prove_positions(engine.stages, groups)
    throughput = Throughput(config, vocab_size, groups)
    _write_config(config, groups)
    details = _details(groups, proof, throughput)
    tracker = open_tracker(config, details, progress.step, enabled=groups.is_first_rank)
    exit_code = 1
    try:
        _announce(config, tracker, groups, details, progress)
        validate = _validator(config, engine, tracker)
        TrainingLoop(config, engine, data, tracker, throughput, progress, validate).run()
        exit_code = 0
    finally:
        tracker.finish(exit_code)


def _build_engine(config: RunConfig, vocab_size: int, groups: ProcessGroups) -> TrainingEngine:
    with explain_out_of_memory("building the model"):
        stages = build_stages(config, vocab_size, groups)
        initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
        return TrainingEngine(config, stages, groups)


def _first_step(config: RunConfig) -> int:
    """The step of the newest checkpoint, 0 without one.

    Raises:
        ConfigError: if there is one and ``checkpoint.resume`` is off.
    """
    steps = saved_steps(config.run_dir)
    if steps and not config.checkpoint.resume:
        raise ConfigError(
            f"{config.run_dir} already holds a run at step {steps[-1]} and "
            "checkpoint.resume=false; choose another name, or remove the folder"
        )
    return steps[-1] if steps else 0


def _say_finished(config: RunConfig, step: int, process: Process) -> None:
    if process.rank == 0:
        Console().print(
            f"{config.run_dir} is finished: step {step} of train.steps={config.train.steps}; "
            "raise train.steps to go on",
            soft_wrap=True,
        )


def _validator(
    config: RunConfig, engine: TrainingEngine, tracker: Tracker
) -> Callable[[int], None]:
    """Perplexity at every evaluated length, to the tracker and, at the end, to the run folder."""
    stream = evaluation_stream(config)

    def validate(step: int) -> None:
        for length in evaluation_lengths(config):
            result = nonoverlapping_perplexity(
                stream,
                config.evaluation.split,
                length,
                engine.groups.layout,
                engine.groups.coordinates.data,
                config.evaluation.tokens_per_batch,
                engine.evaluate,
            )
            tracker.log("evaluation", {"step": step, **asdict(result)})
            if step == config.train.steps and engine.groups.is_first_rank:
                write_result(config, step, result)

    return validate


def _write_config(config: RunConfig, groups: ProcessGroups) -> None:
    if groups.is_first_rank:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    groups.barrier()


def _details(groups: ProcessGroups, proof: Proof, throughput: Throughput) -> dict[str, object]:
    """What a reader of the logs or of W&B needs beside the config."""
    return {
        "layout": groups.layout.describe(),
        "world_size": groups.layout.world_size,
        "position_proof": asdict(proof),
        "peak_flops_per_device": throughput.peak,
        "peak_flops_source": throughput.peak_source,
        "flops_per_token": throughput.flops.full,
        "environment": platform.describe_environment(),
    }


def _announce(
    config: RunConfig,
    tracker: Tracker,
    groups: ProcessGroups,
    details: dict[str, object],
    progress: Progress,
) -> None:
    """The first event of a run's life, and what the index caches turned out to be."""
    proof = details["position_proof"]
    message = (
        f"{config.name}: {details['layout']}, step {progress.step} of {config.train.steps}; "
        f"{config.model.position} positions proved with the {proof['backend']} kernel"  # type: ignore[index]
    )
    tracker.log("event", {"event": "start", "step": progress.step, "message": message, **details})
    warning = check_shared_cache(config, groups.is_first_rank, groups.barrier)
    if warning:
        tracker.log("event", {"event": "cache", "step": progress.step, "message": warning})
