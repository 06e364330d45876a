"""Is a pipeline's bubble as its formula says?

Forward and backward of m microbatches of one sequence over p = 2 processes of one thread each, as a
line over m: its slope is what a microbatch costs, and what is left of it at m = 0 is the bubble,
predicted as (p − 1) / (v · m) of the work itself for v chunks of the model in each process
(Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters", §2.2). On
CPUs with gloo.

    python -m benchmarks.bubble [--light]
"""

import argparse
import functools
import statistics
from contextlib import ExitStack
import torch

from benchmarks import harness
from benchmarks.harness import Ratio, Result
from benchmarks.parallel import SIZES, run_config
from benchmarks.ranks import Ranks, Turn
from distributed_lm.config import RunConfig

CPU = torch.device("cpu")
MICROBATCHES = (2, 4, 8, 16)
STAGES = 2
CHUNKS = (1, 2)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--light", action="store_true", help="tiny model")
    return parser


def measure(options: argparse.Namespace) -> Result:
    result = Result("bubble", CPU)
    size = SIZES["light" if options.light else "default"]
    with ExitStack() as stack:
        ranks = {chunks: stack.enter_context(_start(size, chunks)) for chunks in CHUNKS}
        cases = {
            f"{chunks} {count}": functools.partial(ranks[chunks].turn, count)
            for chunks in CHUNKS
            for count in MICROBATCHES
        }
        samples = harness.alternate(cases, options.rounds, CPU)
    for chunks in CHUNKS:
        seconds = {count: samples[f"{chunks} {count}"].seconds for count in MICROBATCHES}
        shares = bubbles(seconds)
        for count in MICROBATCHES:
            predicted = (STAGES - 1) / (chunks * count)
            result.rows.append(
                {
                    "chunks in each process": chunks,
                    "microbatches": count,
                    "seconds": statistics.median(seconds[count]),
                    "bubble predicted": predicted,
                    "bubble measured": statistics.median(shares[count]),
                }
            )
            speeds = [(1 + predicted) / (1 + share) for share in shares[count]]
            result.ratios[f"{chunks} chunks, {count} microbatches: predicted to measured"] = (
                Ratio.of(speeds)
            )
    return result


def bubbles(seconds: dict[int, tuple[float, ...]]) -> dict[int, list[float]]:
    """By number of microbatches, each round's time beyond the work itself, as a share of that work.

    Args:
        seconds: by number of microbatches, the rounds.
    """
    rounds = [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values())]
    return {
        count: [values[count] / (count * _slope(values)) - 1 for values in rounds]
        for count in seconds
    }


def _slope(values: dict[int, float]) -> float:
    """Of the line of least squares."""
    x, y = list(values), list(values.values())
    return statistics.linear_regression(x, y).slope


def _start(size: dict[str, int], chunks: int) -> Ranks:
    parallel = {"pipeline": STAGES, "virtual_pipeline": chunks}
    config = run_config(size, max(MICROBATCHES), 1, parallel=parallel, zero={"stage": 0})
    return Ranks(build_schedule, config, world_size=STAGES, threads=1)


def build_schedule(config: RunConfig) -> Turn:
    """On every rank: forward and backward of so many microbatches, without reduction or
    optimizer."""
    from benchmarks.engines import build_engine
    from distributed_lm.pipeline import run_schedule
    from tests.support.training import random_microbatches

    engine, groups = build_engine(config)
    microbatches = random_microbatches(config, groups, 0)

    def turn(count: int) -> None:
        run_schedule(engine.handles, microbatches[:count], groups, forward_only=False)
        engine.optimizer.zero_grad(set_to_none=False)

    return turn


if __name__ == "__main__":
    harness.main(parser(), measure)
