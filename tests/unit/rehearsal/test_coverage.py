"""Rectangles that tile a tensor, and those that do not, against counting every element."""

import random

import numpy as np
import pytest

from distributed_lm.rehearsal.coverage import Fault, first_fault
from distributed_lm.rehearsal.views import bounds


def rectangles(*values: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(values, dtype=np.int64).reshape(-1, 4)


# A 4×6 matrix in the three kinds of parts that a flat cut makes.
TILED = rectangles((0, 1, 0, 6), (1, 2, 0, 2), (1, 2, 2, 6), (2, 4, 0, 6))


def test_a_tiling_has_no_fault() -> None:
    assert first_fault((4, 6), TILED, whole=True) is None


def test_a_gap_is_a_fault_of_the_whole_only() -> None:
    some = np.delete(TILED, 1, axis=0)
    assert first_fault((4, 6), some, whole=True) == Fault(1, 0, 0, ())
    assert first_fault((4, 6), some, whole=False) is None


def test_an_overlap_names_all_that_cover_it() -> None:
    double = np.append(TILED, rectangles((1, 3, 4, 5)), axis=0)
    assert first_fault((4, 6), double, whole=False) == Fault(1, 4, 2, (2, 4))


@pytest.mark.parametrize("outside", [(3, 5, 0, 6), (0, 1, 5, 7), (-1, 1, 0, 6)])
def test_what_lies_outside_is_named(outside: tuple[int, int, int, int]) -> None:
    fault = first_fault((4, 6), rectangles((0, 1, 0, 6), outside), whole=False)
    assert fault is not None
    assert fault.indices == (1,)


def test_nothing_at_all_is_a_gap() -> None:
    assert first_fault((4,), rectangles(), whole=True) == Fault(0, 0, 0, ())


def test_a_vector_is_one_column() -> None:
    assert bounds((3,), (2,)) == (3, 5, 0, 1)
    assert first_fault((5,), rectangles(bounds((0,), (3,)), bounds((3,), (2,))), whole=True) is None


@pytest.mark.parametrize("seed", range(30))
def test_against_counting(seed: int) -> None:
    chance = random.Random(seed)
    shape = (chance.randint(1, 9), chance.randint(1, 9))
    found = []
    for _ in range(chance.randint(1, 5)):
        top, left = chance.randrange(shape[0]), chance.randrange(shape[1])
        found.append((top, chance.randint(top + 1, shape[0]),
                      left, chance.randint(left + 1, shape[1])))  # fmt: skip
    counts = np.zeros(shape, dtype=int)
    for top, bottom, left, right in found:
        counts[top:bottom, left:right] += 1
    for whole in (True, False):
        wrong = np.argwhere(counts != 1 if whole else counts > 1)
        fault = first_fault(shape, rectangles(*found), whole=whole)
        assert (fault is None) == (len(wrong) == 0)
        if fault is not None:
            assert [fault.row, fault.column] == wrong[0].tolist()
            assert fault.times == counts[fault.row, fault.column] == len(fault.indices)
