"""``manifest.json``: size and SHA-256 of every file of a checkpoint, written last.

A folder with a manifest that holds is whole. Hashes are taken by whoever wrote the file, in the
background process of an asynchronous save, so that publishing costs no second pass over the data.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distributed_lm.errors import CheckpointError

MANIFEST = "manifest.json"
STATE_FILE = "state.json"
# Without these no folder is a checkpoint, whatever its manifest lists.
ALWAYS_THERE = (STATE_FILE, ".metadata", "metadata.json")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return cls(size, digest.hexdigest())


def write_manifest(
    folder: Path, step: int, records: dict[str, FileRecord], save: str | None = None
) -> None:
    """Hash what is not in ``records`` yet, and write all of it, on disk when this returns.

    Args:
        save: token of this save, which ``state.json`` has too.
    """
    for path in sorted(folder.iterdir()):
        if path.name not in records and path.name != MANIFEST:
            records[path.name] = FileRecord.of(path)
            sync_file(path)
    files = {name: vars(records[name]) for name in sorted(records)}
    content = {"step": step, "save": save, "files": files}
    write_synced(folder / MANIFEST, json.dumps(content, indent=1))
    sync_file(folder)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Raises CheckpointError if there is none that can be read for this step of this run."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records = {name: FileRecord(**record) for name, record in content["files"].items()}
        step, save = int(content["step"]), content.get("save")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint without it is not whole") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    if folder.name != f"step_{step:08d}":
        raise CheckpointError(f"{path}: is the manifest of step {step}, not of {folder.name}")
    if any(Path(name).name != name for name in records):
        raise CheckpointError(f"{path}: names files outside its folder")
    for name in ALWAYS_THERE:
        if name not in records:
            raise CheckpointError(f"{path}: damaged: does not list {name}")
    _check_same_save(folder, save)
    return records


def _check_same_save(folder: Path, save: str | None) -> None:
    """A manifest of the same step of another run would only say that every file is damaged."""
    try:
        own = json.loads((folder / STATE_FILE).read_text(encoding="utf-8")).get("save")
    except (OSError, ValueError, AttributeError):
        return  # its hash will say so
    if own != save:
        raise CheckpointError(
            f"{folder / MANIFEST}: is the manifest of another save ({save}) than {STATE_FILE} "
            f"({own}): of another run, or of another life of this one"
        )


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest.

    Args:
        names: only these (ranks share the work); None = all.

    Raises:
        CheckpointError: naming the first file that differs, what was expected and what was found.
    """
    records = read_manifest(folder)
    for name in records if names is None else names:
        path, expected = folder / name, records[name]
        try:
            size = path.stat().st_size
            if size != expected.size:
                raise CheckpointError(
                    f"{path}: damaged: expected {expected.size} bytes, found {size}"
                )
            found = FileRecord.of(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        if found != expected:
            raise CheckpointError(
                f"{path}: damaged: expected SHA-256 {expected.sha256}, found {found.sha256}"
            )


def write_synced(path: Path, text: str) -> None:
    """Write a small file so that it survives a power cut."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_file(path: Path) -> None:
    """Put a file's content, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
