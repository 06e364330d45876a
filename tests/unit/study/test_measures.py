"""Curves, halting and break-even, and claims, on numbers that can be worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_lm.evaluation.results import Result, write_result
from distributed_lm.study.choice import Choice
from distributed_lm.study.claims import Verdict, judge_claims
from distributed_lm.study.measures import Measures, TrainingCurve, time_ratio
from distributed_lm.study.report.content import study_content
from distributed_lm.study.report.writer import write_report
from distributed_lm.study.runs import speed_run, training_run
from distributed_lm.study.schema import Study, load_study
from tests.support.studies import IN_ITS_TIME, LONG, SHORT, claim, tiny_study, write_study

STEPS = 12


def write_metrics(run_dir: Path, records: list[dict[str, Any]]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"time": 0.0, **record}) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(lines)


def train(step: int, seconds: float = 1.0, digest: str = "d") -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "loss": 3.0, "step_seconds": seconds,
        "data_digest": f"{digest}{step}", "peak_memory_bytes": 1000,
    }  # fmt: skip


def validation(step: int, length: int, loss: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "length": length, "loss": loss}


class TestTrainingCurve:
    def test_steps_done_again_count_once(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [train(2, 1.0), train(4, 1.0), train(4, 3.0), train(6, 1.0)])
        curve = TrainingCurve.read(tmp_path)
        assert curve.steps == [2, 4, 6]
        # A line stands for all steps since the one before.
        assert curve.seconds == [2.0, 8.0, 10.0]

    def test_halted_between_validations(self, tmp_path: Path) -> None:
        write_metrics(tmp_path, [validation(4, 32, 5.0), validation(8, 32, 3.0)])
        curve = TrainingCurve.read(tmp_path)
        assert curve.halted_loss(32, 7) == pytest.approx(3.5)
        assert curve.halted_loss(32, 3) is None
        assert curve.halted_loss(16, 7) is None

    def test_first_step_below(self, tmp_path: Path) -> None:
        losses = [validation(4, 32, 5.0), validation(8, 32, 3.0), validation(12, 32, 2.0)]
        write_metrics(tmp_path, losses)
        curve = TrainingCurve.read(tmp_path)
        assert curve.first_step_below(32, 2.5) == pytest.approx(10.0)
        assert curve.first_step_below(32, 1.0) is None


def score(run_dir: Path, length: int, nats: list[float], step: int = STEPS, **more: Any) -> None:
    """A result over documents of 100 tokens each."""
    sums, tokens = np.array(nats), np.full(len(nats), 100.0)
    loss = float(sums.sum() / tokens.sum())
    result = Result(
        run=run_dir.name, step=step, checkpoint="c", position="alibi", trained_length=16,
        precision="fp32", split="valid", corpus_hash="h", data_digest="d" * 16, tokenizer="t",
        protocol="nonoverlapping", stride=length, length=length, targets="all",
        tokens_scored=int(tokens.sum()), nats=float(sums.sum()), loss=loss,
        perplexity=math.exp(loss),
        by_position={"edges": [0, 8, length], "nats": [1.0, 2.0], "tokens": [1.0, 1.0]}, **more,
    )  # fmt: skip
    write_result(run_dir, result, (sums, tokens))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Made-up runs of three seeds: the short arm is 0.1 ± 0.01 nats better at 32."""
    claims = [
        claim("better by more than 0.05", (SHORT, 32), (LONG, 32), less_than=-0.05),
        claim("worse by more than 1", (SHORT, 32), (LONG, 32), greater_than=1.0),
        claim("the same to 0.05", (SHORT, 32), (LONG, 32), within=0.05),
        claim("better by more than 0.1", (SHORT, 32), (LONG, 32), less_than=-0.1),
        claim("never scored", (SHORT, 64), (LONG, 32), less_than=0.0),
    ]
    values = tiny_study(tmp_path, tmp_path / "data", seeds=[1, 2, 3], claims=claims)
    study = load_study(write_study(tmp_path / "s.yaml", values))
    choice = Choice(steps={IN_ITS_TIME: 6}, time_ratios={f"{SHORT}/{LONG}": 0.5})
    choice.write(study.folder)
    for seed, change in zip(study.seeds, (-0.01, 0.0, 0.01), strict=True):
        # Documents differ much more than the arms do, and alike in both: the pairing takes it out.
        documents = np.array([200.0, 300.0, 400.0, 300.0])
        for arm, losses in ((SHORT, documents - 10 + 100 * change), (LONG, documents)):
            run = training_run(study, study.arm(arm), seed, choice)
            write_metrics(
                run.run_dir,
                [
                    train(STEPS), validation(4, 32, 5.0), validation(8, 32, 2.8),
                    validation(STEPS, 32, 2.7),
                ],
            )  # fmt: skip
            score(run.run_dir, 32, list(losses))
            score(run.run_dir, 16, [float("inf")] * 4 if arm == LONG else list(losses))
    for arm, seconds in ((SHORT, 1.0), (LONG, 2.0)):
        for turn in range(2):
            run = speed_run(study, study.arm(arm), "fused", turn)
            # Compilation is not the speed.
            slow = [train(step, 100.0) for step in (1, 2, 3)]
            write_metrics(run.run_dir, [*slow, *(train(step, seconds) for step in range(4, 8))])
    return study


def verdicts(study: Study) -> dict[str, Verdict]:
    return {verdict.claim.name: verdict for verdict in judge_claims(study, Measures(study))}


def test_claims_are_judged(study: Study) -> None:
    found = verdicts(study)
    assert {name: verdict.state for name, verdict in found.items()} == {
        "better by more than 0.05": "holds",
        "worse by more than 1": "does not hold",
        "the same to 0.05": "does not hold",
        "better by more than 0.1": "cannot tell",
        "never scored": "cannot tell",
    }
    assert found["never scored"].reason == f"not there: loss of {SHORT} at 64"
    estimate = found["better by more than 0.05"].estimate
    assert estimate is not None
    assert estimate.mean == pytest.approx(-0.1)
    # The seeds' spread alone: every document changes alike.
    assert estimate.standard_error == pytest.approx(0.01 / math.sqrt(3))


def test_documents_are_in_the_interval(study: Study) -> None:
    for seed in study.seeds:
        run = training_run(study, study.arm(SHORT), seed, Choice.read(study.folder))
        score(run.run_dir, 32, [100.0, 390.0, 350.0, 320.0])
    verdict = verdicts(study)["better by more than 0.05"]
    assert verdict.state == "cannot tell"
    assert verdict.estimate is not None
    assert verdict.estimate.standard_error > 0.2


def test_a_missing_pair_leaves_a_claim_open(study: Study) -> None:
    run = training_run(study, study.arm(SHORT), 3, Choice.read(study.folder))
    for path in (run.run_dir / "evaluation").iterdir():
        path.unlink()
    verdict = verdicts(study)["better by more than 0.05"]
    assert verdict.state == "cannot tell"
    assert verdict.reason == "1 of 3 pairs are missing"


def test_time_ratio_and_halting(study: Study) -> None:
    measures = Measures(study)
    assert time_ratio(measures, SHORT, LONG) == pytest.approx(0.5)
    assert measures.halted_step(LONG, SHORT) == 6.0
    # Half of 12 steps: on the line from (4, 5.0) to (8, 2.8).
    halted = measures.curve(LONG, 1).halted_loss(32, 6.0)
    assert halted == pytest.approx(3.9)
    # The short arm's 2.9 is reached between 4 and 8, at step 8 − 4 · 0.1/2.2.
    tie = measures.break_even(SHORT, study.arm(LONG), 2)
    assert tie == pytest.approx(12 / (8 - 4 * 0.1 / 2.2))


def test_infinite_losses_do_not_stop_a_report(study: Study, tmp_path: Path) -> None:
    content = study_content(study)
    media = write_report(content, Measures(study), tmp_path / "report")
    assert {name for name in media if name.startswith("plots/")} == {
        "plots/extrapolation", "plots/by_position", "plots/training",
    }  # fmt: skip
    assert {"tables/claims", "tables/extrapolation", "report"} <= set(media)
    assert all(path.stat().st_size > 500 for path in media.values())
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| worse by more than 1 | difference > 1 | 8.92 against 8.83 |" in text
    assert "✗ does not hold" in text
    assert "the same in all arms of a seed" in text


def test_ledgers_that_differ_are_shouted(study: Study) -> None:
    run = training_run(study, study.arm(SHORT), 2, Choice.read(study.folder))
    write_metrics(run.run_dir, [train(STEPS, digest="other")])
    assert f"DIFFERENT: {SHORT} and {LONG} with seed 2" in str(study_content(study).setup)
