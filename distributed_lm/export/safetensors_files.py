"""Safetensors folders as ``transformers`` lays them out, one shard in memory at a time."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distributed_lm.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors as they come, a shard whenever ``shard_bytes`` are together.

    Returns:
        Bytes of all tensors.
    """
    names: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        file = _draft(folder, len(names))
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes it the owner's alone
        names.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(names) == 1:
        os.rename(_draft(folder, 0), folder / SINGLE_FILE)
        return total
    weight_map: dict[str, str] = {}
    for number, members in enumerate(names):
        name = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        os.rename(_draft(folder, number), folder / name)
        weight_map |= dict.fromkeys(members, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return total


def _draft(folder: Path, number: int) -> Path:
    """A shard's final name says how many there are."""
    return folder / f"shard-{number:05d}.partial"


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


class SafetensorsFolder:
    """The tensors of a model folder, read one at a time.

    Raises:
        CheckpointError: if there are none, they are pickles, or the index does not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _files_of(folder)
        self._open: tuple[str, Any] = ("", None)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._file_of))

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: if it is not where the index says.
        """
        file = self._file_of[name]
        try:
            return self._shard(file).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: {error}; copy it again") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shard(self._file_of[name]).get_slice(name).get_shape())

    def _shard(self, file: str) -> Any:
        if self._open[0] != file:
            self._open = (file, _opened(self.folder / file))
        return self._open[1]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None


def _files_of(folder: Path) -> dict[str, str]:
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in files.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: damaged ({error}); copy it again") from None
        if any(Path(file).name != file for file in files.values()):
            raise CheckpointError(f"{index}: names files outside its folder")
        return files
    if single.is_file():
        return dict.fromkeys(_opened(single).keys(), SINGLE_FILE)
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: has its weights as pickles (.bin), which could run code when read; load it "
            "once with transformers and save_pretrained(), which writes safetensors"
        )
    raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
