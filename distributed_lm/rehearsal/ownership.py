"""Who owns which weights, and who writes which part of a checkpoint: everything once."""

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from distributed_lm.planner.parameters import total_parameters
from distributed_lm.rehearsal.checks import Expected, Views, whole_groups
from distributed_lm.rehearsal.coverage import Fault, first_fault
from distributed_lm.rehearsal.views import RankView, Weight, bounds

MASTER = "optimizer.master"


def check_weights(views: Views, expected: Expected) -> Iterator[str]:
    """A replica of the model holds every global tensor once, and data-parallel ranks hold the same.

    Tied copies and what every tensor-parallel rank has do not count twice.
    """
    first_at: dict[tuple[int, int], RankView] = {}
    for view in views:
        place = (view.coordinates.tensor, view.coordinates.pipeline)
        first = first_at.setdefault(place, view)
        if view.weights != first.weights:
            yield (
                f"ranks {first.rank} and {view.rank}: hold different weights"
                f"{_difference(first, view)}, though they are data-parallel copies"
            )
    for group in whole_groups(views, "tensor"):
        yield from _replicated_problems(group)
    for replica in whole_groups(views, "model")[:1]:  # the others hold the same
        yield from _replica_problems(replica, expected)


def _difference(first: RankView, second: RankView) -> str:
    only = sorted({w.name for w in first.weights} ^ {w.name for w in second.weights})
    return f" ({only[0]} is on one of them only)" if only else ""


def _replicated_problems(group: Views) -> Iterator[str]:
    """Of what is not split over a tensor-parallel group."""
    first, *rest = group
    ours = {weight.name: weight for weight in first.weights if not weight.is_sharded}
    for view in rest:
        theirs = {weight.name: weight for weight in view.weights if not weight.is_sharded}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                yield (
                    f"ranks {first.rank} and {view.rank}: {name} should be the same on every "
                    "tensor-parallel rank, and is not"
                )


def _replica_problems(replica: Views, expected: Expected) -> Iterator[str]:
    owned: dict[str, list[tuple[RankView, Weight]]] = defaultdict(list)
    copies: list[tuple[RankView, Weight]] = []
    for view in replica:
        for weight in view.weights:
            if weight.is_tied_copy:
                copies.append((view, weight))
            elif weight.is_sharded or view.coordinates.tensor == 0:
                owned[weight.name].append((view, weight))
    elements = 0
    for name, holders in owned.items():
        shape = holders[0][1].global_shape
        elements += math.prod(shape)
        rectangles = np.array([bounds(weight.offset, weight.shape) for _, weight in holders])
        fault = first_fault(shape, rectangles, whole=True)
        if fault is not None:
            yield _sentence(name, shape, fault, [view.rank for view, _ in holders], "hold")
    for view, weight in copies:
        originals = owned.get(weight.name)
        if not originals or originals[0][1].global_shape != weight.global_shape:
            yield f"rank {view.rank}: has a copy of {weight.name}, which no rank owns in that shape"
    planned = total_parameters(expected.model, expected.vocab_size)
    if elements != planned:
        yield (
            f"the replica of ranks {replica[0].rank} … {replica[-1].rank}: owns {elements:,} "
            f"parameters, the planner counts {planned:,}"
        )


def check_checkpoint(views: Views, expected: Expected) -> Iterator[str]:
    """What all ranks write into a checkpoint is every tensor of weights, masters and moments, each
    element once. Of some ranks alone: nothing twice."""
    whole = len(views) == expected.layout.world_size
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for view in views:
        saved = view.saved
        for index, (key, shape) in enumerate(zip(saved.keys, saved.global_shapes, strict=True)):
            if shapes.setdefault(key, shape) != shape:
                yield f"rank {view.rank}: writes {key} as {shape}, other ranks as {shapes[key]}"
            parts[key].append((view.rank, saved.bounds[saved.tensor == index]))
    cached = lru_cache(maxsize=64)(_first_fault_of_bytes)
    for key, pieces in parts.items():
        rectangles = np.concatenate([piece for _, piece in pieces])
        fault = cached(shapes[key], rectangles.tobytes(), whole)
        if fault is not None:
            ranks = [rank for rank, piece in pieces for _ in piece]
            yield _sentence(key, shapes[key], fault, ranks, "write")
    names = {weight.name for view in views for weight in view.weights}
    kinds = ("model", MASTER, *(f"optimizer.{moment}" for moment in expected.moments))
    wanted = {f"{kind}.{name}" for kind in kinds for name in names}
    for key in sorted(wanted - parts.keys()) if whole else ():
        yield f"no rank writes {key}"
    for key in sorted(key for key in parts.keys() - wanted if not key.startswith("random.")):
        yield f"rank {parts[key][0][0]}: writes {key}, which no rank's model has"


def _first_fault_of_bytes(shape: tuple[int, ...], rectangles: bytes, whole: bool) -> Fault | None:
    """Weights, masters and moments, and often all layers, are cut alike: looked at once."""
    return first_fault(shape, np.frombuffer(rectangles, np.int64).reshape(-1, 4), whole=whole)


def _sentence(name: str, shape: tuple[int, ...], fault: Fault, ranks: list[int], verb: str) -> str:
    where = f"{name} {list(shape)}, row {fault.row}, column {fault.column}"
    if fault.times == 0:
        return f"{where}: ranks {min(ranks)} … {max(ranks)} {verb} parts of this tensor, not this"
    involved = " and ".join(str(ranks[index]) for index in fault.indices)
    if fault.times == 1:
        return f"{where}: what rank {involved} would {verb} from there lies outside the tensor"
    return f"{where}: ranks {involved} {verb} it, expected one of them"
