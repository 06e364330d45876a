"""``distributed-lm drill``: a real one that passes, and doctored runs that must not."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_lm.checkpoint.plain import PlainCheckpoint
from distributed_lm.config import CheckpointConfig
from distributed_lm.drill import comparison
from distributed_lm.drill.command import (
    DrillError,
    allowed_loss,
    drill,
    judge_kill,
    kill_moments,
    make_plan,
    report,
)
from distributed_lm.drill.comparison import EXACT, OTHER_LAYOUT, Records, Verdict
from distributed_lm.drill.lives import Kill, rehearse
from distributed_lm.errors import ConfigError, TrainingError
from distributed_lm.tracking.metrics_file import parse_records
from tests.support.runs import SMOKE, Runs

SHORT = (
    "model.num_layers=1", "train.steps=40", "checkpoint.save_every=5", "evaluation.lengths=[64]",
    "evaluation.max_tokens=512",
)  # fmt: skip


@pytest.mark.slow
def test_drill_of_two_kills_passes(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*SHORT, f"data.path={demo_data}"]
    drill(Path(SMOKE), overrides, 2, ["parallel.tensor=2"], seed=0, output_dir=tmp_path)
    printed = capsys.readouterr().out
    assert "2 of 2 kills passed" in printed
    assert printed.count("parallel.tensor=2") == 2
    for part in ("loss", "grad_norm", "data ledger", "master weights", "second moments"):
        assert f"passed  {part}: " in printed
    lives = (tmp_path / "smoke-drill" / "metrics.jsonl").read_bytes()
    resumed = [line for line in parse_records(lives) if line.get("event") == "resume"]
    assert len(resumed) == 2


class FakeLife(contextlib.nullcontext["FakeLife"]):
    """A life that goes on from ``first`` and ends before ``stop``, or never comes up."""

    def __init__(self, first: int, stop: int, failure: str = "") -> None:
        super().__init__(self)
        self.first, self.stop, self.failure = first, stop, failure
        self.steps: list[tuple[int, float]] = []

    def reach(self, step: int) -> bool:
        if self.failure:
            raise TrainingError(self.failure)
        last = max(step, self.first)
        self.steps += [(number, 100.0 + number) for number in range(self.first, last + 1)]
        return last < self.stop

    def kill(self, chance: random.Random) -> tuple[tuple[int, ...], float]:
        return (0,), 100.0

    def finish(self) -> None:
        self.reach(self.stop)


def rehearse_fake(*lives: FakeLife) -> list[Kill]:
    start: Any = lives.__getitem__
    return rehearse(start, ["a", "b"], [4.0, 8.0], 0.0, random.Random(0))


def test_lost_steps_and_recovery_are_counted_from_the_next_life() -> None:
    kills = rehearse_fake(FakeLife(1, 10), FakeLife(3, 10), FakeLife(6, 10))
    assert [(kill.step, kill.lost_steps) for kill in kills] == [(4, 2), (8, 3)]
    assert [kill.recovery_seconds for kill in kills] == [3.0, 6.0]


def test_a_run_that_does_not_come_back_fails_its_kill() -> None:
    kills = rehearse_fake(FakeLife(1, 10), FakeLife(3, 10, failure="no checkpoint is whole"))
    assert [kill.problem for kill in kills] == ["no checkpoint is whole", "not reached"]
    assert judge_kill(kills[0], allowed_steps=5) == "no checkpoint is whole"


def test_a_run_that_fails_before_any_kill_ends_the_drill() -> None:
    with pytest.raises(TrainingError, match="out of memory"):
        rehearse_fake(FakeLife(1, 10, failure="out of memory"))


def test_a_kill_that_comes_too_late_does_not_pass() -> None:
    kills = rehearse_fake(FakeLife(1, 10), FakeLife(3, 7))
    assert [judge_kill(kill, allowed_steps=5) for kill in kills] == ["passed", "finished first"]


def make_records() -> Records:
    return {
        step: {"loss": 2.0 / step, "grad_norm": 1.0 / step, "data_digest": f"{step:064x}"}
        for step in range(1, 5)
    }


def failed(verdicts: list[Verdict]) -> list[str]:
    return [verdict.part for verdict in verdicts if not verdict.passed]


def test_equal_records_pass() -> None:
    verdicts = comparison.compare_records(make_records(), make_records(), 4, EXACT)
    assert [verdict.part for verdict in verdicts] == ["loss", "grad_norm", "data ledger"]
    assert not failed(verdicts)


@pytest.mark.parametrize(
    ("field", "part"),
    [("loss", "loss"), ("grad_norm", "grad_norm"), ("data_digest", "data ledger")],
)
def test_a_changed_record_fails_by_name_and_step(field: str, part: str) -> None:
    records = make_records()
    records[3][field] = "f" * 64 if field == "data_digest" else records[3][field] * (1 + 1e-15)
    verdicts = comparison.compare_records(make_records(), records, 4, EXACT)
    assert failed(verdicts) == [part]
    assert any("step 3" in verdict.finding for verdict in verdicts)


def test_rounding_passes_only_where_the_layout_changed() -> None:
    records = make_records()
    records[2]["loss"] *= 1 + 4e-6
    assert not failed(comparison.compare_records(make_records(), records, 4, OTHER_LAYOUT["fp32"]))
    records[2]["loss"] *= 1 + 4e-6
    found = comparison.compare_records(make_records(), records, 4, OTHER_LAYOUT["fp32"])
    assert failed(found) == ["loss"]


def test_a_missing_step_and_a_number_that_is_none_fail() -> None:
    records = make_records()
    records[4]["grad_norm"] = None
    found = comparison.compare_records(make_records(), records, 4, OTHER_LAYOUT["bf16"])
    assert failed(found) == ["grad_norm"]
    del records[2]
    found = comparison.compare_records(make_records(), records, 4, EXACT)
    assert found == [Verdict("steps", False, "step 2 is not on record in both runs")]


class Doctored(PlainCheckpoint):
    """A checkpoint in memory."""

    def __init__(self) -> None:
        kinds = ("model", "optimizer.master", "optimizer.exp_avg", "optimizer.exp_avg_sq")
        names = [f"{kind}.weight" for kind in kinds] + ["random.data0.pipeline0.tensor0.default"]
        self.tensors = {name: torch.arange(1.0, 7.0).view(2, 3) for name in names}
        self._tensors = dict.fromkeys(names)  # type: ignore[assignment]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.weight", "weights"),
        ("optimizer.master.weight", "master weights"),
        ("optimizer.exp_avg.weight", "first moments"),
        ("optimizer.exp_avg_sq.weight", "second moments"),
        ("random.data0.pipeline0.tensor0.default", "random states"),
    ],
)
def test_a_changed_tensor_fails_by_name(name: str, part: str) -> None:
    drilled = Doctored()
    assert not failed(comparison.compare_states(Doctored(), drilled, EXACT))
    drilled.tensors[name] = drilled.tensors[name].clone()
    drilled.tensors[name][1, 2] *= 1 + 1e-6
    verdicts = comparison.compare_states(Doctored(), drilled, EXACT)
    assert failed(verdicts) == [part]
    assert any(name in verdict.finding for verdict in verdicts)


def test_a_lost_or_misshapen_tensor_fails_under_any_tolerance() -> None:
    drilled = Doctored()
    drilled.tensors["optimizer.exp_avg.weight"] = torch.ones(3, 2)
    del drilled._tensors["optimizer.master.weight"]
    found = comparison.compare_states(Doctored(), drilled, OTHER_LAYOUT["bf16"])
    assert failed(found) == ["master weights", "first moments"]


def test_plain_reading_puts_split_tensors_together(demo_data: Path, tmp_path: Path) -> None:
    """fp32: weights and master weights are the same numbers, also read from a file of two ranks."""
    runs = Runs(demo_data, tmp_path)
    runs.train("two", *SHORT, "train.steps=1", "parallel.tensor=2", world_size=2)
    checkpoint = PlainCheckpoint(tmp_path / "two" / "checkpoints" / "step_00000001")
    names = [name for name in checkpoint if name.startswith("model.")]
    assert len(names) > 10
    for name in names:
        master = checkpoint.read(name.replace("model.", "optimizer.master.", 1))
        assert torch.equal(checkpoint.read(name), master)
        assert master.abs().sum() > 0 or "bias" in name


def test_report_names_what_did_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    kills = [
        Kill("", ranks=(0,), killed_at=1.0, step=7, lost_steps=2, recovery_seconds=9.5),
        Kill("", ranks=(1,), killed_at=2.0, step=17, lost_steps=7, recovery_seconds=9.5),
        Kill("parallel.tensor=2"),
    ]
    verdicts = [Verdict("loss", True, "equal"), Verdict("first moments", False, "differ")]
    with pytest.raises(DrillError) as caught:
        report(Console(width=150), kills, verdicts, allowed_steps=5)
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "the drill did not pass: kill 2: lost more than 5 steps, "
        "kill 3: finished first, first moments"
    )
    printed = capsys.readouterr().out
    assert "1 of 3 kills passed" in printed
    assert "FAILED  first moments: differ" in printed


def test_a_save_under_way_may_cost_one_interval_more() -> None:
    assert allowed_loss(CheckpointConfig(save_every=5, asynchronous=False)) == 5
    assert allowed_loss(CheckpointConfig(save_every=5, asynchronous=True)) == 10


def test_kills_are_spread_over_the_run_and_follow_from_the_seed() -> None:
    moments = kill_moments(41, 4, random.Random(3))
    assert [int((moment - 1) // 10) for moment in moments] == [0, 1, 2, 3]
    assert moments == kill_moments(41, 4, random.Random(3))
    assert moments != kill_moments(41, 4, random.Random(4))


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        (["checkpoint.save_every=0"], "", "checkpoint.save_every=0 saves only at the end"),
        (["train.steps=9"], "", "train.steps=9 is too short for --kills 5; set train.steps=10"),
        (["precision=fp16"], "", "precision=fp16 cannot be drilled"),
        ([], "parallel.tensor=3", "parallel.tensor=3"),
    ],
)
def test_what_leaves_no_room_is_refused(
    overrides: list[str], layout: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(Path(SMOKE), overrides, 5, [layout], tmp_path)


def test_an_earlier_drill_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "smoke-drill").mkdir()
    with pytest.raises(ConfigError, match="smoke-drill is already there; remove it, or choose"):
        make_plan(Path(SMOKE), [], 5, [], tmp_path)


def test_only_a_changed_layout_loosens_the_comparison(tmp_path: Path) -> None:
    assert make_plan(Path(SMOKE), [], 2, [], tmp_path).tolerance == EXACT
    plan = make_plan(Path(SMOKE), [], 3, ["parallel.tensor=2", "parallel.pipeline=2"], tmp_path)
    assert plan.layouts == ("parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=2")
    assert plan.tolerance == OTHER_LAYOUT["fp32"]


def test_torn_lines_are_left_out() -> None:
    whole = json.dumps({"kind": "train", "step": 1}).encode()
    assert parse_records(whole + b'\n{"kind": "tr') == [{"kind": "train", "step": 1}]
