"""What may stand in a study's file: the arms, how they are tuned and scored, and the claims.

A study is a base config and the few fields in which its arms differ. Everything that must be equal
for the comparison to be fair follows from here: tokens per update, block length, seeds. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from distributed_lm.config import NAME_PATTERN, Count, CountOrOff, PositiveFloat, Section
from distributed_lm.errors import ConfigError

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Fields = dict[str, Any]
"""Fields of a run's config by their dotted names, as on the command line."""


class Arm(Section):
    """One kind of run: it differs from the others in this, and in nothing else."""

    name: Name
    position: str
    """``model.position``."""
    length: Count
    """Tokens per training sequence."""
    time_of: str | None = None
    """Another arm: train for as long as that one takes, the schedule ending there. It takes the
    learning rate of the arm with its position and length that trains in full."""
    fields: Fields = Field(default_factory=dict)

    def is_like(self, other: Arm) -> bool:
        """Whether they differ in name and training time only."""
        mine, its = (self.position, self.length), (other.position, other.length)
        return mine == its and self.fields == other.fields


class Tuning(Section):
    """Each arm's learning rate: the one of these with the lowest validation loss."""

    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    fields: Fields = Field(default_factory=dict)
    """Changes that make a run the smaller proxy on which the rates are compared."""
    transfer: Literal["same", "inverse_width"] = "same"
    """From the proxy to full size: the same rate, or one divided by the ratio of the widths."""
    seed: CountOrOff = 0
    """Not one of the study's, so that no run is chosen for its own luck."""


class Scoring(Section):
    """One ``distributed-lm evaluate`` for each run of the arms."""

    arms: tuple[str, ...] = ()
    """Off = all."""
    lengths: Annotated[tuple[Count, ...], Field(min_length=1)]
    protocol: Literal["nonoverlapping", "sliding", "context", "documents"] = "nonoverlapping"
    stride: Count | None = None
    sample: Count | None = None
    """Score this many tokens only, spread over the text."""


class Speed(Section):
    """Short runs, one at a time and in turns, that measure time and memory of a step."""

    arms: tuple[str, ...] = ()
    """Off = all that train in full."""
    backends: dict[Name, str] = Field(default_factory=lambda: {"fused": "auto"}, min_length=1)
    """``attention.backend`` by the name that the report gives it."""
    rounds: Count = 3
    steps: Count = 10
    """Of each run; the first ``WARM_UP_STEPS`` do not count."""


class Quantity(Section):
    """A number that a claim compares."""

    arm: str
    measure: Literal["loss", "halted_loss", "seconds", "memory"] = "loss"
    """``loss``: nats per token at the end; ``halted_loss``: when the run had taken as long as
    another arm; ``seconds`` per token and ``memory`` of the largest rank, both of training."""
    length: Count | None = None
    """Context length at evaluation."""
    protocol: Literal["nonoverlapping", "sliding", "context", "documents"] = "nonoverlapping"
    time_of: str | None = None
    """``halted_loss``: the arm whose training time it is given."""
    backend: str | None = None
    """``seconds`` and ``memory``: one of ``speed.backends``; off = the first."""


class Claim(Section):
    """What the paper says, as a relation between two numbers.

    The difference is left − right in nats per token for losses, and left / right − 1 for seconds
    and memory. Exactly one of the relations is given, with its margin.
    """

    name: str
    paper: str
    """What the paper found, and where it says so."""
    left: Quantity
    right: Quantity
    greater_than: float | None = None
    less_than: float | None = None
    within: PositiveFloat | None = None
    """The two are the same: the difference lies between −margin and margin."""

    @property
    def relation(self) -> tuple[str, float]:
        for name in ("greater_than", "less_than", "within"):
            margin = getattr(self, name)
            if margin is not None:
                return name, margin
        raise ConfigError(f"claims: {self.name!r} has no relation")

    @property
    def is_ratio(self) -> bool:
        return self.left.measure in ("seconds", "memory")


class PaperCurve(Section):
    """Numbers of the paper's, for orientation: another corpus and another tokenizer."""

    label: str
    source: str
    perplexities: dict[int, float]
    """By context length at evaluation."""


class Study(Section):
    """Everything that determines a study."""

    name: Name
    description: str = ""
    base: str
    """Config that all runs start from; relative to this file."""
    fields: Fields = Field(default_factory=dict)
    """Changes to it, for all runs."""
    output_dir: str = "runs"
    """Folder that holds the study's folder."""
    corpus: str = ""
    """Which text, and why it stands for the paper's."""
    prepare: tuple[str, ...] = ()
    """Arguments of ``prepare-data`` that make ``data.path``; off = it must be there."""
    tokens_per_update: Count
    tokens_per_microbatch: Count
    """Of one data-parallel rank."""
    seeds: Annotated[tuple[CountOrOff, ...], Field(min_length=1)]
    """Paired: with one seed all arms see the same tokens in each update."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)]
    tuning: Tuning | None = None
    """Off = the base config's learning rate for all arms."""
    scorings: Annotated[tuple[Scoring, ...], Field(min_length=1)]
    speed: Speed | None = None
    claims: tuple[Claim, ...] = ()
    paper_curves: tuple[PaperCurve, ...] = ()
    teraflops_per_device: PositiveFloat
    """Assumed for the bill: model FLOP/s of one device in training."""

    path: Path = Path()
    """Where the study was read from; not in the file."""
    overrides: tuple[str, ...] = ()
    """What was changed on the command line; not in the file."""

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def block_length(self) -> int:
        """Of all runs, so that they see the same tokens: a multiple of every length."""
        return math.lcm(*(arm.length for arm in self.arms))

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def full_arms(self) -> tuple[Arm, ...]:
        """Those that train in full; each is tuned."""
        return tuple(arm for arm in self.arms if arm.time_of is None)

    def full_twin(self, arm: Arm) -> Arm:
        """The arm itself, or the one that it would be if it trained in full."""
        if arm.time_of is None:
            return arm
        return next(other for other in self.full_arms if other.is_like(arm))

    @property
    def time_pairs(self) -> tuple[tuple[str, str], ...]:
        """(short, long) wherever one arm is given another's time: the names of both in full."""
        pairs = [(arm.time_of, self.full_twin(arm).name) for arm in self.arms if arm.time_of]
        for claim in self.claims:
            for quantity in (claim.left, claim.right):
                if quantity.measure == "halted_loss" and quantity.time_of is not None:
                    pairs.append((quantity.time_of, quantity.arm))
        return tuple(dict.fromkeys(pairs))

    @property
    def timed_arms(self) -> tuple[Arm, ...]:
        """Those that the speed runs measure."""
        if self.speed is None:
            return ()
        chosen = self.speed.arms
        return tuple(arm for arm in self.full_arms if not chosen or arm.name in chosen)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check a study.

    Args:
        overrides: ``field=value`` for the study's own top-level fields, in YAML syntax.

    Raises:
        ConfigError: naming the field, what was found and what to do.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such study; configs/studies/ has some") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or key not in Study.model_fields or key in ("path", "overrides"):
            raise ConfigError(
                f"{override!r}: expected FIELD=VALUE with a top-level field of the study, as in "
                "seeds=[1,2,3]"
            )
        values[key] = yaml.safe_load(text)
    try:
        study = Study.model_validate({**values, "path": path, "overrides": tuple(overrides)})
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{path}: {field}: {problem['msg'].lower()}") from None
    check_study(study)
    return study


def check_study(study: Study) -> None:
    """Raises ConfigError if the study's parts contradict each other."""
    names = [arm.name for arm in study.arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"arms: two are called {name}; give each its own name")
    if len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"seeds={list(study.seeds)}: one is given twice")
    if study.tuning is not None and study.tuning.seed in study.seeds:
        raise ConfigError(
            f"tuning.seed={study.tuning.seed} is one of seeds={list(study.seeds)}; take another, "
            "so that no run is chosen for its own luck"
        )
    for arm in study.arms:
        _check_arm(study, arm)
    _check_scorings(study)
    for name in study.speed.arms if study.speed else ():
        _known(study, name, "speed.arms")
    for claim in study.claims:
        _check_claim(study, claim)


def _check_scorings(study: Study) -> None:
    for scoring in study.scorings:
        for name in scoring.arms:
            _known(study, name, "scorings.arms")
    for arm in study.arms:
        protocols = [one.protocol for one in study.scorings if not one.arms or arm.name in one.arms]
        for protocol in protocols:
            if protocols.count(protocol) > 1:
                raise ConfigError(
                    f"scorings: {arm.name} is scored twice with the protocol {protocol}; put the "
                    "lengths into one"
                )


def _check_arm(study: Study, arm: Arm) -> None:
    for size, name in (
        (study.block_length, "the block length, which all lengths must divide"),
        (arm.length, f"the length of {arm.name}"),
    ):
        if study.tokens_per_update % size:
            raise ConfigError(
                f"tokens_per_update={study.tokens_per_update} is not a multiple of {size}, {name}; "
                f"use {size * max(1, round(study.tokens_per_update / size))}"
            )
    if study.tokens_per_microbatch % arm.length:
        raise ConfigError(
            f"tokens_per_microbatch={study.tokens_per_microbatch} is not a multiple of the "
            f"{arm.length} tokens of {arm.name}'s sequences, so its passes would not hold as many "
            f"tokens as the others'; use a multiple of {study.block_length}"
        )
    if arm.time_of is None:
        return
    _known(study, arm.time_of, f"arms.{arm.name}.time_of")
    twins = [other.name for other in study.full_arms if other.is_like(arm)]
    if not twins:
        raise ConfigError(
            f"arms.{arm.name}: time_of needs an arm that trains {arm.position} at {arm.length} in "
            "full, to compare with and to tune; add one"
        )
    _check_timed(study, (arm.time_of, twins[0]), f"arms.{arm.name}.time_of")


def _check_claim(study: Study, claim: Claim) -> None:
    where = f"claims: {claim.name!r}"
    relations = [claim.greater_than, claim.less_than, claim.within]
    if sum(margin is not None for margin in relations) != 1:
        raise ConfigError(f"{where}: give exactly one of greater_than, less_than and within")
    if claim.is_ratio != (claim.right.measure in ("seconds", "memory")) or (
        claim.is_ratio and claim.left.measure != claim.right.measure
    ):
        raise ConfigError(
            f"{where}: {claim.left.measure} and {claim.right.measure} have different units"
        )
    for quantity in (claim.left, claim.right):
        _known(study, quantity.arm, where)
        if quantity.measure == "halted_loss":
            if quantity.time_of is None:
                raise ConfigError(f"{where}: halted_loss needs time_of, the arm whose time it gets")
            _known(study, quantity.time_of, where)
            _check_timed(study, (quantity.time_of, quantity.arm), where)
        if claim.is_ratio:
            _check_timed(study, (quantity.arm,), where)
            backends = study.speed.backends if study.speed else {}
            if quantity.backend is not None and quantity.backend not in backends:
                raise ConfigError(
                    f"{where}: backend={quantity.backend} is not in speed.backends, "
                    f"{', '.join(backends)}"
                )
        elif quantity.length is None:
            raise ConfigError(f"{where}: {quantity.arm} needs the length to score it at")
        elif not _is_measured(study, quantity):
            raise ConfigError(
                f"{where}: {quantity.arm} is not scored at {quantity.length} with the protocol "
                f"{quantity.protocol}; add it to scorings (a halted run is validated at its own "
                "length and at twice that)"
            )


def _is_measured(study: Study, quantity: Quantity) -> bool:
    length = study.arm(quantity.arm).length
    if quantity.measure == "halted_loss":
        return quantity.length in (length, 2 * length)
    return any(
        quantity.length in scoring.lengths
        for scoring in study.scorings
        if scoring.protocol == quantity.protocol
        and (not scoring.arms or quantity.arm in scoring.arms)
    )


def _known(study: Study, name: str, where: str) -> None:
    known = [arm.name for arm in study.arms]
    if name not in known:
        raise ConfigError(f"{where}: no arm {name}; there are: {', '.join(known)}")


def _check_timed(study: Study, names: tuple[str, ...], where: str) -> None:
    timed = [arm.name for arm in study.timed_arms]
    for name in names:
        if name not in timed:
            raise ConfigError(f"{where}: the time of {name} is not measured; add it to speed.arms")


def as_overrides(fields: dict[str, Any]) -> list[str]:
    """Dotted fields as overrides of ``load_config``; JSON is YAML."""
    return [f"{name}={json.dumps(value)}" for name, value in fields.items()]
