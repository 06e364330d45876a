"""How long does a checkpoint stop training? Asynchronous against synchronous saves, one process.

    python benchmarks/checkpoint.py [--hidden-size 640] [--saves 6]

Prints medians, and the plain copy of a file of that size as the ceiling.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from distributed_lm import platform, process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import initialize_weights, parameter_shards
from distributed_lm.process_groups import Process
from distributed_lm.training.engine import TrainingEngine
from distributed_lm.training.snapshot import begin_snapshot

VOCAB_SIZE = 8192


def build(hidden_size: int) -> TrainingEngine:
    """Six layers in fp32 with ZeRO 1: 16 bytes of state per parameter."""
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "precision": "fp32",
            "model": {
                "num_layers": 6,
                "hidden_size": hidden_size,
                "num_attention_heads": 10,
                "vocab_size": VOCAB_SIZE,
            },
            "data": {"path": "unused", "sequence_length": 64},
            "batch": {"global_batch_size": 1},
            "train": {"steps": 1},
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, 1))
    stages = build_stages(config, VOCAB_SIZE, groups)
    initialize_weights(parameter_shards(stages, groups), config.model, config.seed)
    return TrainingEngine(config, stages, groups)


def measure(engine: TrainingEngine, run_dir: Path, saves: int, wait: bool) -> dict[str, float]:
    """Medians over ``saves`` saves after one to warm up, in seconds."""
    rows = []
    for step in range(saves + 1):
        started = time.perf_counter()
        save = begin_snapshot(engine, run_dir, step, {})
        if wait:
            seconds = save.finish()
            stall = time.perf_counter() - started
        else:
            stall = save.stall_seconds
            while save.is_writing():
                time.sleep(0.05)
            seconds = save.finish()
        rows.append({**seconds, "stall": stall})
        shutil.rmtree(run_dir / "checkpoints")
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}


def copy_seconds(size: int, folder: Path) -> float:
    """Write and sync one file of ``size`` bytes."""
    content = bytes(1 << 20)
    started = time.perf_counter()
    with (folder / "copy").open("wb") as stream:
        for _ in range(size >> 20):
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=640)
    parser.add_argument("--saves", type=int, default=6)
    arguments = parser.parse_args()
    platform.quiet_engines()
    engine = build(arguments.hidden_size)
    parameters = sum(shard.parameter.numel() for shard in engine.shards)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        synchronous = measure(engine, folder, arguments.saves, wait=True)
        asynchronous = measure(engine, folder, arguments.saves, wait=False)
        copy = copy_seconds(16 * parameters, folder)
    lines = [
        f"state {16 * parameters / 1e6:.0f} MB, plain write and sync {copy:.2f} s",
        f"synchronous:  stall {synchronous['stall']:.3f} s",
        f"asynchronous: stall {asynchronous['stall']:.3f} s "
        f"({asynchronous['stall'] / synchronous['stall']:.1%} of synchronous), written after "
        f"{asynchronous['save_seconds']:.2f} s, finalize {asynchronous['finalize_seconds']:.3f} s",
        str(platform.describe_environment()),
    ]
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
