"""The ladder of ``launch check``: its rungs, the runs it makes, and what it calls a failure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distributed_lm.config import load_config
from launch import ladder, verdicts
from launch.__main__ import main
from launch.cluster import Cluster, load_cluster, seconds_of
from launch.ladder import Ladder, Rung, report, rungs_of, shortened

SMOKE = Path("configs/runs/smoke.yaml")
RUNS = sorted(Path("configs/runs").glob("*.yaml"))
CLUSTERS = sorted(path.stem for path in Path("configs/clusters").glob("*.yaml"))
LONG_BLOCKS = ("parallel.tensor=2", "data.block_length=320", "batch.global_batch_size=20")
Record = dict[str, Any]


def steps(*numbers: int, off: float = 0.0) -> list[Record]:
    """Train lines, with losses that are a function of the step, ``off`` by a share."""
    return [
        {
            "kind": "train", "step": number, "loss": 6.0 / number * (1 + off),
            "tokens_per_second": 1000.0 * number, "tokens_per_second_per_device": 500.0,
            "mfu": 0.25, "step_seconds": 0.1 * number,
        }
        for number in numbers
    ]  # fmt: skip


def event(name: str, step: int) -> Record:
    return {"kind": "event", "event": name, "step": step}


def told(name: str, message: str = "", time: float = 0.0, **values: Any) -> Record:
    """An event of the journal."""
    return {"event": name, "message": message, "time": time, "job": "1", **values}


class TestRungs:
    @staticmethod
    def lacking(devices: int, nodes: int, *overrides: str) -> dict[int, str]:
        cluster = Cluster(devices_per_node=devices)
        rungs = rungs_of(cluster, load_config(SMOKE, overrides), nodes)
        assert [(rung.nodes, rung.devices) for rung in rungs] == [
            (1, 1),
            (1, devices),
            (2, devices),
        ]
        return {rung.number: rung.lacking for rung in rungs if rung.lacking is not None}

    def test_all_where_there_are_two_nodes_of_several_devices(self) -> None:
        assert self.lacking(8, 2) == {}
        assert self.lacking(8, 16) == {}

    def test_what_is_not_there_says_why(self) -> None:
        assert self.lacking(1, 2) == {2: "a node has one device: it is rung 1"}
        assert "--nodes" in self.lacking(8, 1)[3]
        assert set(self.lacking(1, 1)) == {2, 3}

    def test_model_that_is_split_over_more_than_a_rung_has(self) -> None:
        split = ("parallel.tensor=4", "parallel.pipeline=4")
        assert self.lacking(8, 2, *split) == {
            2: "8 devices are not a multiple of the model's parts, 16"
        }
        assert set(self.lacking(4, 2, *split)) == {2, 3}


class TestShortened:
    @pytest.mark.parametrize("cluster", CLUSTERS)
    @pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
    def test_every_config_can_climb_on_every_cluster(
        self, path: Path, cluster: str, demo_data: Path
    ) -> None:
        """All rungs are planned, as for a submission, before the first one is queued."""
        file = load_cluster(cluster).model_copy(update={"device_memory_gb": None})
        overrides = [f"data.path={demo_data}", "output_dir=/shared/runs"]
        rungs = rungs_of(file, load_config(path, overrides), 2)
        found = Ladder(path, overrides, file, rungs, Path("/shared/runs/l"), math.inf, 30)
        last = found._plan(found.last)
        assert last.config.train.steps == 20
        assert last.config.run_dir == Path("/shared/runs/l/rung_3")
        assert last.job.nodes == 2
        longer = found._plan(found.last, 600)
        assert longer.config.train.steps == 620
        assert longer.config.checkpoint.save_every == 100
        same = {"train": longer.config.train, "checkpoint": longer.config.checkpoint}
        assert last.config.model_copy(update=same) == longer.config, (
            "the interrupted run is another"
        )

    def test_batch_is_the_same_on_every_rung_and_divides_over_all(self) -> None:
        config = load_config(SMOKE, LONG_BLOCKS)
        rungs = [Rung(1, "", 1, 1), Rung(2, "", 1, 6), Rung(3, "", 2, 6)]
        [batch] = [
            int(value) for name, _, value in
            (override.partition("=") for override in shortened(config, rungs))
            if name == "batch.global_batch_size"
        ]  # fmt: skip
        assert batch == 60  # whole blocks of 5 sequences, over 3 and 6 ranks of 2 each

    def test_first_rung_is_one_process_and_users_overrides_win(self, demo_data: Path) -> None:
        overrides = [
            f"data.path={demo_data}", "parallel.tensor=2", "parallel.sequence=true",
            "train.steps=12",
        ]  # fmt: skip
        cluster = Cluster(devices_per_node=2, device="cpu", nodes=2)
        rungs = rungs_of(cluster, load_config(SMOKE, overrides), 2)
        found = Ladder(SMOKE, overrides, cluster, rungs, Path("/shared/l"), math.inf, 30)
        first, second = (found._plan(rung).config for rung in rungs[:2])
        assert (first.parallel.tensor, first.parallel.sequence) == (1, False)
        assert (second.parallel.tensor, second.parallel.sequence) == (2, True)
        assert first.train.steps == second.train.steps == 12
        assert first.batch == second.batch

    @pytest.mark.parametrize(
        ("fields", "left", "seconds"),
        [
            ({}, 900, 900 + 2 * 180),
            ({"time": "10:00"}, 900, 600),
            ({"time": "0"}, 900, 900 + 2 * 180),
            ({"lead_seconds": 600}, 0, 60 + 2 * 600),
        ],
    )
    def test_job_asks_for_no_more_time_than_it_needs(
        self, fields: Record, left: float, seconds: int, demo_data: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(ladder.time, "monotonic", lambda: 1000.0)
        cluster = Cluster(devices_per_node=1, device="cpu", **fields)
        overrides = [f"data.path={demo_data}"]
        rungs = rungs_of(cluster, load_config(SMOKE, overrides), 1)
        found = Ladder(SMOKE, overrides, cluster, rungs, Path("/shared/l"), 1000.0 + left, 30)
        assert seconds_of(found._job_time()) == seconds


def test_without_sbatch_it_says_where_to_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as caught:
        main(["check", "--cluster", "local_test"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: sbatch is not here; run this on a login node of the cluster\n"


class TestParity:
    EXPECTED = verdicts.losses(steps(1, 2, 3))

    def judge(self, lines: Sequence[Record], precision: str = "fp32") -> verdicts.Finding:
        return verdicts.judge_parity(verdicts.losses(lines), self.EXPECTED, 3, precision)

    @pytest.mark.parametrize(
        ("off", "precision", "is_good"),
        [
            (4e-6, "fp32", True), (6e-6, "fp32", False), (9e-3, "bf16", True),
            (2e-2, "bf16", False), (9e-3, "fp16", True),
        ],
    )  # fmt: skip
    def test_tolerance(self, off: float, precision: str, is_good: bool) -> None:
        for sign in (1, -1):
            found = self.judge(steps(1, 2, 3, off=sign * off), precision)
            assert found.is_good is is_good
            assert f"within {off:.1e} of one process" in found.text

    def test_first_step_that_differs_is_named(self) -> None:
        found = self.judge([*steps(1), *steps(2, off=1e-3), *steps(3, off=1.0)])
        assert found.text.endswith("the first step beyond it is 2")

    def test_the_life_that_counted_counts(self) -> None:
        assert self.judge([*steps(1, 2, off=1.0), *steps(1, 2, 3)]).is_good

    def test_missing_or_strange_losses(self) -> None:
        assert self.judge(steps(1, 3)).text == "step 2 of 3 is not on record"
        found = self.judge([*steps(1, 2), {**steps(3)[0], "loss": math.nan}])
        assert (found.is_good, found.text) == (False, "the loss of step 3 is nan")

    def test_reference_must_learn(self) -> None:
        assert verdicts.judge_reference(self.EXPECTED, 3).is_good
        assert not verdicts.judge_reference({1: 2.0, 2: 2.0, 3: 2.0}, 3).is_good
        assert not verdicts.judge_reference({1: 2.0, 2: math.inf, 3: 1.0}, 3).is_good
        assert not verdicts.judge_reference({}, 3).is_good


class TestBandwidthAndSpeed:
    def test_bandwidth(self) -> None:
        checks = [told("health", gigabytes_per_second=12.345), told("health")]
        assert verdicts.judge_bandwidth(checks, 2).text == "12.35 GB/s between 2 nodes"
        assert "there is one node" in verdicts.judge_bandwidth([], 1).text
        assert "health_check off" in verdicts.judge_bandwidth([], 2).text

    def test_bandwidth_that_was_not_reached(self) -> None:
        check = told(
            "health", "0 of 2 nodes are well; the all-reduce failed", gigabytes_per_second=None
        )
        found = verdicts.judge_bandwidth([check], 2)
        assert (found.is_good, found.text) == (
            False,
            "0 of 2 nodes are well; the all-reduce failed",
        )

    def test_speed_is_of_the_later_half(self) -> None:
        lines = [event("start", 0), *steps(1, 2, 3, 4)]
        found = verdicts.judge_speed(lines)
        assert found.text == "3,500 tokens/s, 500 per device, MFU 25.0%"
        assert verdicts.step_seconds(lines) == pytest.approx(0.25)
        assert not verdicts.judge_speed([]).is_good


class TestKill:
    FIRST = (event("resume", 20), *steps(21, 22, 23, 24, 25))

    def judge(self, *after: Record) -> verdicts.Finding:
        return verdicts.judge_kill([*self.FIRST, *after], "fp32")

    def test_went_on_from_a_checkpoint(self) -> None:
        found = self.judge(event("resume", 23), *steps(24, 25, 26))
        assert found.is_good
        assert found.text == (
            "all ranks killed at step 25, went on from step 23, "
            "2 steps done twice agree within 0.0e+00"
        )

    def test_steps_done_twice_differ(self) -> None:
        assert not self.judge(event("resume", 23), *steps(24), *steps(25, off=1e-4)).is_good

    def test_killed_right_after_its_checkpoint(self) -> None:
        found = self.judge(event("resume", 25), *steps(26))
        assert found.is_good
        assert found.text.endswith("no step was done twice")

    def test_lost_steps(self) -> None:
        assert not self.judge(event("resume", 26), *steps(27)).is_good

    def test_began_again(self) -> None:
        assert "no checkpoint was used" in self.judge(event("resume", 0), *steps(1, 2)).text
        assert not self.judge(event("resume", 0), *steps(1, 2)).is_good

    def test_never_went_on(self) -> None:
        assert not self.judge().is_good

    def test_third_life_is_another_matter(self) -> None:
        third = (event("resume", 27), *steps(28, off=1.0))
        assert self.judge(event("resume", 25), *steps(26, 27), *third).is_good


class TestRequeue:
    JOURNAL = (
        told("life", time=0.0), told("stopped", time=10.0), told("leave", time=10.1),
        told("life", time=17.0), told("finished", time=30.0),
    )  # fmt: skip
    METRICS = (event("stop", 30), event("resume", 30), *steps(31))

    def test_came_back(self) -> None:
        found = verdicts.judge_requeue(self.METRICS, self.JOURNAL)
        assert found.is_good
        assert found.text == "warned, saved step 30, was back after 7 s and went on from there"

    def test_did_not_save(self) -> None:
        assert not verdicts.judge_requeue(self.METRICS[1:], self.JOURNAL).is_good

    def test_did_not_come_back(self) -> None:
        assert not verdicts.judge_requeue(self.METRICS[:1], self.JOURNAL).is_good
        assert not verdicts.judge_requeue(self.METRICS, self.JOURNAL[:3]).is_good

    def test_went_on_from_elsewhere(self) -> None:
        metrics = [self.METRICS[0], event("resume", 20), *steps(21)]
        found = verdicts.judge_requeue(metrics, self.JOURNAL)
        assert (found.is_good, found.text) == (
            False, "warned, saved step 30, but went on from step 20",
        )  # fmt: skip


class TestTrouble:
    @pytest.mark.parametrize("name", ["sick", "crash", "hang", "mistake", "loop"])
    def test_is_named(self, name: str) -> None:
        journal = [
            told("life"),
            told(name, "Traceback\nValueError: x\nlaunch: rank 1 of 2 failed\n"),
        ]
        assert verdicts.trouble(journal) == f"{name}: ValueError: x; launch: rank 1 of 2 failed"
        assert verdicts.trouble(journal, allowed=[name]) is None

    def test_none(self) -> None:
        quiet = ("launch", "life", "health", "attempt", "stopped", "leave", "progress", "finished")
        assert verdicts.trouble([told(name) for name in quiet]) is None

    def test_first_bad_finding_fails_the_rung(self, capsys: pytest.CaptureFixture[str]) -> None:
        good, bad = verdicts.Finding("a", "fine"), verdicts.Finding("b", "off", False)
        assert report([good]) is None
        assert report([good, bad, verdicts.Finding("c", "worse", False)]) == "b: off"
        assert "  c           worse\n" in capsys.readouterr().out
