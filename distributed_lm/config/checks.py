"""What no single field can say: values of a run's config that contradict each other."""

from itertools import pairwise
from typing import Any

from distributed_lm.config.model import AdaptiveConfig, ModelConfig
from distributed_lm.config.run import RunConfig
from distributed_lm.errors import ConfigError
from distributed_lm.layout import check_layout

# Fields that one kind alone reads, and that kind: set for another they would silently do nothing.
SCHEDULE_FIELDS = {
    "decay_steps": "wsd",
    "warmup_start_ratio": "cosine_restarts",
    "period_steps": "cosine_restarts",
    "period_multiplier": "cosine_restarts",
    "period_shrink": "cosine_restarts",
}
OPTIMIZER_FIELDS = {"momentum": "nag", "beta1": "adamw", "beta2": "adamw", "epsilon": "adamw"}


def longest_input(config: RunConfig) -> int | None:
    """Longest sequence that the model takes, in tokens; None = any. Past it there is nothing to
    score: the model has no embedding for such a position."""
    return config.model.max_positions


def check_config(config: RunConfig) -> None:
    """Reject values that contradict each other, whatever the world size.

    Raises:
        ConfigError: naming the fields, both numbers and the remedy.
    """
    _check_model(config.model)
    _check_lengths(config)
    check_layout(config)
    _check_only_for(config.schedule, "schedule", SCHEDULE_FIELDS)
    _check_only_for(config.optimizer, "optimizer", OPTIMIZER_FIELDS)
    if config.precision != "fp32" and config.zero.stage == 0:
        raise ConfigError(
            f"zero.stage=0 keeps no fp32 master weights for precision={config.precision}; "
            "set zero.stage=1 (or precision=fp32)"
        )
    if config.precision == "fp16" and config.parallel.pipeline > 1:
        raise ConfigError(
            f"precision=fp16 with parallel.pipeline={config.parallel.pipeline} is not supported: "
            "the loss scale is known only to the last stage; set precision=bf16"
        )
    if config.zero.stage >= 2 and config.parallel.pipeline > 1:
        raise ConfigError(
            f"zero.stage={config.zero.stage} with parallel.pipeline={config.parallel.pipeline} "
            "gives wrong gradients, since it reduces before the pipeline has accumulated them; "
            "set zero.stage=1"
        )
    obstacle = compile_obstacle(config)
    if config.train.compile is True and obstacle:
        raise ConfigError(f"train.compile=true: {obstacle}; set train.compile=auto")


def compile_obstacle(config: RunConfig) -> str | None:
    """Why the decoder layers of this run cannot be compiled each in one piece; None = they can."""
    rates = config.model.dropout
    if config.parallel.tensor > 1:
        return f"parallel.tensor={config.parallel.tensor} communicates inside each layer"
    if config.zero.stage == 3:
        return "zero.stage=3 gathers weights inside each layer"
    if config.train.recompute == "selective":
        return "train.recompute=selective saves random states inside each layer"
    if any((rates.hidden, rates.attention, rates.activation)):
        return "model.dropout would draw other random numbers"
    return None


def _check_only_for(section: Any, name: str, kinds: dict[str, str]) -> None:
    """Reject a field that is set although the section's ``kind`` does not read it."""
    for field, kind in kinds.items():
        value = getattr(section, field)
        if value != type(section).model_fields[field].default and section.kind != kind:
            raise ConfigError(
                f"{name}.{field}={value} has a meaning for {name}.kind={kind} only, "
                f"found {section.kind}; leave it out"
            )


def _check_model(model: ModelConfig) -> None:
    heads = model.num_attention_heads
    if model.hidden_size % heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of "
            f"model.num_attention_heads={heads}; choose a head count that divides it"
        )
    if heads % model.key_value_heads:
        raise ConfigError(
            f"model.num_attention_heads={heads} is not a multiple of "
            f"model.num_key_value_heads={model.num_key_value_heads}; choose a divisor of {heads}"
        )
    if model.adaptive is not None:
        _check_adaptive(model, model.adaptive)


def _check_adaptive(model: ModelConfig, adaptive: AdaptiveConfig) -> None:
    edges = [*adaptive.cutoffs, *([model.vocab_size] if model.vocab_size else [])]
    if any(after <= before for before, after in pairwise(edges)):
        raise ConfigError(
            f"model.adaptive.cutoffs={list(adaptive.cutoffs)} with model.vocab_size="
            f"{model.vocab_size}: expected ascending numbers below the vocabulary's size"
        )
    narrowest = adaptive.factor ** len(adaptive.cutoffs)
    if model.hidden_size % narrowest:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.adaptive.factor="
            f"{adaptive.factor} to the power of {len(adaptive.cutoffs)} cutoffs = {narrowest}, by "
            "which the rarest words' embeddings are narrower; choose a multiple or fewer cutoffs"
        )
    if not model.tie_embeddings:
        raise ConfigError(
            "model.tie_embeddings=false: model.adaptive ties its input and output embeddings "
            "always; set model.tie_embeddings=true"
        )


def _check_lengths(config: RunConfig) -> None:
    length, block = config.data.sequence_length, config.data.block_size
    limit = longest_input(config)
    if limit is not None and length > limit:
        raise ConfigError(
            f"data.sequence_length={length} is longer than model.max_positions={limit}; "
            "shorten the sequences or raise model.max_positions"
        )
    if block % length:
        raise ConfigError(
            f"data.block_length={block} is not a multiple of data.sequence_length={length}; "
            f"use {length * max(1, round(block / length))}"
        )
    if config.tokens_per_step % block:
        raise ConfigError(
            f"batch.global_batch_size={config.batch.global_batch_size} sequences of "
            f"{length} tokens do not fill whole blocks of data.block_length={block}; "
            f"use a multiple of {block // length} sequences"
        )
