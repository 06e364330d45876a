"""The plan of a data set being prepared: what all jobs on it agree on, and its working folder."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_lm.data.corpus import Skipped, read_all
from distributed_lm.data.inputs import Piece, Shard
from distributed_lm.data.locks import lock_file
from distributed_lm.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WORK_SUFFIX,
    NonNegative,
    Record,
    TokenizerRecord,
    parse_record,
    read_manifest,
)
from distributed_lm.data.shards import Recipe, choose_split, shard_key, writable, write_durably
from distributed_lm.data.tokenizer import TOKENIZER_FILE, Tokenizer, open_tokenizer, train_bpe
from distributed_lm.data.words import train_words
from distributed_lm.errors import DataError

PLAN = "plan.json"
# Text that a BPE is trained on: beyond this the vocabulary hardly changes, and the trainer's
# memory grows with it.
_BPE_TRAINING_BYTES = 200_000_000


class Plan(Record):
    """``plan.json`` in the working folder."""

    format_version: int = FORMAT_VERSION
    settings: dict[str, Any]
    """As in the manifest: the user's choices and the identity of the inputs."""
    shard_megabytes: float
    shard_keys: tuple[str, ...]
    """Key of each shard in order (``shards.shard_key``): tells a stale shard from a right one."""
    tokenizer: TokenizerRecord
    vocab_size: NonNegative
    end_of_document: NonNegative


@dataclass(frozen=True)
class Request:
    """What the user asked ``prepare-data`` for, resolved."""

    recipe: Recipe
    shards: Sequence[Shard]
    shard_megabytes: float
    settings: dict[str, Any]
    """As in the manifest."""
    tokenizer_kind: str
    tokenizer_argument: int | Path | None
    """Vocabulary size of a BPE to train, or a ``tokenizer.json`` to copy."""
    end_of_document: str | None


def work_folder(output: Path) -> Path:
    """Where ``--output``'s shards lie until it is published; on the same file system."""
    return output.with_name(output.name + WORK_SUFFIX)


def read_plan(folder: Path) -> Plan:
    """The plan in a working folder.

    Raises:
        DataError: if there is none or it is damaged.
    """
    path = folder / PLAN
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"{folder}: holds no shards ({PLAN} is missing); make some with "
            "'distributed-lm prepare-data … --shard I/N'"
        ) from None
    return parse_record(Plan, path, text, "remove the folder and prepare its shards again")


def inputs_identity(pieces: Sequence[Piece]) -> dict[str, object]:
    """Names and sizes of the inputs, however they were cut; a hash instead of a million names."""
    sizes: dict[str, int] = {}
    for piece in pieces:
        sizes[piece.name] = sizes.get(piece.name, 0) + piece.size
    listing = json.dumps([sorted(sizes.items()), sorted({(p.config, p.hub_split) for p in pieces})])
    return {
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "names_sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }


def is_prepared(output: Path, settings: dict[str, Any]) -> bool:
    """Whether ``output`` is already the data set asked for.

    Raises:
        DataError: if it is another one, or damaged.
    """
    if not (output / MANIFEST).exists():
        return False
    found = read_manifest(output).settings
    if found != settings:
        raise DataError(
            f"--output {output}: holds a data set made with other settings "
            f"({difference('settings', found, settings)}); give another folder or remove it"
        )
    return True


def difference(field: str, ours: Any, theirs: Any) -> str:
    """The first setting that differs, as 'seed is 1 there and 2 here'."""
    if isinstance(ours, Record) and isinstance(theirs, Record):
        ours, theirs = ours.model_dump(), theirs.model_dump()
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                return difference(key, ours.get(key), theirs.get(key))
    return f"{field} is {ours} there and {theirs} here"


def claim_work_folder(work: Path, request: Request) -> Plan:
    """Write the plan and the tokenizer into ``work``, or find them there from another job.

    Raises:
        DataError: if ``work`` was begun with other settings, or cannot be written.
    """
    with writable(work):
        work.mkdir(parents=True, exist_ok=True)
        with lock_file(work / ".lock"):
            earlier = read_plan(work) if (work / PLAN).exists() else None
            if earlier is not None:
                _refuse_other_settings(work, earlier, request)
            retrain = earlier is None or earlier.settings != request.settings
            plan = _plan(request, _provide_tokenizer(work / TOKENIZER_FILE, request, retrain))
            if plan != earlier:
                _replace(work / PLAN, plan.model_dump_json(indent=2))
    return plan


def _provide_tokenizer(file: Path, request: Request, retrain: bool) -> Tokenizer:
    """Copy or train the tokenizer into ``file``, if its kind has one, and open it."""
    if isinstance(request.tokenizer_argument, Path):
        _replace(file, request.tokenizer_argument.read_text(encoding="utf-8"))
    elif request.tokenizer_kind in ("bpe", "words") and (retrain or not file.exists()):
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        if isinstance(request.tokenizer_argument, int):
            train_bpe(
                _training_texts(request, _BPE_TRAINING_BYTES), request.tokenizer_argument, temporary
            )
        else:
            train_words(_training_texts(request), temporary)
        os.replace(temporary, file)
    return open_tokenizer(request.tokenizer_kind, file, request.end_of_document)


def _plan(request: Request, tokenizer: Tokenizer) -> Plan:
    fingerprint = tokenizer.record.fingerprint
    keys = (shard_key(shard, request.recipe, fingerprint) for shard in request.shards)
    return Plan(
        settings=request.settings,
        shard_megabytes=request.shard_megabytes,
        shard_keys=tuple(keys),
        tokenizer=tokenizer.record,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
    )


def _refuse_other_settings(work: Path, earlier: Plan, request: Request) -> None:
    """Other inputs are fine (a damaged file was replaced): unchanged shards are still right."""
    before = {**earlier.settings, "shard_megabytes": earlier.shard_megabytes, "inputs": None}
    now = {**request.settings, "shard_megabytes": request.shard_megabytes, "inputs": None}
    if before != now:
        raise DataError(
            f"{work}: was begun with other settings ({difference('settings', before, now)}); "
            "use the same, give another --output, or start over with --no-resume"
        )


def _training_texts(request: Request, most_bytes: int | None = None) -> Iterator[str]:
    """Training documents, up to about ``most_bytes``: those from the head of every shard, so from
    all over the corpus."""
    recipe = request.recipe
    share = max(1, most_bytes // len(request.shards)) if most_bytes else math.inf
    for shard in request.shards:
        taken, own_split = 0, shard.pieces[0].split
        if own_split not in (None, "train"):
            continue
        for text in read_all(shard.pieces, recipe.text_field, Skipped()):
            encoded = text.encode("utf-8")
            if (own_split or choose_split(encoded, recipe.seed, recipe.split)) == "train":
                taken += len(encoded)
                yield text
            if taken >= share:
                break


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_durably(temporary, text)
    os.replace(temporary, path)


def discard(work: Path) -> None:
    """Remove a working folder, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(work)
