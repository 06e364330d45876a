"""Whole runs through the ``train`` and ``evaluate`` commands, on the text of the demo."""

import json
from pathlib import Path

import numpy as np
import pytest

from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError, TrainingError
from distributed_lm.prepare_data import prepare_data
from tests.support.ranks import run_distributed
from tests.support.runs import Runs, losses, train_run

GOLDEN = Path("tests/golden/smoke_losses.json")
# Every figure DESIGN promises of a train line.
TRAIN_FIELDS = {
    "kind", "time", "step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second",
    "tokens_per_second_per_device", "mfu", "mfu_causal", "peak_memory_bytes", "step_seconds",
    "data_digest",
}  # fmt: skip


def evaluate_run(run_dir: Path, lengths: tuple[int, ...], overrides: list[str]) -> None:
    from distributed_lm.evaluate import evaluate

    evaluate(run_dir, lengths, None, overrides)


def failing_run(config: RunConfig) -> str:
    with pytest.raises((TrainingError, ConfigError)) as caught:
        train_run(config)
    return str(caught.value)


@pytest.fixture
def runs(demo_data: Path, tmp_path: Path) -> Runs:
    return Runs(demo_data, tmp_path)


def test_smoke_run_records_what_design_promises(runs: Runs) -> None:
    records = runs.train("recorded")
    assert set(records["train"][0]) == TRAIN_FIELDS
    assert [line["length"] for line in records["evaluation"]] == [64, 128, 256]
    assert {line["tokens_scored"] for line in records["evaluation"]} == {16384}


def test_pipeline_run_reports_on_rank_0_and_equals_one_process(runs: Runs) -> None:
    overrides = (
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "train.steps=8",
        "schedule.total_steps=20",
    )
    records = runs.train("grid", *overrides, world_size=4)
    golden = json.loads(GOLDEN.read_text())
    np.testing.assert_allclose(losses(records), golden["losses"][:8], rtol=2e-4)
    assert "tensor=2 pipeline=2" in records["event"][0]["message"]
    for length, line in zip((64, 128, 256), records["evaluation"], strict=True):
        assert line["length"] == length
    trained = {line["length"]: line["loss"] for line in records["evaluation"]}
    run_dir = runs.config("grid").run_dir
    run_distributed(evaluate_run, 1, run_dir, (64, 256), [])  # the whole model on one process
    run_distributed(evaluate_run, 2, run_dir, (128,), [])  # two data-parallel copies
    for length in (64, 128, 256):
        [path] = (run_dir / "evaluation").glob(f"*_nonoverlapping_{length}.json")
        assert json.loads(path.read_text())["loss"] == pytest.approx(trained[length], rel=1e-6)


def test_resume_is_the_uninterrupted_run_and_steps_can_be_raised(runs: Runs) -> None:
    short = ("train.steps=6", "schedule.total_steps=12", "checkpoint.save_every=3")
    whole = runs.train("whole", *short, "train.steps=12")
    runs.train("parts", *short)
    parts = runs.train("parts", *short, "train.steps=12")
    before = len(parts["event"])
    assert len(runs.train("parts", *short, "train.steps=12")["event"]) == before  # finished
    assert losses(parts) == losses(whole)
    assert parts["train"][-1]["data_digest"] == whole["train"][-1]["data_digest"]
    assert [line["step"] for line in parts["train"]] == list(range(1, 13))


def test_half_length_sequences_see_the_same_tokens_in_each_update(runs: Runs) -> None:
    common = ("train.steps=4", "data.block_length=128", "evaluation.lengths=[64]")
    long = runs.train("long", *common, "data.sequence_length=128", "batch.global_batch_size=8")
    short = runs.train("short", *common, "data.sequence_length=64", "batch.global_batch_size=16")
    assert [line["data_digest"] for line in long["train"]] == [
        line["data_digest"] for line in short["train"]
    ]
    assert losses(long) != losses(short)


@pytest.fixture(scope="module")
def noisy_data(tmp_path_factory: pytest.TempPathFactory, speeches_folder: Path) -> Path:
    """Speeches with a document of random letters among them, one block in thirteen."""
    folder = tmp_path_factory.mktemp("noisy")
    text = "".join(path.read_text() for path in sorted(speeches_folder.glob("*.txt"))[:20])
    letters = np.random.default_rng(0).integers(33, 127, 12_000, dtype=np.uint8).tobytes()
    (folder / "speech.txt").write_text(text[:150_000])
    (folder / "noise.txt").write_text(letters.decode("ascii"))
    output = folder / "data"
    # Seed 3 deals both documents to the training split.
    prepare_data(output, [str(folder / "*.txt")], tokenizer="bytes", split="1,0,0", seed=3)
    return output


# One block is one step, so a step's text is all speech or mostly noise.
SPIKES = (
    "data.block_length=512", "train.spike.window=6", "train.spike.threshold=0.5",
    "train.steps=40", "checkpoint.save_every=4", "evaluation.split=train",
    "evaluation.max_tokens=1024",
)  # fmt: skip


def test_spikes_are_logged_skipped_or_rewound_as_configured(runs: Runs, noisy_data: Path) -> None:
    runs.fixed[0] = f"data.path={noisy_data}"
    records = {
        action: runs.train(action, *SPIKES, f"train.spike.action={action}")
        for action in ("log", "skip", "rewind")
    }
    messages = {
        action: [
            line["message"] for line in record["event"] if line["event"] in ("spike", "rewind")
        ]
        for action, record in records.items()
    }
    assert all("update kept" in message for message in messages["log"])
    assert all("update left out" in message for message in messages["skip"])
    assert all("back to step" in message for message in messages["rewind"])
    assert all(messages.values())
    # The same first spike; from the step after it on, the left-out update shows.
    first = next(line["step"] for line in records["skip"]["event"] if line["event"] == "spike")
    assert losses(records["skip"])[:first] == losses(records["log"])[:first]
    assert losses(records["skip"])[first] != losses(records["log"])[first]
    # A rewound run consumed the steps that stand and the batches that do not.
    assert records["rewind"]["train"][-1]["step"] == 40
    state = runs.config("rewind").run_dir / "checkpoints" / "step_00000040" / "state.json"
    assert json.loads(state.read_text())["data_position"] >= 40 + len(messages["rewind"])


def test_non_finite_loss_stops_before_the_update_by_name(runs: Runs) -> None:
    config = runs.config("nan", "optimizer.learning_rate=1e30", "checkpoint.save_every=1")
    [message, _] = run_distributed(failing_run, 2, config)
    assert "non-finite values at step 2" in message
    assert "on ranks 0 (data-parallel 0), 1 (data-parallel 1)" in message
    assert "blocks [(0, 0, " in message
    events = [line["event"] for line in runs.records(config)["event"]]
    assert "non_finite" in events
    assert (config.run_dir / "checkpoints" / "step_00000001").is_dir()


def test_profile_switch_writes_a_trace_of_the_chosen_steps(runs: Runs) -> None:
    runs.train("profile", "train.steps=4", "train.profile.start_step=2", "train.profile.steps=1")
    trace = runs.config("profile").run_dir / "logs" / "profile_rank_0.json"
    assert "traceEvents" in json.loads(trace.read_text())


def test_existing_run_is_not_started_over_with_resume_off(runs: Runs) -> None:
    runs.train("once", "train.steps=1")
    config = runs.config("once", "train.steps=1", "checkpoint.resume=false")
    [message] = run_distributed(failing_run, 1, config)
    assert "already holds a run at step 1" in message
    assert "checkpoint.resume=false" in message
