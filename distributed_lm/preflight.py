"""Everything that can be known to be wrong before the engines start: ``check`` and ``train`` ask.

Nothing on disk is changed, so a mistake here harms no run that is already there.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from distributed_lm import platform
from distributed_lm.checkpoint.folders import read_state, saved_steps
from distributed_lm.config import RunConfig
from distributed_lm.data.batches import evaluation_stream
from distributed_lm.data.corpora import Corpus, corpora_hash, open_corpora
from distributed_lm.errors import CheckpointError, ConfigError
from distributed_lm.evaluation.protocols import check_lengths
from distributed_lm.layout import Layout
from distributed_lm.planner.vocabulary import padded_vocab_size

# What makes a run that run: another value is another run. ``data.path`` may move, since the hash of
# its content is compared; anything not listed here may change from one start to the next.
IDENTITY = (
    "seed", "model", "data.sequence_length", "data.block_length", "batch.global_batch_size",
    "optimizer.kind",
)  # fmt: skip
# A checkpoint of step 0 is an imported model: its weights and its tokenizer bind, nothing else.
IMPORTED_IDENTITY = ("model",)


@dataclass(frozen=True)
class Preflight:
    """What was found on the way."""

    layout: Layout
    corpora: list[Corpus]
    vocab_size: int
    """Rows of the embedding."""
    stream: np.ndarray
    """Tokens to evaluate on."""

    @property
    def data_identity(self) -> dict[str, str]:
        """What a checkpoint must agree with to be continued or evaluated on this data."""
        return {
            "corpus_hash": corpora_hash(self.corpora),
            "tokenizer": self.corpora[0].manifest.tokenizer.fingerprint,
        }


def preflight(config: RunConfig, world_size: int) -> Preflight:
    """Check layout, precision, data, vocabulary, evaluation lengths and run folder.

    Raises:
        UserError: the first thing that would stop the run.
    """
    layout = Layout.of(config, world_size)
    platform.check_precision(config.precision)
    corpora = open_corpora(config)
    vocab_size = embedding_rows(config, corpora[0].manifest.vocab_size)
    stream = evaluation_stream(config)
    check_lengths(config, config.evaluation_lengths, len(stream) - 1)
    _check_writable(config.run_dir)
    found = Preflight(layout, corpora, vocab_size, stream)
    check_continues(config, found.data_identity)
    return found


def embedding_rows(config: RunConfig, data_vocab_size: int) -> int:
    """``padded_vocab_size``, if it can be divided over the tensor-parallel ranks.

    Raises:
        ConfigError: if not.
    """
    rows, tensor = padded_vocab_size(config.model, data_vocab_size), config.parallel.tensor
    if rows % tensor:
        raise ConfigError(
            f"model.vocab_size={rows} (padded) cannot be divided over "
            f"parallel.tensor={tensor}; set model.vocab_size={-(-rows // tensor) * tensor}"
        )
    return rows


def check_continues(config: RunConfig, data_identity: dict[str, str]) -> list[str]:
    """Compare the config with that of the newest checkpoint in the run folder.

    Returns:
        What has changed and may, as ``field: old -> new``.

    Raises:
        ConfigError: if it is another run, or ``checkpoint.resume`` is off.
    """
    steps = saved_steps(config.run_dir)
    if not steps:
        return []
    if not config.checkpoint.resume:
        raise ConfigError(
            f"{config.run_dir} already holds a run at step {steps[-1]} and "
            "checkpoint.resume=false; choose another name, or remove the folder"
        )
    saved = _newest_readable_state(config.run_dir, steps)
    if saved is None:  # loading will say which files are damaged
        return []
    is_imported = steps[-1] == 0
    identity = IMPORTED_IDENTITY if is_imported else IDENTITY
    other = "; choose another name, or go back to the saved value"
    for name, value in data_identity.items():
        if saved["data"][name] != value and not (is_imported and name == "corpus_hash"):
            raise ConfigError(
                f"data.path: {name} {value[:12]}, but {config.run_dir} was trained with "
                f"{saved['data'][name][:12]}{other}"
            )
    changes = differences(_with_defaults(saved["config"]), config.model_dump(mode="json"))
    for field, (old, new) in changes.items():
        if any(field == fixed or field.startswith(fixed + ".") for fixed in identity):
            raise ConfigError(
                f"{field}={new}, but {config.run_dir} holds a run with {field}={old}{other}"
            )
    if is_imported:  # all of its training is still to be chosen
        return []
    return [f"{field}: {old} -> {new}" for field, (old, new) in changes.items()]


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config, of a program that had fewer fields, says what it did without them."""
    try:
        return RunConfig.model_validate(saved).model_dump(mode="json")
    except pydantic.ValidationError:
        return saved


def _newest_readable_state(run_dir: Path, steps: list[int]) -> dict[str, Any] | None:
    for step in reversed(steps):
        try:
            return read_state(run_dir, step)
        except CheckpointError:
            continue
    return None


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the values that differ, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        name = f"{prefix}.{key}" if prefix else key
        found |= differences(old.get(key), new.get(key), name)
    return found


def _check_writable(folder: Path) -> None:
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"output_dir: {existing} is a file; choose a folder")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir: {existing} cannot be written; choose another folder")
