"""Have the ratios become worse than those on record? Ratios only: seconds are a machine's.

``baseline.json`` holds, by device and set of benchmarks, each ratio's value and how much of it may
be lost before it counts: what a noisy neighbour does to a ratio differs from ratio to ratio.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).parent / "baseline.json"
DEFAULT_TOLERANCE = 0.3
LIGHT_TOLERANCE = 0.6

Ratios = Mapping[str, float]
"""By ``BENCHMARK: NAME``; higher is better."""


class Verdict(str, Enum):
    held = "ok"
    worse = "REGRESSION"
    missing = "MISSING"
    unknown = "not on record"


@dataclass(frozen=True)
class Judgement:
    """What became of one ratio."""

    name: str
    verdict: Verdict
    measured: float | None = None
    baseline: float | None = None
    limit: float | None = None
    """The least that holds."""

    @property
    def is_bad(self) -> bool:
        return self.verdict in (Verdict.worse, Verdict.missing)


def compare(measured: Ratios, recorded: Mapping[str, Mapping[str, float]]) -> list[Judgement]:
    """Judge every ratio that was measured or should have been.

    Args:
        measured: of this run.
        recorded: by name, ``value`` and ``tolerance``, a share of the value.
    """
    judgements = []
    for name, record in recorded.items():
        limit = record["value"] * (1.0 - record["tolerance"])
        value = measured.get(name)
        verdict = Verdict.held
        if value is None:
            verdict = Verdict.missing
        elif not value >= limit:  # a NaN is no pass
            verdict = Verdict.worse
        judgements.append(Judgement(name, verdict, value, record["value"], limit))
    strangers = [name for name in measured if name not in recorded]
    return judgements + [Judgement(name, Verdict.unknown, measured[name]) for name in strangers]


def record(
    measured: Ratios, recorded: Mapping[str, Mapping[str, float]], tolerance: float
) -> dict[str, dict[str, float]]:
    """The baseline that this run would be: a ratio that was on record keeps its tolerance."""
    return {
        name: {
            "value": round(value, 4),
            "tolerance": recorded.get(name, {}).get("tolerance", tolerance),
        }
        for name, value in measured.items()
    }


def read_baseline(device: str, kind: str, path: Path = BASELINE) -> dict[str, dict[str, float]]:
    """What is on record for a device; nothing if it never was.

    Args:
        device: as the folders of results are named.
        kind: ``full`` or ``light``.
    """
    return _read(path).get(device, {}).get(kind, {})


def write_baseline(
    device: str, kind: str, values: dict[str, dict[str, float]], path: Path = BASELINE
) -> None:
    """Replace what is on record for one device and kind."""
    content = _read(path)
    content.setdefault(device, {})[kind] = values
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
