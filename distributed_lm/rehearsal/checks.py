"""What must hold between the ranks of a run. Pure functions over views; each problem a sentence.

Some of it can be said of few ranks, some only of a whole group: those checks pass over groups that
were not rehearsed whole.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from distributed_lm.config import ModelConfig
from distributed_lm.layout import Coordinates, Layout
from distributed_lm.planner.memory import Memory
from distributed_lm.planner.shards import rank_parameters
from distributed_lm.rehearsal.views import RankView


@dataclass(frozen=True)
class Expected:
    """What the config says, as far as the checks need it."""

    layout: Layout
    model: ModelConfig
    vocab_size: int
    """Rows of the embedding."""
    global_batch_size: int
    sequences_per_block: int
    moments: tuple[str, ...]
    """Names of the optimizer's."""
    memory: tuple[Memory, ...]
    """As planned, of a rank of each stage."""
    device_memory_gb: float | None = None


# A rank's pieces are padded, and cut at tensors' ends.
STATE_MARGIN, STATE_PADDING = 1.02, 16384

Views = Sequence[RankView]
Check = Callable[[Views, Expected], Iterator[str]]


def check_groups(views: Views, expected: Expected) -> Iterator[str]:
    """Megatron's groups follow from the layout's coordinates, their members agree on them, and
    DeepSpeed works with the same."""
    table = _expected_groups(expected.layout)
    named: dict[tuple[str, tuple[int, ...]], set[int]] = defaultdict(set)
    for view in views:
        wanted = table[view.rank]
        for kind in sorted(wanted.keys() | view.groups.keys()):
            found = view.groups.get(kind, ())
            if found != wanted.get(kind, ()):
                yield (
                    f"rank {view.rank}: its {kind} group is {show(found)}, the layout puts it with "
                    f"{show(wanted.get(kind, ()))}"
                )
            named[kind, found].add(view.rank)
        for kind, found in view.deepspeed_groups.items():
            if found != view.groups[kind]:
                yield (
                    f"rank {view.rank}: DeepSpeed's {kind} group is {show(found)}, Megatron's "
                    f"{show(view.groups[kind])}"
                )
    rehearsed = {view.rank for view in views}
    for (kind, group), by in named.items():
        for rank in sorted(rehearsed.intersection(group) - by):
            yield (
                f"rank {rank}: rank {min(by)} counts it into its {kind} group {show(group)}, and "
                "its own is another"
            )


def check_layers(views: Views, expected: Expected) -> Iterator[str]:
    """Every pipeline has every layer once and in order, the embedding first and the output last."""
    layout, whole = expected.layout, tuple(range(expected.model.num_layers))
    for view in views:
        stage = view.coordinates.pipeline
        ends = (
            ("the embedding", view.has_embedding, stage == 0),
            ("the output projection", view.has_output, stage == layout.pipeline - 1),
        )
        for name, has, should in ends:
            if has != should:
                yield (
                    f"rank {view.rank}: {'has' if has else 'lacks'} {name}, and is pipeline stage "
                    f"{stage} of {layout.pipeline}"
                )
        if len(view.layers) != layout.virtual_pipeline:
            yield (
                f"rank {view.rank}: has {len(view.layers)} virtual stages, expected "
                f"{layout.virtual_pipeline}"
            )
    for column in whole_groups(views, "pipeline"):
        chunks = itertools.zip_longest(*(view.layers for view in column), fillvalue=())
        layers = tuple(layer for chunk in chunks for stage in chunk for layer in stage)
        if layers != whole:
            yield (
                f"ranks {ranks_of(column)} (one pipeline): hold layers {show(layers)} in this "
                f"order, expected {show(whole)}"
            )


def check_parameters(views: Views, expected: Expected) -> Iterator[str]:
    """Every rank has built what the planner counts for its stage, and all of it has a name."""
    for view in views:
        stage = view.coordinates.pipeline
        planned = rank_parameters(expected.model, expected.vocab_size, expected.layout, stage).total
        if view.parameters != planned:
            yield (
                f"rank {view.rank} (pipeline stage {stage}): has {view.parameters:,} parameters, "
                f"the planner counts {planned:,}"
            )
        described = sum(math.prod(weight.shape) for weight in view.weights)
        if described != view.parameters:
            yield (
                f"rank {view.rank}: has {view.parameters:,} parameters, of which "
                f"{described:,} have a place in a global tensor"
            )


def check_slopes(views: Views, expected: Expected) -> Iterator[str]:
    """The tensor-parallel ranks' slopes, one after another, are the whole model's in order."""
    for group in whole_groups(views, "tensor"):
        if any(view.slopes is None for view in group):
            continue
        full = group[0].expected_slopes or ()
        numbers = list(itertools.chain(*group[0].layers))
        by_layer = zip(*(view.slopes or () for view in group), strict=False)
        for layer, parts in zip(numbers, by_layer, strict=False):
            problem = _slope_problem(list(itertools.chain(*parts)), full)
            if problem:
                yield f"ranks {ranks_of(group)} (one tensor group), layer {layer}: {problem}"
                break  # the position method is one for all layers


def _slope_problem(joined: list[float], full: Sequence[float]) -> str | None:
    if len(joined) != len(full):
        return f"have {len(joined)} slopes together, expected {len(full)}"
    for head, (found, right) in enumerate(zip(joined, full, strict=True)):
        if not math.isclose(found, right, rel_tol=1e-9):
            return f"slope {found:g} for head {head} of the model, expected {right:g}"
    return None


def check_samples(views: Views, expected: Expected) -> Iterator[str]:
    """Every sequence of a step goes to one data-parallel rank, and to all of its model ranks."""
    of_rank = {view.rank: view for view in views}
    for view in views:
        first = min(member for member in view.groups["model"] if member in of_rank)
        if not np.array_equal(view.samples, of_rank[first].samples):
            yield (
                f"rank {view.rank}: reads other sequences than rank {first}, which shares its "
                "replica of the model"
            )
    readers = [view for view in views if view.rank == min(set(view.groups["model"]) & set(of_rank))]
    steps = range(readers[0].samples.shape[0]) if readers else ()
    seen: dict[tuple[int, ...], int] = {}
    for step in steps:
        ids = [(tuple(row), view.rank) for view in readers for row in view.samples[step].tolist()]
        for sequence, rank in ids:
            if sequence in seen:
                yield (
                    f"ranks {seen[sequence]} and {rank}: both read the sequence (corpus, epoch, "
                    f"block, part) = {sequence}, rank {rank} at rehearsed step {step}"
                )
            seen.setdefault(sequence, rank)
        if len(readers) == expected.layout.data:
            yield from _step_problems(step, [sequence for sequence, _ in ids], expected)


def _step_problems(
    step: int, sequences: list[tuple[int, ...]], expected: Expected
) -> Iterator[str]:
    """Of a step of which all sequences are known."""
    if len(sequences) != expected.global_batch_size:
        yield (
            f"rehearsed step {step}: all ranks together read {len(sequences)} sequences, expected "
            f"batch.global_batch_size={expected.global_batch_size}"
        )
    parts = defaultdict(set)
    for corpus, epoch, place, part in sequences:
        parts[corpus, epoch, place].add(part)
    for block, found in parts.items():
        missing = set(range(expected.sequences_per_block)) ^ found
        if missing:
            yield (
                f"rehearsed step {step}: no rank reads part {min(missing)} of block (corpus, "
                f"epoch, block) = {block}"
            )


def whole_groups(views: Views, kind: str) -> list[list[RankView]]:
    """The views of each of Megatron's groups of that kind that is there whole, in group order."""
    of_rank = {view.rank: view for view in views}
    members = dict.fromkeys(view.groups.get(kind, ()) for view in views)
    return [
        [of_rank[rank] for rank in group]
        for group in members
        if group and all(rank in of_rank for rank in group)
    ]


def ranks_of(views: Views) -> str:
    return show([view.rank for view in views])


def show(numbers: Sequence[int]) -> str:
    """A list of numbers, the middle of a long one left out."""
    if not numbers:
        return "nothing"
    if len(numbers) > 8:
        return f"{show(numbers[:4])} … {show(numbers[-2:])} ({len(numbers)} in all)"
    return ", ".join(map(str, numbers))


def check_memory(views: Views, expected: Expected) -> Iterator[str]:
    """No rank holds more weights, masters and moments than planned, all data-parallel ranks
    together hold as much, and a device has room for the planned peak."""
    peers: dict[tuple[int, int], list[int]] = defaultdict(list)
    for view in views:
        place = view.coordinates
        planned = _planned_state(expected.memory[place.pipeline])
        if view.state_bytes > STATE_MARGIN * planned + STATE_PADDING:
            yield (
                f"rank {view.rank}: holds {view.state_bytes:,} bytes of weights, masters and "
                f"moments, planned were {planned:,.0f}"
            )
        peers[place.tensor, place.pipeline].append(view.state_bytes)
    for (tensor, stage), held in peers.items():
        planned = _planned_state(expected.memory[stage]) * len(held)
        is_whole = len(held) == expected.layout.data
        if is_whole and sum(held) * STATE_MARGIN + STATE_PADDING * len(held) < planned:
            yield (
                f"tensor rank {tensor} of stage {stage}: all data-parallel ranks hold "
                f"{sum(held):,} bytes of weights, masters and moments, planned were {planned:,.0f}"
            )
    if expected.device_memory_gb is not None:
        for stage, memory in enumerate(expected.memory):
            if memory.total > expected.device_memory_gb * 1e9:
                yield (
                    f"stage {stage}: needs {memory.total / 1e9:.1f} GB, a device has "
                    f"{expected.device_memory_gb:g} GB; `distributed-lm plan` names what fits"
                )


def _planned_state(memory: Memory) -> float:
    return memory.weights + memory.masters + memory.moments


def _expected_groups(layout: Layout) -> list[dict[str, tuple[int, ...]]]:
    """By rank: the members of its groups, by kind."""
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    others: dict[str, Callable[[Coordinates], tuple[int, ...]]] = {
        "tensor": lambda place: (place.data, place.pipeline),
        "data": lambda place: (place.tensor, place.pipeline),
        "pipeline": lambda place: (place.tensor, place.data),
        "model": lambda place: (place.data,),
    }
    table: list[dict[str, tuple[int, ...]]] = [{} for _ in places]
    for kind, key in others.items():
        members: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for rank, place in enumerate(places):
            members[key(place)].append(rank)
        for group in map(tuple, members.values()):
            for rank in group:
                table[rank][kind] = group
    for rank, groups in enumerate(table):
        ends = tuple(dict.fromkeys((groups["pipeline"][0], groups["pipeline"][-1])))
        if rank in ends:
            groups["embedding"] = ends
    return table
