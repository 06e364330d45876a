"""Where a run's numbers go: ``metrics.jsonl`` (the record of truth), the terminal, and W&B."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distributed_lm.config import RunConfig
from distributed_lm.tracking.console import Console
from distributed_lm.tracking.metrics_file import MetricsFile
from distributed_lm.tracking.online import start_wandb_run


class Tracker(Protocol):
    """Takes one record at a time. ``kind`` is ``train``, ``evaluation`` or ``event``."""

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Record ``values``, which have a ``step`` (optimizer steps done so far)."""

    def finish(self, exit_code: int = 0) -> None:
        """Close everything; ``exit_code`` tells W&B whether the run failed. Idempotent."""


class NullTracker:
    """For the ranks that do not report."""

    def log(self, kind: str, values: Mapping[str, Any]) -> None: ...

    def finish(self, exit_code: int = 0) -> None: ...


class Trackers:
    """Hands every record to several trackers, in order."""

    def __init__(self, members: Sequence[Tracker]) -> None:
        self._members = members

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        for member in self._members:
            member.log(kind, values)

    def finish(self, exit_code: int = 0) -> None:
        for member in self._members:
            member.finish(exit_code)


def open_tracker(
    config: RunConfig, details: Mapping[str, Any], resumed_at_step: int, enabled: bool
) -> Tracker:
    """The tracker of one process.

    Args:
        details: what W&B shows beside the config: layout, ALiBi fingerprint, versions.
        resumed_at_step: optimizer steps that the loaded checkpoint has behind it; 0 = none.
        enabled: whether this process reports; true on one rank only.

    Raises:
        ConfigError: if the run folder cannot be written.
    """
    if not enabled:
        return NullTracker()
    # First the record of truth: if it cannot be opened, nothing else should be.
    metrics = MetricsFile(config.run_dir / "metrics.jsonl", resumed_at_step)
    console = Console(total_steps=config.train.steps)
    members: list[Tracker] = [metrics, console]
    wandb_run = start_wandb_run(config, details, say=console.say)
    if wandb_run is not None:
        members.append(wandb_run)
    return Trackers(members)
