"""What ``distributed-lm plan`` has found, as tables."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.planner.devices import NodeShape
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.planner.memory import Memory
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.planner.scaling import NANOTRON, ScalingRow
from distributed_lm.planner.search import Candidate, Ranking, reasons
from distributed_lm.planner.shards import rank_parameters, stage_layers
from distributed_lm.planner.step_time import Machine, Throughput

SHOWN = 8


@dataclass(frozen=True)
class Configured:
    """The config's own layout."""

    layout: Layout
    memory: list[Memory]
    """By pipeline coordinate."""
    speed: Throughput


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    config: RunConfig
    shape: NodeShape
    machine: Machine
    vocab_size: int
    nodes: int
    configured: Configured | ConfigError
    """Or why it is not possible on these nodes."""
    ranking: Ranking
    scaling: list[ScalingRow]


def show(made: Plan) -> None:
    console = Console(width=None if Console().is_terminal else 110, highlight=False)
    config, size = made.config, made.vocab_size
    flops = training_flops_per_token(config.model, size, config.data.sequence_length)
    console.print(
        f"{config.name}: {total_parameters(config.model, size):,} parameters, vocabulary {size:,}, "
        f"{flops.full / 1e9:.2f} GFLOP per token ({flops.causal / 1e9:.2f} below the diagonal)"
    )
    devices = f"{made.nodes} nodes × {made.shape.devices_per_node} {made.machine.rates.name}"
    if isinstance(made.configured, ConfigError):
        console.print(f"{devices}; as configured: not possible: {made.configured}")
    else:
        _show_configured(console, made, made.configured, devices)
    _show_ranking(console, made)
    if made.scaling:
        console.print(_scaling_table(made))


def _show_configured(console: Console, made: Plan, own: Configured, devices: str) -> None:
    config = made.config
    console.print(
        f"{devices}; as configured: {own.layout.describe()}, zero.stage={config.zero.stage}, "
        f"micro batch {config.batch.micro_batch_size}, recompute {config.train.recompute}"
    )
    console.print(_parameters_table(made, own.layout))
    console.print(_memory_table(made, own.memory))
    if made.shape.device_memory_gb:
        spare = made.shape.device_memory_gb - max(one.total for one in own.memory) / 1e9
        verdict = f"it fits, {spare:.1f} GB are left"
        if spare < 0:
            verdict = f"it does not fit, {-spare:.1f} GB are missing"
        console.print(f"as configured: {verdict}")
    for part in _time_table(config, own):
        console.print(part)


def _parameters_table(made: Plan, layout: Layout) -> Table:
    table = _table("Parameters of a rank", "stage", "layers", "embedding", "in layers", "output")
    table.add_column("other", justify="right")
    table.add_column("all", justify="right")
    model = made.config.model
    for stage in range(layout.pipeline):
        held = rank_parameters(model, made.vocab_size, layout, stage)
        numbers = (held.embedding, held.layers, held.output, held.other, held.total)
        layers = sum(stage_layers(model, layout, stage))
        table.add_row(str(stage), str(layers), *(f"{number:,}" for number in numbers))
    return table


def _memory_table(made: Plan, ranks: list[Memory]) -> Table:
    limit = made.shape.device_memory_gb
    title = "Memory of a rank at its peak, GB" + (f"; a device has {limit:g}" if limit else "")
    table = _table(title, "stage", *ranks[0].parts(), "all")
    for stage, memory in enumerate(ranks):
        numbers = [*memory.parts().values(), memory.total]
        table.add_row(str(stage), *(f"{number / 1e9:.2f}" for number in numbers))
    table.caption = f"the peak is in: {max(ranks, key=lambda one: one.total).phase}"
    return table


def _time_table(config: RunConfig, own: Configured) -> tuple[Table, str]:
    speed = own.speed
    table = _table(f"A step, predicted: {1e3 * speed.step.total:.0f} ms", "part", "ms", "share")
    for name, seconds in speed.step.parts().items():
        if seconds:
            share = f"{100 * seconds / speed.step.total:.1f}%"
            table.add_row(name.replace("_", " "), f"{1e3 * seconds:.1f}", share)
    return table, (
        f"{_per_second(speed, own.layout)}, {speed.tokens_per_day / 1e9:.2f}B tokens a day; the "
        f"whole run of {config.train.steps:,} steps: {speed.device_hours:,.0f} device-hours, "
        f"{speed.device_hours / own.layout.world_size:,.1f} hours"
    )


def _show_ranking(console: Console, made: Plan) -> None:
    ranking = made.ranking
    count = len(ranking.fitting) + len(ranking.too_large)
    table = _table(
        f"{count} legal layouts, {len(ranking.fitting)} fit; the fastest (* the choice: the "
        "simplest within 5%)",
        "", "layout", "zero", "micro", "recompute", "GB", "tokens/s/device", "MFU", "hours",
    )  # fmt: skip
    shown = ranking.fitting[:SHOWN]
    if ranking.fitting and ranking.best not in shown:
        shown = [*shown, ranking.best]
    for one in shown:
        table.add_row("*" if one is ranking.best else "", *_row(one))
    for one in ranking.too_large[: 0 if ranking.fitting else 3]:
        table.add_row("too large", *_row(one))
    console.print(table)
    for sentence in reasons(ranking):
        console.print(f"  {sentence}")
    if ranking.too_large and made.shape.device_memory_gb:
        over = ranking.too_large[0].memory.total / 1e9 - made.shape.device_memory_gb
        console.print(
            f"  {len(ranking.too_large)} layouts do not fit: the smallest of them by {over:.1f} GB"
        )


def _row(one: Candidate) -> list[str]:
    config, speed, devices = one.config, one.speed, one.layout.world_size
    return [
        one.layout.describe(),
        str(config.zero.stage),
        str(config.batch.micro_batch_size),
        config.train.recompute,
        f"{one.memory.total / 1e9:.1f}",
        f"{speed.tokens_per_second / devices:,.0f}",
        f"{100 * speed.mfu:.1f}%",
        f"{speed.device_hours / devices:,.1f}",
    ]


def _scaling_table(made: Plan) -> Table:
    tokens = made.config.tokens_per_step
    table = _table(
        f"{tokens:,} tokens per step on more nodes, each with its best layout",
        "nodes", "layout", "tokens/s", "MFU", "device-hours", "nanotron's MFU",
    )  # fmt: skip
    for row in made.scaling:
        speed = row.best.speed
        table.add_row(
            str(row.nodes),
            row.best.layout.describe(),
            f"{speed.tokens_per_second:,.0f}",
            f"{100 * speed.mfu:.1f}%",
            f"{speed.device_hours:,.0f}",
            f"{NANOTRON[row.nodes]}%" if row.nodes in NANOTRON else "",
        )
    table.caption = "nanotron: published, 1.34B parameters, half as many tokens per step, 8 × H100"
    return table


def _per_second(speed: Throughput, layout: Layout) -> str:
    each = speed.tokens_per_second / layout.world_size
    return (
        f"{speed.tokens_per_second:,.0f} tokens/s ({each:,.0f} per device), "
        f"MFU {100 * speed.mfu:.1f}%"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
