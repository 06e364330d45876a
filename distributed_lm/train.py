"""``distributed-lm train``: from a config to a trained, evaluated and saved run."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

from rich.console import Console
from torch import Tensor

from distributed_lm import platform, process_groups
from distributed_lm.checkpoint import store
from distributed_lm.checkpoint.blocks import model_blocks
from distributed_lm.checkpoint.folders import (
    has_initial_weights,
    leftovers,
    prune,
    read_state,
    restore_replaced,
)
from distributed_lm.config import RunConfig
from distributed_lm.data.batches import TrainingData, build_index_caches, check_shared_cache
from distributed_lm.data.ledger import genesis
from distributed_lm.errors import Stopped
from distributed_lm.evaluation.perplexity import (
    Measurement,
    complete_result,
    expected_result,
    measure,
)
from distributed_lm.evaluation.protocols import Request, make_plans
from distributed_lm.evaluation.results import write_result
from distributed_lm.evaluation.scored_data import ScoredData
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.model.proof import Proof, prove_positions
from distributed_lm.pipeline import Microbatch
from distributed_lm.preflight import Preflight, check_continues, preflight
from distributed_lm.process_groups import Process, ProcessGroups
from distributed_lm.run_lock import Life, RunLock, run_lock
from distributed_lm.supervision import StopEvaluation, Supervision, supervision
from distributed_lm.tracking import Tracker, open_tracker
from distributed_lm.training.engine import TrainingEngine, explain_out_of_memory
from distributed_lm.training.loop import Progress, TrainingLoop, restore_progress
from distributed_lm.training.snapshot import load_snapshot
from distributed_lm.training.throughput import Throughput


def train(config: RunConfig) -> None:
    """Train a run to ``train.steps``, from its newest checkpoint if there is one. On every rank.

    Raises:
        UserError: before anything on disk has changed if the config is at fault.
    """
    process = Process.from_environment()
    trace = config.run_dir / "logs" / f"nccl_trace_rank_{process.rank}"
    dump = partial(platform.dump_flight_recorder, trace)
    supervised = supervision(process.supervisor, process.rank, dump)
    found = preflight(config, process.world_size)
    is_first = process.rank == 0
    life = Life(process.job, process.restart, process.attempt)
    with run_lock(config.run_dir, life) if is_first else nullcontext() as lock:
        notes = []
        if lock is not None:
            notes = [lock.taken_over] if lock.taken_over else []
            notes += restore_replaced(config.run_dir)
        build_index_caches(config)
        with process_groups.joined(config, process, found.layout) as groups:
            first_step, damaged = store.newest_verified(config.run_dir, groups)
            if is_first:
                notes += _tidy(config, first_step, damaged)
            if _is_finished(config, first_step):
                if is_first:
                    _say_finished(config, first_step)
            else:
                _train(config, groups, found, first_step, notes, supervised, lock)
    supervised.leave("finished")


def _is_finished(config: RunConfig, step: int) -> bool:
    if step < config.train.steps:
        return False
    return not read_state(config.run_dir, step).get("validation_due", False)


def _train(
    config: RunConfig,
    groups: ProcessGroups,
    found: Preflight,
    first_step: int,
    notes: list[str],
    supervised: Supervision,
    lock: RunLock | None,
) -> None:
    data = TrainingData(config)
    engine = _build_engine(config, found.vocab_size, groups)
    progress = Progress(data=found.data_identity, data_digest=genesis(data.corpus_hash))
    if groups.is_first_rank:
        notes += _notes_on_changes(config, found)
    if first_step:
        progress = restore_progress(load_snapshot(engine, config.run_dir, first_step))
    proof = prove_positions(engine.stages, groups)
    throughput = Throughput(config, found.vocab_size, groups)
    _write_config(config, groups)
    details = _details(groups, proof, throughput)
    tracker = open_tracker(config, details, progress.step, enabled=groups.is_first_rank)
    exit_code = 1
    try:
        _announce(config, tracker, groups, details, progress, notes)
        validate = _validator(config, engine, tracker, supervised)
        TrainingLoop(
            config, engine, data, tracker, throughput, progress, validate, supervised, lock
        ).run()
        exit_code = 0
    except Stopped:
        exit_code = 0
        supervised.leave("stopped")
        raise
    finally:
        tracker.finish(exit_code)


def _build_engine(config: RunConfig, vocab_size: int, groups: ProcessGroups) -> TrainingEngine:
    with explain_out_of_memory("building the model"):
        stages = build_stages(config, vocab_size, groups)
        shards = parameter_shards(stages, groups)
        if has_initial_weights(config.run_dir):
            store.load(config.run_dir, 0, model_blocks(shards, groups), groups)
        else:
            initialize_weights(shards, config.model, config.seed)
        return TrainingEngine(config, stages, groups)


def _tidy(config: RunConfig, newest_whole: int, damaged: list[str]) -> list[str]:
    """Finish what a killed run was about to do: remove the unfinished save, and what retention
    gives up. Returns what a reader of the log should know."""
    notes = [f"{problem}; using the one before" for problem in damaged]
    for folder in leftovers(config.run_dir):
        shutil.rmtree(folder, ignore_errors=True)
        fate = "cannot be removed" if folder.exists() else "removed"
        notes.append(f"{folder}: an unfinished save, {fate}")
    return notes + prune(config, newest_whole)


def _notes_on_changes(config: RunConfig, found: Preflight) -> list[str]:
    changes = check_continues(config, found.data_identity)
    if not changes:
        return []
    note = "changed since the checkpoint: " + "; ".join(changes)
    if any(change.startswith("train.steps") for change in changes):
        note += " (the schedule follows train.steps unless schedule.total_steps is set)"
    return [note]


def _say_finished(config: RunConfig, step: int) -> None:
    Console().print(
        f"{config.run_dir} is finished: step {step} of train.steps={config.train.steps}; "
        "raise train.steps to go on",
        soft_wrap=True,
    )


def _validator(
    config: RunConfig,
    engine: TrainingEngine,
    tracker: Tracker,
    supervised: Supervision,
) -> Callable[[int], None]:
    """Perplexity at every evaluated length, to the tracker and, at the end, to the run folder."""

    data = ScoredData.of(config)
    plans = make_plans(Request(config.evaluation_lengths), config, data)

    def score(microbatches: list[Microbatch], on_losses: Callable[[Tensor], None]) -> None:
        if supervised.should_stop():
            raise StopEvaluation
        engine.evaluate(microbatches, on_losses)

    def note(step: int, message: str) -> None:
        tracker.log("event", {"event": "note", "step": step, "message": message})

    def write(step: int, measured: Measurement) -> None:
        expected = expected_result(config, step, None, data, measured.plan)
        result = complete_result(expected, measured, data, engine.groups, partial(note, step))
        try:
            write_result(config.run_dir, result, measured.sums.documents)
        except OSError as error:  # a full disk: metrics.jsonl has it already
            note(step, f"evaluation at length {result.length} not written ({error.strerror})")

    def validate(step: int) -> None:
        for plan in plans:
            measured = measure(plan, data, config.evaluation.tokens_per_batch, engine.groups, score)
            record = {
                "step": step,
                "split": data.split,
                "protocol": plan.protocol,
                "length": plan.length,
                "loss": measured.loss,
                "perplexity": measured.perplexity,
                "tokens_scored": measured.sums.tokens,
                "evaluation_seconds": measured.seconds,
            }
            tracker.log("evaluation", record)
            if step == config.train.steps and engine.groups.is_first_rank:
                write(step, measured)

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
        "job": groups.process.job,
        "restart": groups.process.restart,
        "attempt": groups.process.attempt,
        "nodes": list(groups.process.nodes),
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
    notes: list[str],
) -> None:
    """The first events of a run's life: what starts, what has changed, what is worth knowing."""
    kernel = details["position_proof"]["backend"]  # type: ignore[index]
    message = (
        f"{config.name}: {details['layout']}, step {progress.step} of {config.train.steps}; "
        f"{config.model.position} positions proved with the {kernel} kernel"
    )
    tracker.log("event", {"event": "start", "step": progress.step, "message": message, **details})
    for message in notes:
        tracker.log("event", {"event": "note", "step": progress.step, "message": message})
    unshared = groups.gather(check_shared_cache(config, groups.is_first_rank, groups.barrier))
    for message in sorted({sentence for sentence in unshared if sentence}):
        tracker.log("event", {"event": "cache", "step": progress.step, "message": message})
