"""The twelve WikiText-103 arms: what they share, what differs, and the parameters they have."""

from pathlib import Path

import pytest

from distributed_lm import process_groups
from distributed_lm.config import ModelConfig, RunConfig, load_config
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.model.gpt import build_stages
from distributed_lm.model.parameters import parameter_shards
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.planner.memory import rank_memory
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.process_groups import Process
from tests.support.ranks import run_distributed

ROOT = Path(__file__).parents[2]
POSITIONS = ("alibi", "sinusoidal", "rotary", "t5")
LENGTHS = (512, 1024, 3072)
ARMS = [(position, length) for position in POSITIONS for length in LENGTHS]
# What fairseq prints for transformer_lm_wiki103 with the 267,744 symbols of WikiText-103.
FAIRSEQ_PARAMETERS = 246_933_504


def load(position: str, length: int, *overrides: str) -> RunConfig:
    return load_config(ROOT / f"configs/runs/wikitext103_{position}_L{length}.yaml", overrides)


@pytest.mark.parametrize(("position", "length"), ARMS)
def test_arm_is_the_papers(position: str, length: int) -> None:
    config = load(position, length)
    assert config.model.position == position
    assert config.data.sequence_length == length
    assert config.tokens_per_step == 73_728 == 8 * 9216
    assert Layout.of(config, 8).data == 8  # on the paper's eight devices, as it is
    assert config.data.block_size == 3072
    assert config.evaluation.lengths[0] == length
    vocab_size = config.model.vocab_size
    assert vocab_size == 267_744
    parameters = total_parameters(config.model, vocab_size)
    table = 8 * 32 if position == "t5" else 0  # a bias for each head and bucket of distances
    assert parameters == FAIRSEQ_PARAMETERS + table


@pytest.mark.parametrize(("position", "length"), ARMS)
def test_arms_differ_in_position_and_length_only(position: str, length: int) -> None:
    arm, first = (load(*which).model_dump() for which in ((position, length), ARMS[0]))
    for values in (arm, first):
        del values["name"], values["model"]["position"], values["data"]["sequence_length"]
        del values["batch"], values["evaluation"]["lengths"]
    assert arm == first


def test_recipe_is_fairseqs_command() -> None:
    config = load("alibi", 512)
    assert config.optimizer.kind == "nag"
    assert (config.optimizer.learning_rate, config.optimizer.momentum) == (1.0, 0.99)
    assert (config.optimizer.clip_grad_norm, config.optimizer.weight_decay) == (0.1, 0.0)
    assert config.train.steps == 286_000
    schedule = config.schedule
    assert (schedule.kind, schedule.warmup_steps) == ("cosine_restarts", 16_000)
    assert (schedule.period_steps, schedule.period_multiplier) == (270_000, 2.0)
    assert schedule.period_shrink == 0.75
    assert (schedule.warmup_start_ratio, schedule.minimum_ratio) == (1e-7, 1e-4)
    model = config.model
    assert (model.dropout.hidden, model.dropout.attention, model.dropout.activation) == (
        0.3, 0.1, 0.1,
    )  # fmt: skip
    assert model.adaptive is not None
    assert (model.adaptive.cutoffs, model.adaptive.factor) == ((20_000, 60_000), 4)
    assert model.adaptive.dropout == 0.2
    assert not model.final_norm


def count_built(configs: list[RunConfig]) -> list[int]:
    groups = process_groups.start(configs[0], Process.from_environment(), Layout(1, 1, 1, 1, False))
    return [
        sum(
            shard.parameter.numel()
            for shard in parameter_shards(build_stages(config, 267_744, groups), groups)
        )
        for config in configs
    ]


def test_the_built_model_has_fairseqs_parameters() -> None:
    """And the same by hand: docs/wikitext103.md."""
    layer = 4 * 1024**2 + 4 * 1024 + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2 * 1024
    words = 20_000 * 1024 + 40_000 * 256 + 207_744 * 64
    projections = 1024 * (1024 + 256 + 64)
    assert 16 * layer + words + projections + 2 * 1024 == FAIRSEQ_PARAMETERS
    assert run_distributed(count_built, 1, [load("alibi", 512), load("t5", 512)]) == [
        [FAIRSEQ_PARAMETERS, FAIRSEQ_PARAMETERS + 8 * 32]
    ]


def test_flops_leave_the_rare_bands_out() -> None:
    model = load("alibi", 512).model
    flops = training_flops_per_token(model, 267_744, 512)
    head = 20_002 * 1024
    projections = 1024 * (1024 + 256 + 64) + 1024 * (256 + 64)
    products = 16 * 12_596_224 + head + projections
    assert flops.full == 6 * products + 12 * 16 * 1024 * 512


def test_nesterov_needs_four_bytes_less_per_parameter_than_adam() -> None:
    config = load("alibi", 512)
    adam = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"kind": "adamw"})}
    )
    one = Layout(1, 1, 1, 1, False)
    sizes = [rank_memory(which, one, 267_744, 0).moments for which in (adam, config)]
    assert sizes[0] - sizes[1] == 4 * FAIRSEQ_PARAMETERS


BAD_VALUES = [
    (["model.adaptive.cutoffs=[60000,20000]"], ["cutoffs=[60000, 20000]", "ascending"]),
    (["model.vocab_size=60000"], ["model.vocab_size=60000", "below the vocabulary's size"]),
    (["model.adaptive.factor=33"], ["hidden_size=1024", "factor=33", "= 1089", "fewer cutoffs"]),
    (["model.tie_embeddings=false"], ["model.tie_embeddings=false", "set model.tie_embeddings"]),
    (["model.adaptive.cutoffs=[20001,60000]", "parallel.tensor=2"], ["cutoffs.0=20001"]),
    (["schedule.kind=cosine"], ["schedule.warmup_start_ratio=1e-07", "cosine_restarts only"]),
    (["optimizer.kind=nag", "optimizer.beta1=0.8"], ["optimizer.beta1=0.8", "adamw only"]),
    (["optimizer.kind=adamw", "optimizer.momentum=0.9"], ["optimizer.momentum=0.9", "nag only"]),
    (["model.dropout.hidden=1.0"], ["model.dropout.hidden=1.0", "less than 1"]),
]


@pytest.mark.parametrize(("overrides", "parts"), BAD_VALUES)
def test_a_wrong_value_is_named(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load("alibi", 512, *overrides)
    for part in parts:
        assert part in str(error.value)


def test_vocabulary_without_rare_words_is_refused() -> None:
    from distributed_lm.planner.vocabulary import padded_vocab_size

    model = ModelConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=1,
        adaptive={"cutoffs": [320]},
    )
    assert padded_vocab_size(model, 321) == 384
    with pytest.raises(ConfigError, match="only 257 words; choose cutoffs below that"):
        padded_vocab_size(model, 257)
