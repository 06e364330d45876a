"""The table that ``distributed-lm rehearse`` prints."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from distributed_lm.planner.memory import Memory
from distributed_lm.rehearsal.checks import whole_groups
from distributed_lm.rehearsal.views import RankView, Script

# Sentences of one check that are shown; a broken layout has as many as it has ranks.
SHOWN = 5


@dataclass(frozen=True)
class Rehearsal:
    """What was built, and what was found."""

    script: Script
    views: list[RankView]
    problems: dict[str, list[str]]
    """By name of the check, in order; a check that found nothing has an empty list."""
    memory: tuple[Memory, ...]
    """Of a rank of each pipeline stage, by the planner's model of a GPU."""
    device_memory_gb: float | None
    """What a device of the cluster has."""
    processes: int
    seconds: float


def print_report(rehearsal: Rehearsal) -> None:
    script, views = rehearsal.script, rehearsal.views
    width = max(Console().width, 110)  # also in a log, which has none
    console = Console(soft_wrap=True, highlight=False, width=width)
    world_size = script.layout.world_size
    built = f"{len(views):,}" if len(views) < world_size else "all"
    console.print(
        f"{escape(script.config.name)}: {script.layout.describe()}, zero.stage="
        f"{script.config.zero.stage}; built {built} of {world_size:,} ranks in "
        f"{rehearsal.seconds:.0f} s with {rehearsal.processes} processes"
    )
    if views:
        console.print(_stages(rehearsal))
    console.print(f"sequences of steps {_steps(script)}: {escape(script.data_note)}")
    console.print(_memory(rehearsal))
    for name, problems in rehearsal.problems.items():
        console.print(f"{name:<15} {f'{len(problems)} problems' if problems else 'ok'}")
        for sentence in problems[:SHOWN]:
            console.print(f"  {escape(sentence)}")
        if len(problems) > SHOWN:
            console.print(f"  … and {len(problems) - SHOWN:,} more")


def _stages(rehearsal: Rehearsal) -> Table:
    """Parameters and state (weights, masters and moments, as built) are of one rank; slopes are
    those of the ranks of a tensor group, one after another; the memory is planned."""
    views = rehearsal.views
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns: dict[str, JustifyMethod] = {
        "stage": "right",
        "ranks": "right",
        "layers": "left",
        "parameters": "right",
        "slopes": "left",
        "state": "right",
        "planned memory": "right",
    }
    for column, justify in columns.items():
        table.add_column(column, justify=justify)
    for stage in sorted({view.coordinates.pipeline for view in views}):
        ranks = [view for view in views if view.coordinates.pipeline == stage]
        first = ranks[0]
        ends = ("embedding, " if first.has_embedding else "", ", output" * first.has_output)
        table.add_row(
            str(stage),
            f"{len(ranks):,}",
            ends[0] + "; ".join(_range(chunk) for chunk in first.layers) + ends[1],
            _spread([view.parameters for view in ranks], "{:,}"),
            _slopes(ranks),
            _spread([view.state_bytes / 1e9 for view in ranks], "{:.2f}") + " GB",
            f"{rehearsal.memory[stage].total / 1e9:.1f} GB",
        )
    return table


def _range(layers: Sequence[int]) -> str:
    return f"{layers[0]}–{layers[-1]}" if layers else "none"


def _spread(values: Sequence[float], form: str) -> str:
    """One number, or the least and the most."""
    return " – ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values))))


def _slopes(ranks: Sequence[RankView]) -> str:
    groups = whole_groups(ranks, "tensor")
    if not groups or not all(view.slopes for view in groups[0]):
        return "none"
    joined = list(itertools.chain(*(view.slopes[0] for view in groups[0] if view.slopes)))
    return f"{len(joined)}: {joined[0]:.4g} … {joined[-1]:.4g}"


def _steps(script: Script) -> str:
    return ", ".join(str(step + 1) for step in script.steps)


def _memory(rehearsal: Rehearsal) -> str:
    stage, largest = max(enumerate(rehearsal.memory), key=lambda entry: entry[1].total)
    parts = ", ".join(
        f"{name} {size / 1e9:.2f}" for name, size in largest.parts().items() if size > 5e6
    )
    text = (
        f"memory: {largest.total / 1e9:.1f} GB on stage {stage} in the {largest.phase} by the "
        f"planner's model ({parts})"
    )
    if rehearsal.device_memory_gb is None:
        return text
    verdict = "fits" if largest.total / 1e9 <= rehearsal.device_memory_gb else "does not fit"
    return f"{text}; {verdict} in a device's {rehearsal.device_memory_gb:g} GB"
