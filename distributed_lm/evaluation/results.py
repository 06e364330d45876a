"""Results of evaluations: ``RUN/evaluation/*.json``, one file per result, and reading them again.

Beside each lies an ``.npz`` with the arrays ``nats`` and ``tokens`` [documents]: the sums of each
document of the scored stream, in its order, whether scored or not. It is the same partition for
every protocol, length and run with the same ``data_digest``, so differences can be paired.

Imports no torch.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from distributed_lm.errors import DataError

SCHEMA_VERSION = 1
FOLDER = "evaluation"

# What must be equal for a result to be the same measurement of the same thing.
IDENTITY = (
    "step", "checkpoint", "precision", "split", "data_digest", "tokenizer", "targets", "protocol",
    "stride", "length",
)  # fmt: skip
# Not-a-number or infinite is null in JSON.
_FLOATS = ("nats", "loss", "perplexity", "word_perplexity", "bits_per_byte", "seconds")


@dataclass(frozen=True)
class Result:
    """One number with what is needed to compare it."""

    run: str
    step: int
    checkpoint: str | None
    """SHA-256 of the checkpoint's ``manifest.json``; None for the evaluation that ends a training,
    which comes before its checkpoint is written."""
    position: str
    """Position method."""
    trained_length: int
    """In tokens."""
    precision: str
    split: str
    corpus_hash: str
    """Identity of the training tokens."""
    data_digest: str
    """Identity of the scored stream and its documents."""
    tokenizer: str
    """Fingerprint."""
    protocol: str
    """``nonoverlapping``, ``sliding``, ``documents`` or ``context``."""
    stride: int
    """Tokens between windows; the length for ``nonoverlapping``."""
    length: int
    """Context length in tokens; the exact context of every target for ``context``."""
    targets: str
    """Which tokens were scored: ``all`` but the first, or how they were chosen."""
    tokens_scored: int = 0
    nats: float = math.nan
    """Summed over the scored tokens."""
    loss: float = math.nan
    """Nats per token; not-a-number for a gap."""
    perplexity: float = math.nan
    """exp(loss)."""
    interval: tuple[float, float] = (math.nan, math.nan)
    """95% bootstrap interval of ``loss`` over documents; not-a-number with fewer than two."""
    words: int | None = None
    """White-space words and one end-of-line token per line; None for a sample of tokens."""
    word_perplexity: float = math.nan
    """exp(nats / words)."""
    bytes: int | None = None
    """UTF-8 bytes that the scored tokens stand for; None for a sample of tokens."""
    bits_per_byte: float = math.nan
    """nats / (bytes · ln 2)."""
    by_position: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """``edges`` of bins over tokens of context, half open, and ``nats`` and ``tokens`` of each;
    empty for ``context`` and for a gap."""
    documents: Path | None = None
    """The ``.npz`` file."""
    gap: str | None = None
    """Why the model could not be scored at this length; no numbers then."""
    seconds: float = math.nan
    peak_memory_bytes: int = 0
    """Largest over the ranks: allocated on the GPU since the length began, or resident on a CPU
    since the process began."""
    layout: str = ""
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def file_stem(self) -> str:
        """Differs for anything that makes it another measurement."""
        strided = self.protocol in ("sliding", "documents")
        protocol = f"{self.protocol}-{self.stride}" if strided else self.protocol
        if self.targets != "all":
            protocol += f"_{self.targets}"
        scored = "gap" if self.gap else f"{self.tokens_scored}tokens"
        return (
            f"step_{self.step:08d}_{self.split}_{self.data_digest[:8]}_{scored}_{self.precision}_"
            f"{protocol}_{self.length}"
        )

    def is_of(self, other: "Result") -> bool:
        """Whether both are the same measurement of the same checkpoint on the same tokens."""
        return all(getattr(self, name) == getattr(other, name) for name in IDENTITY)

    def document_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Nats and tokens of each document of the stream, fp64 [documents].

        Raises:
            DataError: if it is a gap, or the file is missing or damaged.
        """
        if self.documents is None:
            raise DataError(f"{self.file_stem}: a gap ({self.gap}) has no documents' sums")
        try:
            with np.load(self.documents, allow_pickle=False) as arrays:
                return arrays["nats"], arrays["tokens"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(
                f"{self.documents}: cannot be read ({error}); evaluate again with --force"
            ) from None


def write_result(
    run_dir: Path, result: Result, documents: tuple[np.ndarray, np.ndarray] | None
) -> Result:
    """Write a result so that it is there whole or not at all; an older one of the same name goes.

    Args:
        documents: nats and tokens of each document; None for a gap.

    Returns:
        The result with its ``documents``.
    """
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if documents is not None:
        arrays = folder / f"{result.file_stem}.npz"
        temporary = folder / f".{result.file_stem}.npz.tmp"
        with temporary.open("wb") as file:
            np.savez_compressed(file, nats=documents[0], tokens=documents[1])
        os.replace(temporary, arrays)
        result = dataclasses.replace(result, documents=arrays)
    temporary = folder / f".{result.file_stem}.json.tmp"
    temporary.write_text(json.dumps(_to_json(result), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / f"{result.file_stem}.json")
    return result


def read_results(run_dir: Path) -> list[Result]:
    """All results of a run, by step, protocol, stride and length.

    Raises:
        DataError: naming a file that is damaged or of another version of this program.
    """
    paths = [path for path in (run_dir / FOLDER).glob("*.json") if not path.name.startswith(".")]
    results = [_read(path) for path in paths]
    return sorted(results, key=lambda r: (r.step, r.protocol, r.targets, r.stride, r.length))


def _read(path: Path) -> Result:
    remedy = "remove it and evaluate again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("schema_version", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); {remedy}") from None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version is {version}, this program reads {SCHEMA_VERSION}; {remedy}"
        )
    try:
        return _from_json(values, path.parent)
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); {remedy}") from None


def _to_json(result: Result) -> dict[str, Any]:
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    for name in _FLOATS:
        values[name] = values[name] if math.isfinite(values[name]) else None
    values["interval"] = [end if math.isfinite(end) else None for end in result.interval]
    values["documents"] = result.documents.name if result.documents else None
    return {"schema_version": SCHEMA_VERSION, **values}


def _from_json(values: dict[str, Any], folder: Path) -> Result:
    for name in _FLOATS:
        values[name] = math.nan if values[name] is None else float(values[name])
    low, high = values["interval"]
    values["interval"] = (
        math.nan if low is None else float(low),
        math.nan if high is None else float(high),
    )
    if math.isfinite(values["loss"]):
        values["perplexity"] = exp(values["loss"])  # null where it is infinite
    values["documents"] = folder / values["documents"] if values["documents"] else None
    return Result(**values)


def exp(nats: float) -> float:
    """``math.exp`` that says infinity where there is no such number."""
    return math.exp(nats) if nats < 700.0 else math.inf
