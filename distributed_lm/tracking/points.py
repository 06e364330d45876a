"""What W&B is sent of a run: the points of ``metrics.jsonl``, each once, whatever the run repeats.

A point is what one record measures: the training step, or the evaluation at a step on a split at a
length. Where a crash or a rewind makes the run do steps again, their records come again; the point
is the same. An event is a point of its own each time it happens. Points are numbered in the order
in which the file first mentions them, so a point's number never changes while the file grows, and
"how many has W&B got" says all that is needed to go on: no point is lost, none is sent twice. The
number is W&B's own step, which can only rise; the curves are drawn over ``step``, ours.

A point that is repeated before it was sent is sent as the newest record has it; one that was sent
stays as it was, since W&B's history cannot be changed. ``metrics.jsonl`` has both.
"""

import numbers
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distributed_lm.tracking.metrics_file import decode

Row = dict[str, Any]

# What a start event says about the run's life itself; the rest of it describes the run.
LIFE_FIELDS = ("job", "restart", "attempt", "nodes")
EVENT_FIELDS = ("kind", "time", "event", "step", "message")


class Points:
    """Reads a ``metrics.jsonl`` that may be growing, and numbers its points.

    Args:
        path: the file; it need not exist yet.
        sent: how many points W&B has.
    """

    def __init__(self, path: Path, sent: int = 0) -> None:
        self.sent = sent
        """Points that were taken, here or before."""
        self.total = 0
        """Points in the file, as far as it was read."""
        self.last_step = 0
        """Of the last train record."""
        self.last_record: Row = {}
        self.data_digest: str | None = None
        self.starts: list[Row] = []
        """The event that begins each life of the run."""
        self._path = path
        self._offset = 0
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._waiting: dict[int, Row] = {}

    def read(self) -> None:
        """Take in the whole lines that the file has got since the last call."""
        for record in self._new_records():
            self._take_in(record)

    def take(self) -> Iterator[tuple[int, Row]]:
        """The points to send, with their numbers: once each, in order."""
        while self.sent in self._waiting:
            yield self.sent, self._waiting.pop(self.sent)
            self.sent += 1

    def are_all(self, steps: int) -> bool:
        """Whether the run has done as many steps, and was not stopped on its last evaluation."""
        return self.last_step >= steps and self.last_record.get("event") != "stop"

    @property
    def lives(self) -> list[Row]:
        """Slurm job, restarts and nodes of every life that says so, and the step it began at."""
        return [
            {name: start[name] for name in ("step", *LIFE_FIELDS) if name in start}
            for start in self.starts
            if "job" in start
        ]

    @property
    def details(self) -> Row:
        """What the newest life says about the run beside the config: layout, versions."""
        newest = self.starts[-1] if self.starts else {}
        known = (*EVENT_FIELDS, *LIFE_FIELDS)
        return {name: value for name, value in newest.items() if name not in known}

    def _take_in(self, record: Row) -> None:
        identity = identify(record)
        number = self.total if identity is None else self._numbers.setdefault(identity, self.total)
        if number == self.total:
            self.total += 1
        if number >= self.sent:
            self._waiting[number] = as_row(record)
        self.last_record = record
        if record["kind"] == "train":
            self.last_step = record["step"]
            self.data_digest = record.get("data_digest")
        if record.get("event") == "start":
            self.starts.append(record)

    def _new_records(self) -> Iterator[Row]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return
        for index, line in enumerate(lines):
            record = _record_or_none(line)
            # A network file system may show zeros where a page is on its way, so wait; a later
            # life tells that nothing is: the page was lost with its node.
            if record is None and not any(map(_begins_a_life, lines[index + 1 :])):
                return
            self._offset += len(line) + 1
            if record is not None:
                yield record


def identify(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a record measures; None for an event, which is itself each time."""
    if record["kind"] == "event":
        return None
    axes = ("split", "length", "protocol") if record["kind"] == "evaluation" else ()
    return (record["kind"], record["step"], *(record[axis] for axis in axes))


def as_row(record: Mapping[str, Any]) -> Row:
    """A record as a row of W&B's history, with the time at which it was written."""
    values = {name: value for name, value in record.items() if name not in ("kind", "time")}
    row = {"step": record.get("step", 0), **wandb_metrics(record["kind"], values)}
    return row | ({"_timestamp": record["time"]} if "time" in record else {})


def wandb_metrics(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A record under W&B names: ``train/loss``, ``evaluation/valid/L128/loss``, ``event/resume``.

    Only numbers go there; the rest is in ``metrics.jsonl``.
    """
    if kind == "event":
        return {f"event/{values['event']}": 1}
    prefix, axes = kind, {"step"}
    if kind == "evaluation":
        prefix = f"evaluation/{values['split']}/L{values['length']}"
        axes |= {"length"}
        if values["protocol"] != "nonoverlapping":
            prefix += f"/{values['protocol']}"
    return {
        f"{prefix}/{name}": value
        for name, value in values.items()
        if name not in axes and isinstance(value, numbers.Real)
    }


def _record_or_none(line: bytes) -> Row | None:
    try:
        return decode(line)
    except ValueError:
        return None


def _begins_a_life(line: bytes) -> bool:
    return (_record_or_none(line) or {}).get("event") == "resume"
