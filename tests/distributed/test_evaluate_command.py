"""The ``evaluate`` command on a real checkpoint: what it writes, skips, resumes and leaves out."""

import math
from pathlib import Path
from typing import Any

import pytest

from distributed_lm.errors import ConfigError
from distributed_lm.evaluation.results import Result, read_results
from tests.support.ranks import run_distributed
from tests.support.runs import Runs

SMALL = (
    "model.num_layers=1", "train.steps=2", "evaluation.lengths=[64]", "evaluation.max_tokens=3000",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = Runs(demo_data, tmp_path_factory.mktemp("runs"))
    runs.train("trained", *SMALL)
    return runs.config("trained", *SMALL).run_dir


def evaluate_counting(
    path: Path, lengths: tuple[int, ...], overrides: list[str], stop_after: int, options: Any
) -> tuple[list[int], str]:
    """Runs ``evaluate``; the lengths it scored, and a message if it ended early.

    Args:
        stop_after: lengths to score before it is interrupted; 0 = do not.
    """
    from distributed_lm import evaluate as command

    measure, scored = command.measure, []

    def counted(plan: Any, *arguments: Any) -> Any:
        if stop_after and len(scored) == stop_after:
            raise KeyboardInterrupt("stopped")
        scored.append(plan.length)
        return measure(plan, *arguments)

    command.measure = counted
    try:
        command.evaluate(path, lengths, None, overrides, **options)
    except (KeyboardInterrupt, ConfigError) as error:
        return scored, str(error)
    return scored, ""


def run(
    path: Path, lengths: tuple[int, ...], *overrides: str, stop_after: int = 0, **options: Any
) -> tuple[list[int], str]:
    [answer] = run_distributed(
        evaluate_counting, 1, path, lengths, list(overrides), stop_after, options
    )
    return answer


def by_length(run_dir: Path, protocol: str = "nonoverlapping") -> dict[int, Result]:
    return {r.length: r for r in read_results(run_dir) if r.protocol == protocol}


def test_an_interrupted_evaluation_goes_on_where_it_was(trained: Path) -> None:
    at_end_of_training = by_length(trained)[64]
    assert at_end_of_training.checkpoint is None
    assert run(trained, (64, 128, 256), stop_after=2) == ([64, 128], "stopped")
    assert sorted(by_length(trained)) == [64, 128]
    checkpoint = trained / "checkpoints" / "step_00000002"
    assert run(checkpoint, (64, 128, 256, 256)) == ([256], "")
    results = by_length(trained)
    assert sorted(results) == [64, 128, 256]
    assert results[64].loss == pytest.approx(at_end_of_training.loss, rel=1e-6)
    assert {r.checkpoint for r in results.values()} == {results[64].checkpoint} != {None}
    assert run(trained, (64, 128, 256)) == ([], "")
    assert run(trained, (128,), force=True) == ([128], "")
    # Other tokens are another measurement.
    assert run(trained, (128,), "evaluation.max_tokens=1000") == ([128], "")
    for result in results.values():
        nats, tokens = result.document_sums()
        assert nats.sum() == pytest.approx(result.nats, rel=1e-12)
        assert tokens.sum() == result.tokens_scored == 3000
        assert sum(result.by_position["nats"]) == pytest.approx(result.nats, rel=1e-12)
        assert result.bytes is not None
        assert 2990 <= result.bytes <= 3000  # a byte a token, and some ends of documents
        assert result.words is not None
        assert result.bits_per_byte == pytest.approx(result.nats / result.bytes / math.log(2))
        assert result.word_perplexity == pytest.approx(math.exp(result.nats / result.words))


def test_a_length_that_the_model_cannot_do_is_a_gap_among_the_others(trained: Path) -> None:
    limited = "model.max_positions=100"
    options = {"protocol": "sliding", "stride": 64}
    assert run(trained, (128, 64, 200), limited, **options) == ([64], "")
    results = by_length(trained, "sliding")
    assert results[64].gap is None
    for length in (128, 200):
        assert "model.max_positions=100" in str(results[length].gap)
        assert math.isnan(results[length].loss)
    # A stride as long as the window is the nonoverlapping protocol.
    run(trained, (64,))
    assert results[64].nats == pytest.approx(by_length(trained)[64].nats, rel=1e-12)


def test_context_is_scored_on_the_same_targets_and_decomposed(trained: Path) -> None:
    overrides = ["evaluation.sample_tokens=40"]
    assert run(trained, (64, 128), *overrides, protocol="context")[0] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
    ]
    results = by_length(trained, "context")
    assert {r.tokens_scored for r in results.values()} == {40}
    assert {r.targets for r in results.values()} == {"sample_40_seed_0_from_128"}
    # Stride 1 gives those of its targets that have enough before them the same context.
    run(trained, (128,), *overrides, protocol="sliding", stride=1)
    [sliding] = [r for r in read_results(trained) if r.targets == "sample_40_seed_0_from_1"]
    assert sliding.tokens_scored == 40
    assert sliding.words is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "strided"}, "--protocol strided: expected one of nonoverlapping, sliding"),
        ({"protocol": "sliding"}, "--protocol sliding: needs --stride"),
        ({"protocol": "sliding", "stride": 65}, "--stride 65 is longer than the length 64"),
        ({"stride": 8}, "--stride 8: --protocol nonoverlapping has none"),
        ({"longer_than": 8}, "--longer-than 8: chooses documents"),
        ({"protocol": "documents", "longer_than": 9999}, "no document in the valid split is"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(trained: Path, options: dict, message: str) -> None:
    scored, said = run(trained, (64,), **options)
    assert scored == []
    assert message in said
    assert "\n" not in said
