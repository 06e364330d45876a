"""What a study decides between tuning and training: each arm's learning rate, and how many steps
an arm gets that is given another's time. No torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distributed_lm.study.schema import Study

CHOICE = "choice.json"


@dataclass(frozen=True)
class Tuned:
    """How an arm's learning rate was chosen."""

    rate: float
    """At the study's full size."""
    losses: dict[str, float | None]
    """Validation loss of the proxy by its learning rate; None = it diverged."""
    at_edge: bool
    """Whether the best is the smallest or the largest that was tried."""


@dataclass(frozen=True)
class Choice:
    """``STUDY/choice.json``."""

    tuned: dict[str, Tuned] = field(default_factory=dict)
    """By arm."""
    steps: dict[str, int] = field(default_factory=dict)
    """``train.steps`` of the arms that are given another's time."""
    time_ratios: dict[str, float] = field(default_factory=dict)
    """``SHORT/LONG``: an update's time of one arm over another's."""

    def missing(self, study: Study) -> list[str]:
        """What the study needs and this does not say."""
        rates = study.full_arms if study.tuning is not None else ()
        return [
            *(f"the learning rate of {arm.name}" for arm in rates if arm.name not in self.tuned),
            *(
                f"the steps of {arm.name}"
                for arm in study.arms
                if arm.time_of is not None and arm.name not in self.steps
            ),
            *(
                f"the time of {short} over that of {long}"
                for short, long in study.time_pairs
                if f"{short}/{long}" not in self.time_ratios
            ),
        ]

    def rate(self, arm: str) -> float | None:
        """The arm's learning rate; None = the base config's."""
        return self.tuned[arm].rate if arm in self.tuned else None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        (folder / CHOICE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Choice:
        """The choice that was made; an empty one before that."""
        path = folder / CHOICE
        if not path.exists():
            return cls()
        values = json.loads(path.read_text(encoding="utf-8"))
        tuned = {arm: Tuned(**values) for arm, values in values.pop("tuned").items()}
        return cls(tuned=tuned, **values)


def best_rate(losses: dict[float, float], factor: float) -> Tuned:
    """The learning rate with the lowest loss, carried to full size.

    Args:
        losses: nats per token by the proxy's learning rate; not finite = it diverged.
        factor: full-size rate over proxy rate.

    Raises:
        ValueError: if every run diverged.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("every learning rate diverged")
    best = min(finite, key=lambda rate: (finite[rate], rate))
    return Tuned(
        rate=best * factor,
        losses={f"{rate:g}": finite.get(rate) for rate in sorted(losses)},
        at_edge=len(losses) > 1 and best in (min(losses), max(losses)),
    )
