"""Join finished shards into one data set and publish it in one step."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distributed_lm.data.indexed import dtype_for, join_splits
from distributed_lm.data.inputs import shard_name
from distributed_lm.data.manifest import MANIFEST, SPLITS, Manifest
from distributed_lm.data.plan import Plan, difference, read_plan
from distributed_lm.data.shards import ShardRecord, read_finished_shard, writable, write_durably
from distributed_lm.data.tokenizer import TOKENIZER_FILE
from distributed_lm.errors import DataError


def publish(folders: Sequence[Path], output: Path) -> tuple[Manifest, dict[str, list[str]]]:
    """Join the shards in ``folders`` into ``output``; also the first places of each skip.

    Raises:
        DataError: if the folders belong to different data sets, shards are missing or damaged,
            or ``output`` is in the way.
    """
    refuse_occupied(output)
    plan = _common_plan(folders)
    shards = _find_shards(folders, plan)
    _refuse_nothing([record for _, record in shards], plan)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writable(output.parent):
            temporary.mkdir(parents=True)
            manifest = _join(shards, plan, temporary, output.name)
            if plan.tokenizer.file:
                shutil.copyfile(folders[0] / TOKENIZER_FILE, temporary / TOKENIZER_FILE)
            write_durably(temporary / MANIFEST, manifest.model_dump_json(indent=2))
            if output.is_dir():
                output.rmdir()  # empty: refuse_occupied has looked
            os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest, _examples([record for _, record in shards])


def refuse_occupied(output: Path) -> None:
    """Refuse to write where anything lies.

    Raises:
        DataError: naming the folder.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(
            f"--output {output}: something is already there; give another folder or remove it"
        )


def _common_plan(folders: Sequence[Path]) -> Plan:
    plans = [read_plan(folder) for folder in folders]
    for folder, plan in zip(folders[1:], plans[1:], strict=True):
        for field in type(plan).model_fields:
            ours, theirs = getattr(plans[0], field), getattr(plan, field)
            if ours != theirs:
                raise DataError(
                    f"{folder}: its shards do not belong with those in {folders[0]}: "
                    f"{difference(field, ours, theirs)}; prepare both with the same settings"
                )
    return plans[0]


def _find_shards(folders: Sequence[Path], plan: Plan) -> list[tuple[Path, ShardRecord]]:
    """Every shard of the plan in order, from whichever folder has it."""
    found: list[tuple[Path, ShardRecord]] = []
    missing = []
    for index, key in enumerate(plan.shard_keys):
        name = shard_name(index)
        candidates = [folder / name for folder in folders if (folder / name).is_dir()]
        # The hashes of the tokens are checked while they are copied.
        records = [
            (path, read_finished_shard(path, key, check_hashes=False)) for path in candidates
        ]
        whole = [(path, record) for path, record in records if record is not None]
        if whole:
            found.append(whole[0])
        else:
            missing.append(name)
    if missing:
        raise DataError(
            f"{', '.join(map(str, folders))}: {len(missing)} of {len(plan.shard_keys)} shards are "
            "missing or of another corpus "
            f"(first {missing[0]}); finish the prepare-data job that makes them"
        )
    return found


def _refuse_nothing(records: Sequence[ShardRecord], plan: Plan) -> None:
    if any(record.splits[split].documents for record in records for split in SPLITS):
        return
    reasons = [
        f"{sum(record.skipped.get(reason, 0) for record in records)} × {reason}, as in {places[0]}"
        for reason, places in _examples(records).items()
    ]
    why = "; ".join(reasons) or "the inputs are empty"
    raise DataError(
        f"no usable document in the input ({why}); check the input files and "
        f"--text-field {plan.settings.get('text_field')}"
    )


def _join(
    shards: Sequence[tuple[Path, ShardRecord]], plan: Plan, folder: Path, name: str
) -> Manifest:
    dtype = dtype_for(plan.vocab_size)
    splits = {}
    for split in SPLITS:
        parts = [(path / split, record.splits[split]) for path, record in shards]
        splits[split] = join_splits(folder / split, dtype, parts)
    skipped: Counter[str] = Counter()
    for _, record in shards:
        skipped.update(record.skipped)
    return Manifest.model_validate(
        {
            "name": name,
            "vocab_size": plan.vocab_size,
            "end_of_document": plan.end_of_document,
            "tokenizer": plan.tokenizer.model_dump(),
            "dtype": dtype,
            "splits": {split: record.model_dump() for split, record in splits.items()},
            "skipped": dict(sorted(skipped.items())),
            "settings": plan.settings,
        }
    )


def _examples(records: Sequence[ShardRecord]) -> dict[str, list[str]]:
    examples: dict[str, list[str]] = {}
    for record in records:
        for reason, places in record.examples.items():
            kept = examples.setdefault(reason, [])
            kept.extend(places[: 3 - len(kept)])
    return examples
