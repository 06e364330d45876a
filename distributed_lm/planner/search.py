"""Every legal layout of a run on a number of devices, ranked, and why the others lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from distributed_lm.config import RunConfig, check_config
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.planner.memory import Memory, largest_memory
from distributed_lm.planner.step_time import Machine, Throughput, throughput

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
VIRTUAL_PIPELINES = (1, 2, 4)
RECOMPUTES = ("none", "selective", "full")
# Of a step's time: closer than this, the model says nothing about which is faster.
INDISTINGUISHABLE = 0.05


@dataclass(frozen=True)
class Candidate:
    """One layout: what it needs and what it does."""

    config: RunConfig
    layout: Layout
    memory: Memory
    speed: Throughput

    @property
    def fields(self) -> dict[str, Any]:
        """What the search has chosen, as dotted fields of a config file."""
        config = self.config
        return {
            "parallel.tensor": config.parallel.tensor,
            "parallel.pipeline": config.parallel.pipeline,
            "parallel.virtual_pipeline": config.parallel.virtual_pipeline,
            "parallel.sequence": config.parallel.sequence,
            "zero.stage": config.zero.stage,
            "batch.micro_batch_size": config.batch.micro_batch_size,
            "train.recompute": config.train.recompute,
        }

    @property
    def complexity(self) -> tuple[float, ...]:
        """For choosing among layouts that are equally fast: fewer parts that move, then speed."""
        layout, config = self.layout, self.config
        return (
            layout.tensor * layout.pipeline,
            layout.virtual_pipeline,
            config.zero.stage,
            RECOMPUTES.index(config.train.recompute),
            self.speed.step.total,
        )


@dataclass(frozen=True)
class Ranking:
    """Fastest first among those that fit."""

    fitting: list[Candidate]
    too_large: list[Candidate]
    """Smallest first."""

    @property
    def best(self) -> Candidate:
        """The simplest of those that the model cannot tell from the fastest."""
        limit = self.fitting[0].speed.step.total * (1 + INDISTINGUISHABLE)
        alike = [one for one in self.fitting if one.speed.step.total <= limit]
        return min(alike, key=lambda one: one.complexity)


def rank_layouts(
    config: RunConfig,
    world_size: int,
    vocab_size: int,
    machine: Machine,
    bytes_per_device: float | None,
) -> Ranking:
    """
    Raises:
        ConfigError: if no layout of that many devices is legal.
    """
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    for changed, layout in legal_layouts(config, world_size, machine.devices_per_node):
        memory = largest_memory(changed, layout, vocab_size, machine.rates.device)
        speed = throughput(changed, layout, vocab_size, machine)
        fits = bytes_per_device is None or memory.total <= bytes_per_device
        (fitting if fits else too_large).append(Candidate(changed, layout, memory, speed))
    if not fitting and not too_large:
        # With the reason of the config as it is, if that is one.
        Layout.of(config, world_size)
        raise ConfigError(f"no layout of {world_size} devices is legal for this config")
    fitting.sort(key=lambda one: (one.speed.step.total, one.complexity))
    too_large.sort(key=lambda one: one.memory.total)
    return Ranking(fitting, too_large)


def legal_layouts(
    config: RunConfig, world_size: int, devices_per_node: int
) -> Iterator[tuple[RunConfig, Layout]]:
    """Those that the config's own checks let pass. Tensor-parallel groups stay inside a node."""
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    tensors = [size for size in sizes if size <= devices_per_node]
    pipelines = [size for size in sizes if size <= config.model.num_layers]
    grids = product(tensors, pipelines, VIRTUAL_PIPELINES, (False, True))
    for tensor, pipeline, virtual, sequence in grids:
        parallel = config.parallel.model_copy(
            update={
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "sequence": sequence,
            }
        )
        split = config.model_copy(update={"parallel": parallel})
        for stage in range(4):
            zero = config.zero.model_copy(update={"stage": stage})
            yield from _batches(split.model_copy(update={"zero": zero}), world_size)


def _batches(config: RunConfig, world_size: int) -> Iterator[tuple[RunConfig, Layout]]:
    for size in sorted({*MICRO_BATCHES, config.batch.micro_batch_size}):
        batch = config.batch.model_copy(update={"micro_batch_size": size})
        changed = config.model_copy(update={"batch": batch})
        try:
            layout = Layout.of(changed, world_size)
        except ConfigError:
            continue
        for recompute in RECOMPUTES:
            train = config.train.model_copy(update={"recompute": recompute})
            whole = changed.model_copy(update={"train": train})
            if _passes(whole):
                yield whole, layout


def _passes(config: RunConfig) -> bool:
    try:
        check_config(config)
    except ConfigError:
        return False
    return True


def reasons(ranking: Ranking) -> list[str]:
    """A sentence on each choice that the best did not make: its best case, and what that costs."""
    if not ranking.fitting:
        return []
    best = ranking.best
    sentences = {}
    for candidate in ranking.fitting:
        for choice in candidate.fields.items():
            if choice not in sentences and choice[1] != best.fields[choice[0]]:
                sentences[choice] = _sentence(*choice, candidate, best)
    for field, value in _never_fit(ranking):
        sentences[field, value] = f"{field}={_shown(value)}: no layout with it fits"
    return [sentences[choice] for choice in sorted(sentences)]


def _sentence(field: str, value: Any, candidate: Candidate, best: Candidate) -> str:
    """The part of the step that grew most against the best's."""
    ours, theirs = candidate.speed.step, best.speed.step
    slower = ours.total / theirs.total - 1
    growth = {name: ours.parts()[name] - theirs.parts()[name] for name in ours.parts()}
    part = max(growth, key=lambda name: growth[name])
    direction = "slower" if slower > 0 else "faster"
    said = f"{field}={_shown(value)}: at best {abs(100 * slower):.1f}% {direction}"
    if abs(slower) < INDISTINGUISHABLE:
        said += ", too little to tell"
    else:
        said += (
            f"; {EXPLANATIONS[part]} {1e3 * ours.parts()[part]:.0f} ms of a step of "
            f"{1e3 * ours.total:.0f} ms, {1e3 * growth[part]:.0f} ms more than in the best"
        )
    if (field, value) == ("zero.stage", 2):
        said += "; its reductions run beside backward, which the model leaves out"
    return said


def _shown(value: Any) -> str:
    """As a config file has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


EXPLANATIONS = {
    "matrix_products": "matrix products take",
    "attention": "attention takes",
    "elementwise": "norms, activations and residuals take",
    "loss": "the loss takes",
    "recompute": "computing activations again takes",
    "tensor_parallel": "the all-reduces of two activations per layer and direction take",
    "pipeline_sends": "sending activations between stages takes",
    "bubble": "the pipeline's bubble takes",
    "gradients": "reducing gradients takes",
    "weights": "gathering weights for every microbatch takes",
    "optimizer": "adding gradients up and updating takes",
}


def _never_fit(ranking: Ranking) -> set[tuple[str, Any]]:
    fitting = {item for one in ranking.fitting for item in one.fields.items()}
    return {item for one in ranking.too_large for item in one.fields.items()} - fitting


def check_write(path: Path, overrides: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: if ``path`` exists, or ``overrides`` would be lost.
    """
    if path.exists():
        raise ConfigError(f"--write={path}: exists; give another name, or remove it")
    if overrides:
        raise ConfigError(
            f"--write with overrides ({' '.join(overrides)}): they would not be in {path}; "
            "put them into the config first"
        )


def write_best(candidate: Candidate, path: Path, base: Path) -> None:
    """A config that extends ``base`` and changes what the search has chosen.

    Raises:
        ConfigError: if it cannot be written.
    """
    if base.is_dir():
        base = base / "config.yaml"
    nested: dict[str, Any] = {}
    for field, value in candidate.fields.items():
        section, name = field.split(".")
        nested.setdefault(section, {})[name] = value
    parent = Path(_relative(base.resolve(), path.resolve().parent)).as_posix()
    header = (
        f"# {base.name} as `distributed-lm plan` would lay it out on "
        f"{candidate.layout.world_size} devices: {candidate.layout.describe()}.\n"
    )
    text = yaml.safe_dump({"extends": [parent], **nested}, sort_keys=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--write={path}: cannot be written: {error.strerror}; give another path"
        ) from None


def _relative(path: Path, start: Path) -> str:
    import os.path

    return os.path.relpath(path, start)
