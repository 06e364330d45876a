"""Ranking layouts: all legal ones and no other, what fits, what is chosen, what is written."""

from pathlib import Path
from typing import Any

import pytest

from distributed_lm.config import RunConfig, check_config, load_config
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.planner.devices import DEVICES, NodeShape, load_node_shape
from distributed_lm.planner.memory import check_fits, largest_memory, rank_memory
from distributed_lm.planner.scaling import strong_scaling
from distributed_lm.planner.search import (
    Ranking,
    check_write,
    legal_layouts,
    rank_layouts,
    reasons,
    write_best,
)
from distributed_lm.planner.step_time import Machine
from launch.cluster import Cluster, load_cluster
from tests.support.training import tiny_config

ROOT = Path(__file__).parents[3]
PAPER = ROOT / "configs/runs/alibi_1p3b_L1024.yaml"
SEVEN = (f"extends: [{PAPER}, {ROOT}/configs/models/7b.yaml]\n", 51_200)
H100 = Machine(DEVICES["H100"], 8)


def rank(config: RunConfig, devices: int, gigabytes: float | None = 80) -> Ranking:
    limit = None if gigabytes is None else gigabytes * 1e9
    return rank_layouts(config, devices, 51_200, H100, limit)


def test_every_layout_is_legal_and_none_is_left_out() -> None:
    config = tiny_config(model={"vocab_size": 192})
    ranking = rank_layouts(config, 4, 192, Machine(DEVICES["H100"], 4), None)
    found = set()
    for one in ranking.fitting:
        check_config(one.config)
        assert Layout.of(one.config, 4) == one.layout
        assert one.layout.world_size == 4
        found.add(tuple(one.fields.values()))
    assert len(found) == len(ranking.fitting)
    # By hand: 5 layers, 4 heads, 8 sequences, fp32 (so every ZeRO stage, above 1 without pipeline).
    grids = {(t, p, v, s) for t, p, v, s, *_ in found}
    assert grids == {
        (1, 1, 1, False), (2, 1, 1, False), (2, 1, 1, True), (4, 1, 1, False), (4, 1, 1, True),
        (1, 2, 1, False), (1, 2, 2, False), (2, 2, 1, False), (2, 2, 1, True), (2, 2, 2, False),
        (2, 2, 2, True), (1, 4, 1, False),
    }  # fmt: skip
    stages = {(p, zero) for _, p, _, _, zero, *_ in found}
    assert stages == {(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (4, 0), (4, 1)}
    assert {micro for *_, micro, _ in found} == {1, 2, 4, 8}


def test_no_layout_contradicts_the_rest_of_the_config() -> None:
    """Compiled layers allow neither tensor parallelism nor ZeRO 3 nor selective recomputation."""
    compiled = tiny_config(model={"vocab_size": 192}, train={"compile": True})
    found = [one for one, _ in legal_layouts(compiled, 4, 4)]
    for config in found:
        check_config(config)
    assert {config.train.recompute for config in found} == {"none", "full"}
    assert {config.parallel.tensor for config in found} == {1}
    assert {config.zero.stage for config in found} == {0, 1, 2}


def test_the_configs_own_stage_keeps_no_layout_away() -> None:
    """ZeRO 2 goes with no pipeline, which others do."""
    one, two = (
        [config for config, _ in legal_layouts(tiny, 4, 4)]
        for tiny in (tiny_config(zero={"stage": stage}) for stage in (1, 2))
    )
    assert one == two


def test_the_papers_model_wants_data_parallel_ranks_only() -> None:
    ranking = rank(load_config(PAPER), 128)
    best = ranking.best
    assert (best.layout.tensor, best.layout.pipeline) == (1, 1)
    assert best.config.zero.stage == 1
    times = [one.speed.step.total for one in ranking.fitting]
    assert times == sorted(times)
    assert best.speed.step.total <= 1.05 * times[0]
    said = reasons(ranking)
    [tensor] = [line for line in said if line.startswith("parallel.tensor=2:")]
    assert "the all-reduces of two activations per layer and direction take" in tensor
    assert any(line.startswith("train.recompute=full:") and "again" in line for line in said)
    sizes = [line.split(":")[0] for line in said if line.startswith("batch.micro")]
    assert sizes == [f"batch.micro_batch_size={size}" for size in (1, 2, 4, 8, 32)]
    slower = [float(line.split("at best ")[1].split("%")[0]) for line in said]
    for line, percent in zip(said, slower, strict=True):
        assert ("too little to tell" in line) == (percent < 5)
    [two] = [line for line in said if line.startswith("zero.stage=2:")]
    assert "its reductions run beside backward, which the model leaves out" in two


def test_what_does_not_fit_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "7b.yaml"
    path.write_text(SEVEN[0])
    ranking = rank(load_config(path), 16, 24)
    assert ranking.fitting
    assert ranking.too_large
    assert max(one.memory.total for one in ranking.fitting) <= 24e9
    assert min(one.memory.total for one in ranking.too_large) > 24e9
    # One process cannot even hold the weights and gradients of 7B parameters.
    assert all(
        one.layout.tensor * one.layout.pipeline > 1 or one.config.zero.stage >= 2
        for one in ranking.fitting
    )
    assert not rank(load_config(path), 8, 4).fitting


def test_impossible_number_of_devices_says_why() -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_batch_size=2048 is not a multiple of"):
        rank(load_config(PAPER), 29)


def test_written_config_loads_again(tmp_path: Path) -> None:
    ranking = rank(load_config(PAPER), 128)
    path = tmp_path / "sub" / "best.yaml"
    write_best(ranking.best, path, PAPER)
    assert load_config(path) == ranking.best.config
    with pytest.raises(ConfigError, match="exists"):
        check_write(path, ())
    with pytest.raises(ConfigError, match=r"overrides \(train\.steps=9\)"):
        check_write(tmp_path / "other.yaml", ["train.steps=9"])
    with pytest.raises(ConfigError, match=r"best\.yaml/below\.yaml: cannot be written: "):
        write_best(ranking.best, path / "below.yaml", PAPER)


def test_strong_scaling_falls() -> None:
    rows = strong_scaling(load_config(PAPER), 51_200, H100, (1, 16, 64), 80e9)
    assert [row.nodes for row in rows] == [1, 16, 64]
    utilization = [row.best.speed.mfu for row in rows]
    speeds = [row.best.speed.tokens_per_second for row in rows]
    hours = [row.best.speed.device_hours for row in rows]
    assert utilization[0] > utilization[1] > utilization[2]
    assert speeds == sorted(speeds)
    assert hours == sorted(hours)


def test_a_launch_counts_activations_too() -> None:
    config = load_config(PAPER, ["batch.micro_batch_size=32"])
    layout = Layout.of(config, 8)
    needed = largest_memory(config, layout, 51_200)
    state = needed.weights + needed.gradients + needed.masters + needed.moments
    check_fits(config, layout, 51_200, needed.total)
    with pytest.raises(ConfigError, match=r"more; a device has \d+ GB; lower batch\.micro_batch"):
        check_fits(config, layout, 51_200, state + 1e9)


def test_parts_of_the_papers_model() -> None:
    """ZeRO 1 over 128 ranks, by hand: 2 + 4 bytes per parameter, and 12 / 128."""
    config = load_config(PAPER)
    memory = rank_memory(config, Layout.of(config, 128), 51_200, 0)
    count = 1_363_818_496
    assert memory.weights == 2 * count
    assert memory.gradients == 4 * count
    assert memory.masters + memory.moments == 12 * count / 128
    assert sum(memory.parts().values()) == memory.total


@pytest.mark.parametrize("path", sorted((ROOT / "configs/clusters").glob("*.yaml")), ids=str)
def test_the_planner_reads_what_the_launcher_does(path: Path) -> None:
    ours, theirs = load_node_shape(str(path)), load_cluster(str(path))
    assert isinstance(theirs, Cluster)
    for field in type(ours).model_fields:
        assert getattr(ours, field) == getattr(theirs, field)
    assert load_node_shape(str(path.with_suffix(""))) == ours
    assert load_cluster(str(path.with_suffix(""))) == theirs


def test_no_field_of_the_launchers_looks_like_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    others = Cluster.model_fields.keys() - NodeShape.model_fields
    path.write_text("devices_per_node: 8\n" + "".join(f"{field}: 1\n" for field in others))
    assert load_node_shape(str(path)).devices_per_node == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: 2\n", "devices_per_node: field required"),
        ("devices_per_node: 0\n", "devices_per_node: input should be greater than 0"),
        ("devices_per_node: [\n", "cannot be read"),
        ("- devices_per_node\n", "expected 'field: value' lines, found a list"),
        (
            "devices_per_node: 8\ndevice_memory: 80\n",
            "device_memory: no such field; write device_m",
        ),
    ],
)
def test_bad_cluster_file_is_one_sentence(tmp_path: Path, text: str, said: Any) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_node_shape(str(path))
    assert "\n" not in str(caught.value)
