"""A study's file, and the runs that follow from it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_lm.config import load_config
from distributed_lm.errors import ConfigError
from distributed_lm.study.bill import make_bill
from distributed_lm.study.choice import Choice, Tuned, best_rate
from distributed_lm.study.runs import speed_runs, training_run, training_runs, tuning_runs
from distributed_lm.study.schema import Study, load_study
from distributed_lm.study.slurm import write_stages
from launch.graph import load_graph
from tests.support.studies import IN_ITS_TIME, LONG, SHORT, claim, tiny_study, write_study

SHIPPED = sorted(Path("configs/studies").glob("*.yaml"))


@pytest.fixture
def tiny(tmp_path: Path) -> Study:
    return load_study(write_study(tmp_path / "s.yaml", tiny_study(tmp_path, tmp_path / "data")))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_studies_have_matched_runs_and_a_bill(path: Path) -> None:
    study = load_study(path)
    runs = training_runs(study, Choice())
    assert len(runs) == len(study.arms) * len(study.seeds)
    assert {run.config.tokens_per_step for run in runs} == {study.tokens_per_update}
    assert len({run.config.data.block_size for run in runs}) == 1
    assert len({run.config.train.steps for run in runs}) == 1
    assert len({run.run_dir for run in [*runs, *tuning_runs(study), *speed_runs(study)]}) == len(
        [*runs, *tuning_runs(study), *speed_runs(study)]
    )
    assert len(study.tuning.learning_rates if study.tuning else ()) >= 3
    bill = make_bill(study)
    assert {item.name for item in bill} >= {arm.name for arm in study.arms}
    assert all(item.hours > 0 and item.tokens > 0 for item in bill)


def test_paper_study_costs_what_the_papers_tokens_cost() -> None:
    """50,000 updates of 2,097,152 tokens at 8.81 GFLOP per token of the 1.363B model at L = 1024
    (2048: 9.4), on H100s at 400 TFLOP/s: 642 device-hours."""
    bill = {item.name: item for item in make_bill(load_study(SHIPPED[_index("paper_1p3b")]))}
    assert bill["alibi-1024"].tokens == pytest.approx(3 * 104.8576e9)
    assert bill["alibi-1024"].hours / 3 == pytest.approx(642, rel=0.01)


def _index(name: str) -> int:
    return [path.stem for path in SHIPPED].index(name)


def test_arms_differ_in_nothing_else(tiny: Study) -> None:
    choice = Choice(tuned={SHORT: Tuned(0.25, {}, False), LONG: Tuned(0.5, {}, False)})
    short = training_run(tiny, tiny.arm(SHORT), 2, choice).config
    long = training_run(tiny, tiny.arm(LONG), 2, choice).config
    assert (short.optimizer.learning_rate, long.optimizer.learning_rate) == (0.25, 0.5)
    assert (short.batch.global_batch_size, long.batch.global_batch_size) == (32, 16)
    assert short.evaluation.lengths == (16, 32)
    alike = short.model_dump()
    for section, field in (
        ("model", "position"), ("data", "sequence_length"), ("batch", "global_batch_size"),
        ("batch", "micro_batch_size"), ("optimizer", "learning_rate"), ("evaluation", "lengths"),
    ):  # fmt: skip
        alike[section][field] = long.model_dump()[section][field]
    alike["name"] = long.name
    assert alike == long.model_dump()


def test_arm_in_anothers_time_takes_its_twins_rate(tiny: Study) -> None:
    choice = Choice(tuned={LONG: Tuned(0.5, {}, False)}, steps={IN_ITS_TIME: 7})
    config = training_run(tiny, tiny.arm(IN_ITS_TIME), 1, choice).config
    assert config.optimizer.learning_rate == 0.5
    assert config.train.steps == 7


def test_a_run_made_with_other_settings_is_not_taken_for_this_one(tiny: Study) -> None:
    run = training_run(tiny, tiny.arm(SHORT), 1, Choice())
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "config.yaml").write_text(run.config.to_yaml())
    run.write()  # the same: fine
    other = load_config(run.run_dir, ["train.steps=99"])
    (run.run_dir / "config.yaml").write_text(other.to_yaml())
    with pytest.raises(ConfigError, match=r"train\.steps=99, and the study now has 12"):
        run.write()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 1]}, "given twice"),
        ({"seeds": [1, 9]}, "tuning.seed=9 is one of"),
        ({"tokens_per_update": 500}, "not a multiple of 32"),
        ({"tokens_per_microbatch": 48}, "48 is not a multiple of the 32 tokens of sinusoidal-32"),
        ({"arms": [{"name": "a", "position": "alibi", "length": 16}] * 2}, "two are called a"),
        ({"claims": [claim("c", ("nobody", 16), (LONG, 16), within=1.0)]}, "no arm nobody"),
        ({"claims": [claim("c", (LONG, 16), (LONG, 16))]}, "exactly one of"),
        ({"speed": None}, "is not measured; add it to speed.arms"),
        ({"colour": "blue"}, "colour: extra inputs are not permitted"),
        ({"arms": []}, "arms: tuple should have at least 1 item"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = tiny_study(tmp_path, tmp_path / "data", **change)
    with pytest.raises(ConfigError, match=message):
        load_study(write_study(tmp_path / "s.yaml", values))


def test_claim_between_units_is_refused(tmp_path: Path) -> None:
    mixed = claim("c", (SHORT, 16), (LONG, 16), within=0.1)
    mixed["left"] = {"arm": SHORT, "measure": "memory"}
    values = tiny_study(tmp_path, tmp_path / "data", claims=[mixed])
    with pytest.raises(ConfigError, match="memory and loss have different units"):
        load_study(write_study(tmp_path / "s.yaml", values))


def test_overrides(tmp_path: Path) -> None:
    path = write_study(tmp_path / "s.yaml", tiny_study(tmp_path, tmp_path / "data"))
    assert load_study(path, ["seeds=[5]"]).seeds == (5,)
    with pytest.raises(ConfigError, match="top-level field of the study"):
        load_study(path, ["train.steps=5"])


def test_best_rate() -> None:
    tuned = best_rate({1e-3: 2.0, 2e-3: 1.5, 4e-3: float("inf")}, factor=0.5)
    assert tuned.rate == 1e-3
    assert tuned.losses == {"0.001": 2.0, "0.002": 1.5, "0.004": None}
    assert not tuned.at_edge
    assert best_rate({1e-3: 1.0, 2e-3: 1.5}, 1.0).at_edge
    with pytest.raises(ValueError, match="every learning rate diverged"):
        best_rate({1e-3: float("nan")}, 1.0)


def test_choice_survives_its_file(tmp_path: Path) -> None:
    choice = Choice({"a": Tuned(1e-3, {"0.001": None}, True)}, {"b": 5}, {"a/b": 0.9})
    choice.write(tmp_path)
    assert Choice.read(tmp_path) == choice
    assert Choice.read(tmp_path / "none") == Choice()


def test_slurm_stages_are_what_the_launcher_takes(tiny: Study) -> None:
    path = write_stages(tiny)
    graph = load_graph(path)
    assert [(stage.name, stage.after) for stage in graph.stages] == [
        ("tune", ()),
        ("speed", ("tune",)),
        ("choose", ("tune", "speed")),
        ("train", ("choose",)),
        ("evaluate", ("train",)),
        ("report", ("evaluate",)),
    ]
    assert [len(stage.tasks) for stage in graph.stages] == [4, 4, 1, 6, 6, 1]
    # Wherever it is read, it is the same study with the same data.
    again = load_study(tiny.folder / "study.yaml")
    runs = zip(training_runs(tiny, Choice()), training_runs(again, Choice()), strict=True)
    assert all(one.config == other.config for one, other in runs)
    assert yaml.safe_load((tiny.folder / "study.yaml").read_text())["base"].startswith("/")
