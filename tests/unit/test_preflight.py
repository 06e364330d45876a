"""What is wrong is said before the engines start, in one sentence, and nothing on disk changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distributed_lm.config import RunConfig, load_config
from distributed_lm.errors import UserError
from distributed_lm.preflight import differences, preflight
from distributed_lm.prepare_data import prepare_data

SMOKE = "configs/runs/smoke.yaml"
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make(demo_data: Path, tmp_path: Path) -> MakeConfig:
    def config(*overrides: str) -> RunConfig:
        fixed = [f"data.path={demo_data}", f"output_dir={tmp_path / 'runs'}"]
        return load_config(SMOKE, [*fixed, *overrides])

    return config


def message_of(config: RunConfig, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        preflight(config, world_size)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_good_config_passes_and_leaves_no_trace(make: MakeConfig, tmp_path: Path) -> None:
    found = preflight(make(), 1)
    assert found.vocab_size == 320
    assert len(found.stream) == 16384 + 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["batch.global_batch_size=9"], 1, "batch.global_batch_size=9 is not a multiple"),
        (["parallel.tensor=2"], 3, "3 processes are not a multiple of parallel.tensor=2"),
        (["data.path=/nowhere"], 1, "/nowhere: no such data set"),
        (["model.vocab_size=100"], 1, "model.vocab_size=100 is smaller than the 257"),
        (
            ["model.vocab_size=null", "model.num_attention_heads=6", "model.hidden_size=66",
             "model.ffn_hidden_size=96", "parallel.tensor=3"],
            3,
            "model.vocab_size=320 (padded) cannot be divided over parallel.tensor=3; "
            "set model.vocab_size=321",
        ),
        (["precision=fp16"], 1, "precision=fp16 needs a GPU"),
        (["evaluation.lengths=[64,20000]"], 1, "20000 is longer than the 16384 tokens to score"),
        (["model.max_positions=128"], 1, "256 is longer than model.max_positions=128"),
        (
            ["parallel.tensor=2", "parallel.sequence=true", "evaluation.lengths=[65]"],
            2,
            "65 cannot be divided over parallel.tensor=2",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    make: MakeConfig, overrides: list[str], world_size: int, expected: str
) -> None:
    assert expected in message_of(make(*overrides), world_size)


def test_output_dir_that_is_a_file_is_named(make: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in message_of(make(f"output_dir={tmp_path / 'file' / 'runs'}"))


def test_empty_evaluation_split_and_other_tokenizer_are_named(
    make: MakeConfig, demo_data: Path, speeches_folder: Path, tmp_path: Path
) -> None:
    speeches = [str(path) for path in sorted(speeches_folder.glob("*.txt"))[:12]]
    words = tmp_path / "words"
    prepare_data(words, speeches, tokenizer="bpe:300", split="1,0,0")
    assert "holds no text" in message_of(make(f"data.path={words}"))
    blend = f"data.path=[{{path: {demo_data}}}, {{path: {words}}}]"
    assert "prepare both with the same --tokenizer" in message_of(make(blend))


def save_state(config: RunConfig, **changes: str) -> None:
    """The part of a checkpoint that says which run it is of."""
    identity = {**preflight(config, 1).data_identity, **changes}
    folder = config.run_dir / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    state = {"format_version": 1, "config": config.model_dump(mode="json"), "data": identity}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=99", "seed=99, but"),
        ("model.num_layers=5", "holds a run with model.num_layers=4"),
        ("batch.global_batch_size=16", "batch.global_batch_size=16, but"),
        ("data.sequence_length=32", "data.sequence_length=32, but"),
        ("checkpoint.resume=false", "already holds a run at step 10 and checkpoint.resume=false"),
    ],
)
def test_another_run_in_the_folder_is_refused(
    make: MakeConfig, override: str, expected: str
) -> None:
    save_state(make())
    assert expected in message_of(make(override))


def test_what_may_change_between_starts_does(make: MakeConfig) -> None:
    save_state(make())
    changed = make(
        "train.steps=99", "optimizer.learning_rate=1e-4", "zero.stage=2", "precision=bf16"
    )
    assert preflight(changed, 1).vocab_size == 320


def test_other_data_under_the_same_path_is_refused(make: MakeConfig) -> None:
    save_state(make(), corpus_hash="0" * 64)
    message = message_of(make())
    assert "corpus_hash" in message
    assert "was trained with 000000000000" in message


def test_moved_data_is_the_same_data(make: MakeConfig, demo_data: Path, tmp_path: Path) -> None:
    save_state(make())
    moved = tmp_path / "moved"
    shutil.copytree(demo_data, moved, ignore=shutil.ignore_patterns("index_cache"))
    np.testing.assert_array_equal(
        preflight(make(f"data.path={moved}"), 1).stream, preflight(make(), 1).stream
    )


def test_differences_names_nested_fields() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}, "e": None}
    new = {"a": 1, "b": {"c": 4, "d": 3}, "e": {"f": 5}}
    assert differences(old, new) == {"b.c": (2, 4), "e": (None, {"f": 5})}
