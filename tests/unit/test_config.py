"""Every config we ship loads, and every wrong one gets its sentence."""

from pathlib import Path

import pytest

from distributed_lm.config import RunConfig, load_config, longest_input
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "runs" / "smoke.yaml"
RUNS = sorted((ROOT / "configs" / "runs").glob("*.yaml"))

# Overrides of smoke.yaml (4 layers, 4 heads, L=64, batch 8 by 2) and all that the message must say:
# the fields, both numbers, the remedy.
BAD_VALUES = [
    (["parallel.tensor=3"], ["num_attention_heads=4", "parallel.tensor=3", "divisor of 4"]),
    (
        ["parallel.tensor=4", "model.num_key_value_heads=2"],
        ["num_key_value_heads=2", "parallel.tensor=4", "divisor of 2"],
    ),
    (
        ["parallel.tensor=2", "model.vocab_size=257"],
        ["vocab_size=257", "parallel.tensor=2", "divisor of 257"],
    ),
    (
        ["parallel.tensor=2", "model.ffn_hidden_size=129"],
        ["ffn_hidden_size=129", "parallel.tensor=2", "divisor of 129"],
    ),
    (
        ["model.hidden_size=66"],
        ["hidden_size=66", "num_attention_heads=4", "choose a head count"],
    ),
    (
        ["model.num_key_value_heads=3"],
        ["num_attention_heads=4", "num_key_value_heads=3", "divisor of 4"],
    ),
    (["parallel.pipeline=5"], ["num_layers=4", "5 stages", "at most 4"]),
    (
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2"],
        ["num_layers=4", "8 stages", "at most 4"],
    ),
    (
        ["parallel.virtual_pipeline=2"],
        ["virtual_pipeline=2", "parallel.pipeline > 1", "found 1", "virtual_pipeline=1"],
    ),
    (
        ["parallel.sequence=true"],
        ["parallel.sequence=true", "parallel.tensor=1", "sequence=false"],
    ),
    (
        ["parallel.sequence=true", "parallel.tensor=2", "data.sequence_length=63"],
        ["sequence_length=63", "parallel.tensor=2", "multiple of 2"],
    ),
    (
        ["zero.stage=2", "parallel.pipeline=2"],
        ["zero.stage=2", "parallel.pipeline=2", "set zero.stage=1"],
    ),
    (
        ["zero.stage=3", "parallel.pipeline=2"],
        ["zero.stage=3", "parallel.pipeline=2", "set zero.stage=1"],
    ),
    (["zero.stage=0", "precision=bf16"], ["zero.stage=0", "precision=bf16", "zero.stage=1"]),
    (
        ["precision=fp16", "parallel.pipeline=2"],
        ["precision=fp16", "parallel.pipeline=2", "precision=bf16"],
    ),
    (
        ["model.max_positions=32"],
        ["sequence_length=64", "max_positions=32", "raise model.max_positions"],
    ),
    (
        ["model.position=learned", "model.max_positions=32"],
        ["sequence_length=64", "max_positions=32", "raise model.max_positions"],
    ),
    (["data.block_length=100"], ["block_length=100", "sequence_length=64", "use 128"]),
    (
        ["data.block_length=128", "batch.global_batch_size=3"],
        ["global_batch_size=3", "block_length=128", "multiple of 2"],
    ),
    (["trian.steps=3"], ["trian", "no such field", "spelling"]),
    (["model.heads=3"], ["model.heads", "no such field"]),
    (["model.num_layers=four"], ["model.num_layers=four", "integer"]),
    (["train.steps=-1"], ["train.steps=-1", "greater than or equal to 1"]),
    (["zero.stage=4"], ["zero.stage=4", "less than or equal to 3"]),
    (["optimizer.learning_rate=null"], ["optimizer.learning_rate=None"]),
    (["model.activation=tanh"], ["model.activation=tanh", "'relu'", "'swiglu'"]),
    (["name=a b"], ["name=a b"]),
    (["name=../elsewhere"], ["name=../elsewhere"]),
    (["train.steps"], ["'train.steps'", "expected section.field=value"]),
    (["=3"], ["'=3'", "expected section.field=value"]),
]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_config_loads(path: Path) -> None:
    assert isinstance(load_config(path), RunConfig)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_resolved_config_loads_to_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["tracking.wandb=offline"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    ("overrides", "expected"), BAD_VALUES, ids=[" ".join(bad[0]) for bad in BAD_VALUES]
)
def test_bad_value_gets_one_sentence(overrides: list[str], expected: list[str]) -> None:
    message = message_of(SMOKE, overrides)
    assert [part for part in expected if part not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["parallel.tensor=2"], 3, ["3 processes", "parallel.tensor=2", "= 2", "start 2"]),
        ([], 8, ["global_batch_size=8", "micro_batch_size=2", "8 data-parallel ranks", "use 16"]),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.global_batch_size=6"],
            2,
            ["parallel.pipeline=2", "found 3", "virtual_pipeline=1"],
        ),
    ],
    ids=["world size", "batch", "interleaved"],
)
def test_layout_that_does_not_fit(
    overrides: list[str], world_size: int, expected: list[str]
) -> None:
    config = load_config(SMOKE, overrides)
    with pytest.raises(ConfigError) as caught:
        Layout.of(config, world_size)
    assert [part for part in expected if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such config file"),
        ("a: [1", "not valid YAML"),
        ("- a\n- b\n", "expected 'key: value' lines"),
        ("extends: config.yaml\n", "extends itself"),
        ("extends: [missing.yaml]\n", "missing.yaml: no such config file"),
        ("name: x\n", "model: missing"),
        ("", "name: missing"),
        ("name: ${oc.env:HOME}\n", "name=${oc.env:HOME}: ${} is not filled in"),
        ("extends: 5\n", "extends=[5]: expected a file name"),
        ("extends:\n", "extends=None: expected a file name"),
    ],
)
def test_unreadable_file_is_named(text: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    message = message_of(path)
    assert str(tmp_path) in message
    assert expected in message
    assert "\n" not in message


def test_binary_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path}: cannot be read" in message_of(path)


@pytest.mark.parametrize(
    "override", ["tracking.wandb=disabled", "train.spike.action=ignore"], ids=["wandb", "spike"]
)
def test_what_is_switched_off_has_a_word_that_yaml_keeps(override: str) -> None:
    """YAML 1.1 reads a bare ``off`` as false, so no value is spelt that way."""
    config = load_config(SMOKE, [override])
    assert override.split("=")[1] in (config.tracking.wandb, config.train.spike.action)


def test_extends_lets_the_later_file_win(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"extends: [{SMOKE}]\nname: child\ntrain:\n  steps: 3\n")
    config = load_config(child, ["seed=11"])
    assert (config.name, config.train.steps, config.seed) == ("child", 3, 11)
    assert config.model == load_config(SMOKE).model


def test_paper_runs_see_the_same_tokens_per_update() -> None:
    short = load_config(ROOT / "configs/runs/alibi_1p3b_L1024.yaml")
    long = load_config(ROOT / "configs/runs/sinusoidal_1p3b_L2048.yaml")
    assert short.tokens_per_step == long.tokens_per_step == 2_097_152
    assert short.data.block_size == long.data.block_size == long.data.sequence_length
    same = {"model": {"position"}, "data": {"sequence_length"}, "name": True, "batch": True}
    same["evaluation"] = True
    assert dump_without(short, same) == dump_without(long, same)


def message_of(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides or [])
    return str(caught.value)


def dump_without(config: RunConfig, exclude: dict) -> dict:
    return config.model_dump(exclude=exclude)


def test_learned_has_a_row_for_every_trained_position_and_remembers_how_many(
    tmp_path: Path,
) -> None:
    """A later evaluation at another length still builds the table that was trained."""
    trained = load_config(SMOKE, ["model.position=learned", "data.sequence_length=128"])
    assert longest_input(trained) == trained.model.max_positions == 128
    (tmp_path / "config.yaml").write_text(trained.to_yaml())
    assert longest_input(load_config(tmp_path, ["data.sequence_length=64"])) == 128
    longer = load_config(SMOKE, ["model.position=learned", "model.max_positions=1000"])
    assert longest_input(longer) == 1000


@pytest.mark.parametrize("position", ["alibi", "sinusoidal", "rotary", "t5", "none"])
def test_other_methods_have_no_longest_input_of_their_own(position: str) -> None:
    assert longest_input(load_config(SMOKE, [f"model.position={position}"])) is None
    limited = load_config(SMOKE, [f"model.position={position}", "model.max_positions=512"])
    assert longest_input(limited) == 512
