"""One batch on ever more nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_lm.config import RunConfig
from distributed_lm.errors import ConfigError
from distributed_lm.planner.search import Candidate, rank_layouts
from distributed_lm.planner.step_time import Machine

# nanotron's docs/benchmark_summary.svg: 1.34B parameters, 256 sequences per step whatever the
# number of nodes of 8 H100; MFU in percent.
NANOTRON = {1: 44.3, 2: 41.6, 4: 38.4, 8: 32.5, 16: 29.5, 32: 23.2, 64: 5.25}


@dataclass(frozen=True)
class ScalingRow:
    """The fastest layout on so many nodes."""

    nodes: int
    best: Candidate


def strong_scaling(
    config: RunConfig,
    vocab_size: int,
    machine: Machine,
    node_counts: Sequence[int],
    bytes_per_device: float | None,
) -> list[ScalingRow]:
    """Numbers of nodes on which no layout is legal or fits are left out."""
    rows = []
    for nodes in node_counts:
        world_size = nodes * machine.devices_per_node
        try:
            ranking = rank_layouts(config, world_size, vocab_size, machine, bytes_per_device)
        except ConfigError:
            continue
        if ranking.fitting:
            rows.append(ScalingRow(nodes, ranking.best))
    return rows
