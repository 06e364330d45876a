"""``distributed-lm plan``: what a run needs and takes on a cluster, before anything is queued.

Arithmetic only: nothing is built, and torch is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from distributed_lm.config import RunConfig, load_config
from distributed_lm.data.vocabulary import vocabulary
from distributed_lm.errors import ConfigError
from distributed_lm.layout import Layout
from distributed_lm.planner.devices import NodeShape, load_node_shape, rates_of
from distributed_lm.planner.flops import training_flops_per_token
from distributed_lm.planner.memory import rank_memory
from distributed_lm.planner.parameters import total_parameters
from distributed_lm.planner.report import SHOWN, Configured, Plan, show
from distributed_lm.planner.scaling import NANOTRON, strong_scaling
from distributed_lm.planner.search import (
    Candidate,
    check_write,
    rank_layouts,
    reasons,
    write_best,
)
from distributed_lm.planner.step_time import Machine, Throughput, throughput


def plan(
    path: Path,
    overrides: Sequence[str],
    cluster: str,
    nodes: int | None,
    write: Path | None,
    scaling: bool,
    as_json: bool,
) -> None:
    """
    Raises:
        ConfigError: if the config or the cluster file is wrong, or ``write`` cannot be written; or
            after printing, if no layout fits.
    """
    if write is not None:
        check_write(write, overrides)
    made = make_plan(load_config(path, overrides), load_node_shape(cluster), nodes, scaling)
    if as_json:
        Console(soft_wrap=True).print_json(json.dumps(as_dictionary(made)))
    else:
        show(made)
    if not made.ranking.fitting:
        smallest = made.ranking.too_large[0]
        raise ConfigError(
            f"no layout fits: the smallest ({smallest.layout.describe()}, "
            f"zero.stage={smallest.config.zero.stage}) needs {smallest.memory.total / 1e9:.1f} GB, "
            f"and a device has {made.shape.device_memory_gb:g}; raise the number of nodes, or "
            "lower data.sequence_length, model.num_layers or model.hidden_size"
        )
    if write is not None:
        write_best(made.ranking.best, write, path)


def make_plan(
    config: RunConfig, shape: NodeShape, nodes: int | None = None, scaling: bool = False
) -> Plan:
    vocab_size = vocabulary(config)
    if vocab_size is None:
        raise ConfigError(
            f"data.path={config.data.corpora[0].path} is not prepared, so its vocabulary is not "
            "known; set model.vocab_size, or prepare the data first"
        )
    nodes = nodes or shape.nodes
    machine = Machine(rates_of(shape), shape.devices_per_node)
    world_size = nodes * shape.devices_per_node
    limit = None if shape.device_memory_gb is None else shape.device_memory_gb * 1e9
    most = max(nodes, max(NANOTRON)) if shape.device == "gpu" else nodes
    counts = [2**power for power in range(most.bit_length())] if scaling else []
    return Plan(
        config=config,
        shape=shape,
        machine=machine,
        vocab_size=vocab_size,
        nodes=nodes,
        configured=_configured(config, world_size, vocab_size, machine),
        ranking=rank_layouts(config, world_size, vocab_size, machine, limit),
        scaling=strong_scaling(config, vocab_size, machine, counts, limit),
    )


def _configured(
    config: RunConfig, world_size: int, vocab_size: int, machine: Machine
) -> Configured | ConfigError:
    try:
        layout = Layout.of(config, world_size)
    except ConfigError as error:
        return error
    return Configured(
        layout=layout,
        memory=[
            rank_memory(config, layout, vocab_size, rank, machine.rates.device)
            for rank in range(layout.pipeline)
        ],
        speed=throughput(config, layout, vocab_size, machine),
    )


def as_dictionary(made: Plan) -> dict[str, Any]:
    model, size = made.config.model, made.vocab_size
    flops = training_flops_per_token(model, size, made.config.data.sequence_length)
    best = made.ranking.best if made.ranking.fitting else None
    return {
        "parameters": total_parameters(model, size),
        "vocab_size": size,
        "flops_per_token": {"full": flops.full, "causal": flops.causal},
        "devices": made.nodes * made.shape.devices_per_node,
        "rates": made.machine.rates.name,
        **_configured_dictionary(made.configured),
        "legal_layouts": len(made.ranking.fitting) + len(made.ranking.too_large),
        "best": best and _candidate(best),
        "ranking": [_candidate(one) for one in made.ranking.fitting[:SHOWN]],
        "reasons": reasons(made.ranking),
        "scaling": [{"nodes": row.nodes, **_candidate(row.best)} for row in made.scaling],
    }


def _configured_dictionary(own: Configured | ConfigError) -> dict[str, Any]:
    if isinstance(own, ConfigError):
        return {"layout": None, "problem": str(own)}
    return {
        "layout": own.layout.describe(),
        "memory": [{**one.parts(), "total": one.total, "phase": one.phase} for one in own.memory],
        "step_seconds": {**own.speed.step.parts(), "total": own.speed.step.total},
        **_speed(own.speed),
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    return {**one.fields, "memory_bytes": one.memory.total, **_speed(one.speed)}


def _speed(speed: Throughput) -> dict[str, float]:
    return {
        "tokens_per_second": speed.tokens_per_second,
        "mfu": speed.mfu,
        "tokens_per_day": speed.tokens_per_day,
        "device_hours": speed.device_hours,
    }
