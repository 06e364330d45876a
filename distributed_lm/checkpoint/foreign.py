"""A checkpoint may come from anywhere: nothing in it may run when it is read.

``torch.distributed.checkpoint`` reads ``.metadata`` with ``pickle.load``, which calls whatever the
file names. Here the pickle's opcodes are walked first, without executing any, and every name it
would import must be on a short list of plain data types. The manifest is no protection: who can
plant a file can plant its hash.
"""

import pickletools
import zipfile
from pathlib import Path

from distributed_lm.errors import CheckpointError

_DCP = "torch.distributed.checkpoint."
ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch", name)
            for name in ("float16", "bfloat16", "float32", "float64", "uint8", "int64", "bool")
        ),
        *(
            (_DCP + "metadata", name)
            for name in (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
                "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            (_DCP + "planner", name)
            for name in (
                "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
            )
        ),
        (_DCP + "filesystem", "_StorageInfo"),
    }
)  # fmt: skip


def check_executes_nothing(folder: Path) -> None:
    """Look at every pickle of a checkpoint before any library opens it.

    Raises:
        CheckpointError: naming the file and what it would import.
    """
    _check_pickle(folder / ".metadata")
    _check_torch_archive(folder / "common.pt")


def _check_torch_archive(path: Path) -> None:
    """``torch.save`` files are zip archives with a pickle inside."""
    if not path.exists():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch's reader ignores case and takes the first of two entries, Python's the last.
            names = [name.casefold() for name in archive.namelist()]
            if len(set(names)) != len(names):
                raise CheckpointError(f"{path}: holds an entry twice; do not load this folder")
            for entry in archive.infolist():
                if entry.filename.casefold().endswith(".pkl"):
                    _check_names(path, archive.read(entry))
    except zipfile.BadZipFile:
        raise CheckpointError(f"{path}: not a torch archive; the file is damaged") from None


def _check_pickle(path: Path) -> None:
    try:
        _check_names(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _check_names(path: Path, content: bytes) -> None:
    for module, name in imported_names(path, content):
        if (module, name) not in ALLOWED:
            raise CheckpointError(
                f"{path}: would import {module}.{name}, which no checkpoint of ours needs; "
                "do not load this folder"
            )


def imported_names(path: Path, content: bytes) -> list[tuple[str, str]]:
    """(module, name) of everything that unpickling ``content`` would look up.

    Follows the string operands of ``STACK_GLOBAL`` through memo and stack as far as the pickler
    writes them; a ``STACK_GLOBAL`` whose operands are anything else is refused.
    """
    names: list[tuple[str, str]] = []
    stack: list[object] = []
    memo: dict[int, object] = {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "INST"):
                module, name = str(argument).split(" ", 1)
                names.append((module, name))
                stack.append(None)
            elif opcode.name == "STACK_GLOBAL":
                operands = stack[-2:]
                if not all(isinstance(operand, str) for operand in operands):
                    raise CheckpointError(f"{path}: imports a computed name; do not load it")
                names.append((str(operands[0]), str(operands[1])))
                stack.append(None)
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                raise CheckpointError(f"{path}: uses the extension registry; do not load it")
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = stack[-1] if stack else None
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = stack[-1] if stack else None
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo.get(int(str(argument))))
            else:
                stack.append(argument if isinstance(argument, str) else None)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: not a pickle ({error}); the file is damaged") from None
    return names
