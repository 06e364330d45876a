"""Random states: which ranks draw alike, and that what is saved is drawn again."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from distributed_lm import process_groups
from distributed_lm.config import RunConfig
from distributed_lm.layout import Layout
from distributed_lm.process_groups import (
    DATA_PARALLEL_RNG,
    MODEL_PARALLEL_RNG,
    Process,
    random_states,
    seed_random_states,
    set_random_states,
)
from tests.support.ranks import run_distributed
from tests.support.training import tiny_config

TRACKERS = (DATA_PARALLEL_RNG, MODEL_PARALLEL_RNG)
STATES = ("default", *TRACKERS)


def draw(source: str) -> list[float]:
    """Four numbers, and the state moves on."""
    if source == "default":
        return torch.rand(4).tolist()
    with get_cuda_rng_tracker().fork(source):
        return torch.rand(4).tolist()


def draw_all() -> dict[str, list[float]]:
    return {name: draw(name) for name in STATES}


def draw_save_and_restore(config: RunConfig) -> dict[str, Any]:
    process = Process.from_environment()
    groups = process_groups.start(config, process, Layout.of(config, process.world_size))
    first = draw_all()
    saved = {name: state.clone() for name, state in random_states().items()}
    after = [draw_all(), draw_all()]
    seed_random_states(config.seed + 1, groups)
    other = draw_all()
    set_random_states(saved)
    again = [draw_all(), draw_all()]
    # Restoring must not tie the live states to the saved ones, which are drawn from once more.
    set_random_states(saved)
    return {
        "place": groups.coordinates,
        "names": set(saved),
        "first": first,
        "after": after,
        "other": other,
        "again": [again, [draw_all(), draw_all()]],
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """TP 2 × DP 2."""
    return run_distributed(draw_save_and_restore, 4, tiny_config(parallel={"tensor": 2}))


def test_same_draws_follow_a_restored_state(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["names"] == set(STATES)
        for again in rank["again"]:
            assert again == rank["after"]
        for name in STATES:
            draws = [rank["first"][name], *(after[name] for after in rank["after"])]
            draws.append(rank["other"][name])
            assert len({tuple(values) for values in draws}) == 4, name  # or equal is no news


def test_tensor_parallel_ranks_differ_only_in_sharded_regions(
    ranks: list[dict[str, Any]],
) -> None:
    def distinct(name: str, **place: int) -> int:
        """How many different first draws there are among the ranks at ``place``."""
        chosen = [
            tuple(rank["first"][name])
            for rank in ranks
            if all(getattr(rank["place"], axis) == index for axis, index in place.items())
        ]
        assert len(chosen) == 2
        return len(set(chosen))

    for index in (0, 1):
        assert distinct("default", data=index) == 1
        assert distinct(DATA_PARALLEL_RNG, data=index) == 1
        assert distinct(MODEL_PARALLEL_RNG, data=index) == 2
        for name in STATES:
            assert distinct(name, tensor=index) == 2
