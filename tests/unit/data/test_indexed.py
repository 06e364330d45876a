"""Our writer gives the bytes that Megatron's gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from distributed_lm.data.indexed import SplitWriter, dtype_for, join_splits
from distributed_lm.data.manifest import SplitRecord
from distributed_lm.errors import DataError

DOCUMENTS = [[1, 2, 3], [4], list(range(200)), [7, 7]]


def write(prefix: Path, documents: list[list[int]], dtype: str) -> SplitRecord:
    with SplitWriter(prefix, dtype, end_of_document=9) as writer:
        for document in documents:
            writer.add(np.array(document), text_bytes=len(document))
    return writer.finish()


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_bytes_equal_megatron_s_builder(tmp_path, dtype):
    write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_item(torch.tensor([*document, 9]))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_joining_equals_megatron_s_add_index_and_writing_at_once(tmp_path):
    pieces = [DOCUMENTS[:1], [], DOCUMENTS[1:3], DOCUMENTS[3:], []]
    parts = []
    for number, piece in enumerate(pieces):
        prefix = tmp_path / f"part{number}"
        parts.append((prefix, write(prefix, piece, "uint16")))
    joined = join_splits(tmp_path / "joined", "uint16", parts)
    assert joined == write(tmp_path / "whole", DOCUMENTS, "uint16")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix, record in parts:
        if record.documents:  # Megatron cannot map an empty file
            builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"joined.{suffix}").read_bytes() == (
            tmp_path / f"theirs.{suffix}"
        ).read_bytes()
    dataset = IndexedDataset(str(tmp_path / "joined"))
    assert [dataset[i].tolist() for i in range(4)] == [[*d, 9] for d in DOCUMENTS]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_damaged_part_is_named(tmp_path, suffix):
    record = write(tmp_path / "part", DOCUMENTS, "uint16")
    file = (tmp_path / "part").with_suffix(suffix)
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=rf"part\{suffix}: is not as it was written"):
        join_splits(tmp_path / "joined", "uint16", [(tmp_path / "part", record)])


def test_two_bytes_per_token_where_they_suffice():
    assert dtype_for(65536) == "uint16"
    assert dtype_for(65537) == "int32"
