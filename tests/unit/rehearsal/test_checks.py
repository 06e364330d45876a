"""The checks on views that were right and have been broken by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_lm.data.sequences import StepSequences
from distributed_lm.layout import Layout
from distributed_lm.planner.memory import rank_memory
from distributed_lm.rehearsal.checks import Expected, check_memory, show, whole_groups
from distributed_lm.rehearsal.command import (
    CHECKS,
    RehearsalError,
    conclude,
    find_problems,
    sample_ranks,
)
from distributed_lm.rehearsal.report import Rehearsal
from distributed_lm.rehearsal.views import RankView, SavedBlocks, Script
from tests.support.rehearsal import rehearse_all
from tests.support.training import VOCAB, tiny_config

CONFIG = tiny_config(
    precision="bf16",
    data={"block_length": 64},
    parallel={"tensor": 2, "pipeline": 2},
    batch={"global_batch_size": 8, "micro_batch_size": 1},
)
LAYOUT = Layout.of(CONFIG, 8)
MEMORY = tuple(rank_memory(CONFIG, LAYOUT, VOCAB, stage) for stage in range(LAYOUT.pipeline))
EXPECTED = Expected(LAYOUT, CONFIG.model, VOCAB, 8, 2, ("exp_avg", "exp_avg_sq"), MEMORY)

Views = list[RankView]


@pytest.fixture(scope="module")
def right() -> Views:
    """Eight ranks: tensor = rank % 2, data = rank // 2 % 2, pipeline = rank // 4."""
    return rehearse_all([(CONFIG, 8)])[0][0]


def change(views: Views, rank: int, **fields: Any) -> Views:
    return [replace(view, **fields) if view.rank == rank else view for view in views]


def change_weight(views: Views, rank: int, which: str, **fields: Any) -> Views:
    weights = tuple(
        replace(weight, **fields) if weight.name == which else weight
        for weight in views[rank].weights
    )
    return change(views, rank, weights=weights)


def move_saved(saved: SavedBlocks, key: str, shift: int) -> SavedBlocks:
    chosen = saved.tensor == saved.keys.index(key)
    assert chosen.any()
    return replace(saved, bounds=saved.bounds + shift * np.outer(chosen, [1, 1, 0, 0]))


def drop_saved(saved: SavedBlocks, key: str) -> SavedBlocks:
    kept = saved.tensor != saved.keys.index(key)
    numbers = saved.tensor[kept] - (saved.tensor[kept] > saved.keys.index(key))
    index = saved.keys.index(key)
    return SavedBlocks(
        saved.keys[:index] + saved.keys[index + 1 :],
        saved.global_shapes[:index] + saved.global_shapes[index + 1 :],
        numbers,
        saved.bounds[kept],
    )


def test_right_views_have_no_problems(right: Views) -> None:
    assert find_problems(right, EXPECTED) == {name: [] for name in CHECKS}


EMBEDDING = "embedding.weight"
NORM = "decoder.layers.1.input_layernorm.weight"
BIAS = "decoder.layers.1.self_attention.linear_qkv.bias"

BROKEN: dict[str, tuple[str, Callable[[Views], Views], str]] = {
    "another group": (
        "process groups",
        lambda v: change(v, 3, groups={**v[3].groups, "data": (2, 3)}),
        "rank 3: its data group is 2, 3, the layout puts it with 1, 3",
    ),
    "groups that disagree": (
        "process groups",
        lambda v: change(v, 3, groups={**v[3].groups, "data": (2, 3)}),
        "rank 2: rank 3 counts it into its data group 2, 3, and its own is another",
    ),
    "no embedding group": (
        "process groups",
        lambda v: change(
            v, 4, groups={kind: group for kind, group in v[4].groups.items() if kind != "embedding"}
        ),
        "rank 4: its embedding group is nothing, the layout puts it with 0, 4",
    ),
    "DeepSpeed's own group": (
        "process groups",
        lambda v: change(v, 5, deepspeed_groups={"data": (4, 5), "model": v[5].groups["model"]}),
        "rank 5: DeepSpeed's data group is 4, 5, Megatron's 5, 7",
    ),
    "a layer twice": (
        "layers",
        lambda v: change(v, 4, layers=((2, 3, 4),)),
        "ranks 0, 4 (one pipeline): hold layers 0, 1, 2, 2, 3, 4 in this order, expected "
        "0, 1, 2, 3, 4",
    ),
    "an embedding too many": (
        "layers",
        lambda v: change(v, 6, has_embedding=True),
        "rank 6: has the embedding, and is pipeline stage 1 of 2",
    ),
    "a virtual stage too many": (
        "layers",
        lambda v: change(v, 6, layers=((3,), (4,))),
        "rank 6: has 2 virtual stages, expected 1",
    ),
    "a parameter without a place": (
        "parameters",
        lambda v: change(v, 1, parameters=v[1].parameters + 7),
        "rank 1: has {0:,} parameters, of which {1:,} have a place in a global tensor",
    ),
    "a bias too few": (
        "parameters",
        lambda v: change(v, 5, parameters=v[5].parameters - 64),
        "rank 5 (pipeline stage 1): has",
    ),
    "half of the heads twice": (
        "slopes",
        lambda v: change(v, 1, slopes=v[0].slopes),
        "ranks 0, 1 (one tensor group), layer 0: slope 0.25 for head 2 of the model, expected "
        "0.015625",
    ),
    "slopes in another order": (
        "slopes",
        lambda v: change(v, 0, slopes=tuple(slopes[::-1] for slopes in v[0].slopes)),
        "ranks 0, 1 (one tensor group), layer 0: slope 0.0625 for head 0 of the model, expected "
        "0.25",
    ),
    "a slope too few in a later layer": (
        "slopes",
        lambda v: change(v, 4, slopes=(v[4].slopes[0], v[4].slopes[1][:1])),
        "ranks 4, 5 (one tensor group), layer 4: have 3 slopes together, expected 4",
    ),
    "one batch for both data-parallel ranks": (
        "sequences",
        lambda v: [replace(view, samples=v[0].samples) for view in v],
        "ranks 0 and 2: both read the sequence (corpus, epoch, block, part) = (0, 0, 0, 0), rank 2 "
        "at rehearsed step 0",
    ),
    "another batch on the second stage": (
        "sequences",
        lambda v: change(v, 4, samples=v[2].samples),
        "rank 4: reads other sequences than rank 0, which shares its replica of the model",
    ),
    "a sequence too few": (
        "sequences",
        lambda v: [
            replace(view, samples=view.samples[:, 1:]) if view.rank in (0, 1, 4, 5) else view
            for view in v
        ],
        "rehearsed step 0: all ranks together read 7 sequences, expected batch.global_batch_size=8",
    ),
    "a part that is not there": (
        "sequences",
        lambda v: [replace(view, samples=np.add(view.samples, [0, 0, 0, 1])) for view in v],
        "rehearsed step 0: no rank reads part 0 of block (corpus, epoch, block) = (0, 0, 0)",
    ),
    "copies that differ": (
        "weights",
        lambda v: change_weight(v, 2, NORM, name="other"),
        f"ranks 0 and 2: hold different weights ({NORM} is on one of them only), though they are "
        "data-parallel copies",
    ),
    "an offset that is another rank's": (
        "weights",
        lambda v: change_weight(v, 1, BIAS, offset=(0,)),
        f"{BIAS} [192], row 0, column 0: ranks 0 and 1 hold it, expected one of them",
    ),
    "an offset past the end": (
        "weights",
        lambda v: change_weight(v, 1, BIAS, offset=(100,)),
        f"{BIAS} [192], row 100, column 0: what rank 1 would hold from there lies outside the "
        "tensor",
    ),
    "a norm only one tensor rank has": (
        "weights",
        lambda v: change_weight(v, 1, NORM, name="other"),
        f"ranks 0 and 1: {NORM} should be the same on every tensor-parallel rank, and is not",
    ),
    "a copy of nothing": (
        "weights",
        lambda v: change_weight(v, 4, EMBEDDING, name="other"),
        "rank 4: has a copy of other, which no rank owns in that shape",
    ),
    "a tied embedding counted twice": (
        "weights",
        lambda v: change_weight(v, 4, EMBEDDING, is_tied_copy=False),
        "embedding.weight [192, 64], row 0, column 0: ranks 0 and 4 hold it, expected one of them",
    ),
    "a layer nobody owns": (
        "weights",
        lambda v: [
            replace(view, weights=tuple(w for w in view.weights if w.name != NORM)) for view in v
        ],
        "the replica of ranks 0 … 5: owns",
    ),
    "a shard written elsewhere": (
        "checkpoint",
        lambda v: change(v, 2, saved=move_saved(v[2].saved, v[2].saved.keys[0], 1)),
        "{2} ",
    ),
    "a tensor nobody writes": (
        "checkpoint",
        lambda v: change(v, 0, saved=drop_saved(v[0].saved, f"model.{NORM}")),
        f"no rank writes model.{NORM}",
    ),
    "a tensor nobody has": (
        "checkpoint",
        lambda v: change(
            v, 0, saved=replace(v[0].saved, keys=("model.x", *v[0].saved.keys[1:]))
        ),
        "rank 0: writes model.x, which no rank's model has",
    ),
    "shapes that differ": (
        "checkpoint",
        lambda v: change(
            v, 1,
            saved=replace(v[1].saved, global_shapes=((7, 7), *v[1].saved.global_shapes[1:])),
        ),
        "rank 1: writes model.embedding.weight as (7, 7), other ranks as (192, 64)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_view_is_named(name: str, right: Views) -> None:
    check, breakage, sentence = BROKEN[name]
    described = sum(int(np.prod(weight.shape)) for weight in right[1].weights)
    wanted = sentence.format(described + 7, described, right[2].saved.keys[0])
    problems = find_problems(breakage(right), EXPECTED)
    assert any(found.startswith(wanted) for found in problems[check]), problems[check]
    related = {check, "checkpoint", "parameters", "weights"}
    assert {other for other, found in problems.items() if found} <= related


def test_of_some_ranks_what_can_be_said_is_checked(right: Views) -> None:
    replica = [right[rank] for rank in (2, 3, 6, 7)]
    assert find_problems(replica, EXPECTED) == {name: [] for name in CHECKS}
    broken = change(replica, 3, slopes=right[0].slopes)
    assert find_problems(broken, EXPECTED)["slopes"]
    alone = [right[3]]
    assert find_problems(alone, EXPECTED) == {name: [] for name in CHECKS}
    twice = change(right[:2], 1, saved=right[0].saved)
    assert "ranks 0 and 1 write it" in find_problems(twice, EXPECTED)["checkpoint"][0]


def test_problems_are_printed_and_end_the_command(
    right: Views, capsys: pytest.CaptureFixture[str]
) -> None:
    sequences = StepSequences(CONFIG, [1.0], [12], Path())
    script = Script(CONFIG, LAYOUT, VOCAB, EXPECTED.moments, sequences, (0,), "a stand-in")
    memory = [rank_memory(CONFIG, LAYOUT, VOCAB, stage) for stage in range(2)]
    rehearsal = Rehearsal(script, right, find_problems(right, EXPECTED), memory, 80.0, 2, 1.5)
    conclude(rehearsal)
    shown = capsys.readouterr().out
    assert "tiny: data=2 tensor=2 pipeline=2, zero.stage=1; built all of 8 ranks in 2 s" in shown
    assert "4: 0.25 … 0.003906" in shown
    assert "embedding, 0–2" in shown
    assert "fits in a device's 80 GB" in shown
    broken = change(right, 1, slopes=right[0].slopes)
    with pytest.raises(RehearsalError, match=r"not fit together \(1 problem, above\)") as error:
        conclude(replace(rehearsal, views=broken, problems=find_problems(broken, EXPECTED)))
    assert error.value.exit_code == 1
    assert "ranks 0, 1 (one tensor group), layer 0: slope 0.25" in capsys.readouterr().out


def test_whole_groups(right: Views) -> None:
    found = whole_groups([right[rank] for rank in (0, 1, 2, 4)], "pipeline")
    assert [[view.rank for view in group] for group in found] == [[0, 4]]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "count"), [(1, 1, 1024, 48), (2, 4, 128, 48), (8, 16, 8, 128)]
)
def test_a_sample_is_whole_replicas(tensor: int, pipeline: int, data: int, count: int) -> None:
    layout = Layout(data, tensor, pipeline, virtual_pipeline=1, sequence=False)
    ranks = sample_ranks(layout, seed=1)
    assert len(ranks) == len(set(ranks)) == count
    replicas = {layout.coordinates(rank).data for rank in ranks}
    assert len(replicas) * tensor * pipeline == count
    assert 0 in replicas
    if len(replicas) > 1:
        assert data - 1 in replicas


def test_long_lists_are_shortened() -> None:
    assert show(range(3)) == "0, 1, 2"
    assert show(range(100)) == "0, 1, 2, 3 … 98, 99 (100 in all)"
    assert show(()) == "nothing"


@pytest.mark.parametrize(
    ("factor", "said"), [(2.0, "rank 3: holds "), (0.5, "tensor rank 1 of stage 0: all data-")]
)
def test_memory_that_is_not_the_planned(right: Views, factor: float, said: str) -> None:
    """Weights twice, or not all of them."""
    found = change(right, 3, state_bytes=round(right[3].state_bytes * factor))
    [problem] = check_memory(found, EXPECTED)
    assert problem.startswith(said)


def test_device_too_small(right: Views) -> None:
    assert list(check_memory(right, replace(EXPECTED, device_memory_gb=80.0))) == []
    problems = list(check_memory(right, replace(EXPECTED, device_memory_gb=1e-4)))
    assert [problem[:14] for problem in problems] == ["stage 0: needs", "stage 1: needs"]
