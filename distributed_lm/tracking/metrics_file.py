"""``metrics.jsonl``: one JSON object per line, whole lines only, whatever kills the run."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distributed_lm.errors import ConfigError
from distributed_lm.tracking.patient_file import PatientFile

REPAIR_BLOCK_BYTES = 1 << 16


class MetricsFile:
    """Appends records to a file that earlier lives of the run may have begun.

    A resumed run leaves the lines of steps it will do again and marks the rewind with an event,
    so a reader takes the last line of each step.

    Raises:
        ConfigError: if the file cannot be opened for writing.
    """

    def __init__(self, path: Path, resumed_at_step: int = 0) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            repair_last_line(path)
            self._file = PatientFile(path)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror}); "
                "set output_dir to a folder that can be"
            ) from None
        if resumed_at_step > 0 or path.stat().st_size > 0:
            message = f"continues after step {resumed_at_step}"
            self.log("event", {"event": "resume", "step": resumed_at_step, "message": message})

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append one line; on a disk in trouble, later."""
        self._file.write((encode({"kind": kind, "time": time.time(), **values}) + "\n").encode())

    def finish(self, exit_code: int = 0) -> None:
        self._file.close()


def encode(record: Mapping[str, Any]) -> str:
    """A record as one line of valid JSON.

    JSON has no NaN or infinity: such a value becomes null, and ``NAME_text`` beside it says which.
    """
    plain: dict[str, Any] = {}
    for name, value in record.items():
        plain[name] = _plain(value)
        if plain[name] is None and value is not None:
            plain[f"{name}_text"] = str(float(value))
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def decode(line: str | bytes) -> dict[str, Any]:
    """The record of a line that ``encode`` made, with its NaNs and infinities.

    Raises:
        ValueError: if the line is no record.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or "kind" not in record:
        raise ValueError(f"not a record: {line!r}")
    for name in [name for name, value in record.items() if value is None]:
        if f"{name}_text" in record:
            record[name] = float(record.pop(f"{name}_text"))
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, of all lives; none if there is no file."""
    try:
        return parse_records(path.read_bytes())
    except FileNotFoundError:
        return []


def parse_records(content: bytes) -> list[dict[str, Any]]:
    """The records in a piece of a file; what a kill has torn is left out."""
    records = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            records.append(decode(line))
    return records


def repair_last_line(path: Path) -> None:
    """Make a file end with a whole line: complete the last one if it only lacks its end, else
    cut it off."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        torn = _after_last_newline(file)
        if not torn:
            return
        try:
            json.loads(torn)
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        except ValueError:
            file.truncate(file.seek(0, os.SEEK_END) - len(torn))


def _after_last_newline(file: Any) -> bytes:
    tail = b""
    position = file.seek(0, os.SEEK_END)
    while position > 0 and b"\n" not in tail:
        size = min(REPAIR_BLOCK_BYTES, position)
        position -= size
        file.seek(position)
        tail = file.read(size) + tail
    return tail.rpartition(b"\n")[2]


def _plain(value: Any) -> Any:
    """What JSON can hold of a value; None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
