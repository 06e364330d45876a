"""How long does a checkpoint stop training, and how fast is it written and read?

Synchronous and asynchronous saves and loads of one process, against one plain file of that size,
written and synced, and read again. Reading is from the system's cache, of both alike.

    python -m benchmarks.checkpoint [--hidden-size 640]
"""

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import Result, Samples
from distributed_lm.config import RunConfig

if TYPE_CHECKING:
    from distributed_lm.training.engine import TrainingEngine

CHUNK_BYTES = 1 << 20


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=640)
    return parser


def measure(options: argparse.Namespace) -> Result:
    engine = build(options.hidden_size)
    size = 16 * sum(shard.parameter.numel() for shard in engine.shards)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        rounds = [one_round(engine, folder, size) for _ in range(options.rounds + 1)][1:]
    samples = {key: Samples(tuple(values[key] for values in rounds)) for key in rounds[0]}
    result = Result("checkpoint", engine.groups.device)
    for key, sample in samples.items():
        is_transfer = key not in ("asynchronous save, stall", "asynchronous save, to publish")
        result.rows.append(
            {
                "what": key,
                "seconds": sample.median,
                "GB/s": size / sample.median / 1e9 if is_transfer else "",
            }
        )
    write, read = samples["plain file, write and sync"], samples["plain file, read"]
    save, stall = samples["synchronous save"], samples["asynchronous save, stall"]
    result.ceilings["write and sync, GB/s"] = size / write.median / 1e9
    result.ceilings["read, GB/s"] = size / read.median / 1e9
    result.ratios = {
        "save: speed to plain file": write.ratio_to(save),
        "load: speed to plain file": read.ratio_to(samples["verify and load"]),
        "load: speed to hashing the file": samples["plain file, SHA-256"].ratio_to(
            samples["verify and load"]
        ),
        "stall: synchronous to asynchronous": save.ratio_to(stall),
    }
    return result


def build(hidden_size: int) -> "TrainingEngine":
    """Six layers in fp32 with ZeRO 1: 16 bytes in a checkpoint per parameter."""
    from benchmarks.engines import build_engine

    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "precision": "fp32",
            "model": {
                "num_layers": 6,
                "hidden_size": hidden_size,
                "num_attention_heads": 10,
                "vocab_size": 8192,
            },
            "data": {"path": "unused", "sequence_length": 64},
            "batch": {"global_batch_size": 1},
            "train": {"steps": 1},
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    engine, _ = build_engine(config)
    return engine


def one_round(engine: "TrainingEngine", folder: Path, size: int) -> dict[str, float]:
    """Seconds of each case, once."""
    from distributed_lm.training.snapshot import begin_snapshot

    seconds = {}
    started = time.perf_counter()
    begin_snapshot(engine, folder, 1, {}).finish()
    seconds["synchronous save"] = time.perf_counter() - started
    written = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*.distcp"))
    assert abs(written - size) < 0.02 * size, f"{written} bytes, expected about {size}"
    seconds["verify and load"] = timed(load, engine, folder)
    shutil.rmtree(folder / "checkpoints")
    save = begin_snapshot(engine, folder, 1, {})
    while save.is_writing():
        time.sleep(0.01)
    done = save.finish()
    seconds["asynchronous save, stall"] = save.stall_seconds
    seconds["asynchronous save"] = done["save_seconds"]
    seconds["asynchronous save, to publish"] = done["finalize_seconds"]
    shutil.rmtree(folder / "checkpoints")
    path = folder / "plain"
    seconds["plain file, write and sync"] = timed(write_plain, path, size)
    seconds["plain file, read"] = timed(read_plain, path, bytearray(CHUNK_BYTES))
    seconds["plain file, SHA-256"] = timed(hash_plain, path, bytearray(CHUNK_BYTES))
    path.unlink()
    return seconds


def load(engine: "TrainingEngine", folder: Path) -> None:
    """As a run that continues does it."""
    from distributed_lm.checkpoint.store import newest_verified
    from distributed_lm.training.snapshot import load_snapshot

    step, _ = newest_verified(folder, engine.groups)
    load_snapshot(engine, folder, step)


def timed(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def write_plain(path: Path, size: int) -> None:
    content = bytes(CHUNK_BYTES)
    with path.open("wb") as stream:
        for _ in range(size // CHUNK_BYTES):
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def read_plain(path: Path, buffer: bytearray) -> None:
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def hash_plain(path: Path, buffer: bytearray) -> None:
    """Reading that checks, as a load with damage found before use must."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])


if __name__ == "__main__":
    harness.main(parser(), measure)
