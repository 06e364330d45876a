"""What does splitting a training step over processes cost, at equal cores?

Two processes of half the cores each against one process with all of them, same model, same global
batch: tokens per second of whole training steps, on CPUs with gloo. All are alive at once and take
turns. The last row gives each of the two processes all the cores, which a launcher must not do.

    python -m benchmarks.parallel [--light]
"""

import argparse
import os
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Result
from benchmarks.ranks import Ranks, Turn
from distributed_lm.config import RunConfig

CPU = torch.device("cpu")
SIZES: dict[str, dict[str, int]] = {
    "default": {"num_layers": 8, "hidden_size": 384, "vocab_size": 4096, "length": 256},
    "light": {"num_layers": 4, "hidden_size": 256, "vocab_size": 512, "length": 128},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data, ZeRO 0": {"zero": {"stage": 0}},
    "data, ZeRO 1": {"zero": {"stage": 1}},
    "data, ZeRO 2": {"zero": {"stage": 2}},
    "data, ZeRO 3": {"zero": {"stage": 3}},
    "tensor": {"parallel": {"tensor": 2}},
    "tensor, sequence": {"parallel": {"tensor": 2, "sequence": True}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
}
LIGHT_LAYOUTS = ("data, ZeRO 1", "tensor", "pipeline")
GLOBAL_BATCH = 8
ONE = "one process"
FIGHT = "data, ZeRO 1, all cores twice"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--light", action="store_true", help="few layouts, tiny model")
    return parser


def measure(options: argparse.Namespace) -> Result:
    result = Result("parallel", CPU)
    size = SIZES["light" if options.light else "default"]
    each = max(1, len(os.sched_getaffinity(0)) // 2)
    with ExitStack() as stack:

        def turn(world_size: int, threads: int, micro: int, sections: dict[str, Any]) -> Turn:
            config = run_config(size, GLOBAL_BATCH, micro, **sections)
            ranks = Ranks(build_step, config, world_size=world_size, threads=threads)
            return stack.enter_context(ranks).turn

        cases = {ONE: turn(1, 2 * each, 4, {"zero": {"stage": 0}})}
        for name in LIGHT_LAYOUTS if options.light else LAYOUTS:
            cases[name] = turn(2, each, _micro_batch_size(name), LAYOUTS[name])
        if not options.light:
            cases[FIGHT] = turn(2, 2 * each, 2, LAYOUTS["data, ZeRO 1"])
        product, flops = harness.matmul_case(CPU, torch.float32)
        samples = harness.alternate({**cases, "product": product}, options.rounds, CPU)
    result.ceilings["matrix product, GFLOP/s"] = flops / samples["product"].median / 1e9
    for name in cases:
        ratio = samples[ONE].ratio_to(samples[name])
        result.rows.append(
            {
                "layout": name,
                "processes × threads": _processes(name, each),
                "tokens/s": GLOBAL_BATCH * size["length"] / samples[name].median,
                "step, s": samples[name].median,
                "to one process": ratio.value,
            }
        )
        if name in LAYOUTS:
            result.ratios[f"{name}: tokens/s to one process"] = ratio
    return result


def _micro_batch_size(layout: str) -> int:
    """Two microbatches on every process; a pipeline needs as many as there are."""
    if layout.startswith("data"):
        return 2
    return 1 if "pipeline" in LAYOUTS[layout]["parallel"] else 4


def _processes(name: str, each: int) -> str:
    if name == ONE:
        return f"1 × {2 * each}"
    return f"2 × {2 * each}" if name == FIGHT else f"2 × {each}"


def run_config(
    size: dict[str, int], global_batch_size: int, micro_batch_size: int, **sections: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "benchmark",
            "precision": "fp32",
            "model": {
                "num_layers": size["num_layers"],
                "hidden_size": size["hidden_size"],
                "num_attention_heads": size["hidden_size"] // 64,
                "vocab_size": size["vocab_size"],
            },
            "data": {"path": "unused", "sequence_length": size["length"]},
            "batch": {
                "global_batch_size": global_batch_size,
                "micro_batch_size": micro_batch_size,
            },
            "train": {"steps": 1},
            "optimizer": {"learning_rate": 1e-3},
            **sections,
        }
    )


def build_step(config: RunConfig) -> Turn:
    """On every rank: a training step on this rank's share of random tokens."""
    from benchmarks.engines import build_engine
    from tests.support.training import random_microbatches

    engine, groups = build_engine(config)
    microbatches = random_microbatches(config, groups, 0)
    return lambda: engine.train_step(microbatches, 1e-4).loss


if __name__ == "__main__":
    harness.main(parser(), measure)
