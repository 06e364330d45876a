"""Slurm's host lists: ``node[01-03,7],gpu-b`` as names. Compute nodes often lack ``scontrol``."""

from __future__ import annotations

import re

PIECE = re.compile(r"\[([^\]]*)\]|([^\[\]]+)")


def expand(text: str) -> list[str]:
    """The names in a host list, in its order.

    Raises:
        ValueError: if it is not one.
    """
    return [name for part in _split(text) for name in _expand_one(part)]


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += {"[": 1, "]": -1}.get(character, 0)
        if depth not in (0, 1):
            raise ValueError(f"host list {text!r}: brackets do not match")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if depth:
        raise ValueError(f"host list {text!r}: brackets do not match")
    parts.append(text[start:])
    return [part for part in parts if part]


def _expand_one(part: str) -> list[str]:
    """One name with any number of bracketed ranges; the last one varies fastest."""
    names = [""]
    for piece in PIECE.finditer(part):
        ranges, plain = piece.groups()
        endings = [plain] if ranges is None else _expand_ranges(ranges)
        names = [name + ending for name in names for ending in endings]
    return names


def _expand_ranges(ranges: str) -> list[str]:
    endings = []
    for item in ranges.split(","):
        first, dash, last = item.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"host list: {item!r} is not a number or a range of numbers")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise ValueError(f"host list: {item!r} runs backwards")
        endings += [str(number).zfill(len(first)) for number in range(int(first), stop + 1)]
    return endings
