"""Results are written whole, read as they were, and told apart."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distributed_lm.errors import DataError
from distributed_lm.evaluation.results import read_results, write_result
from tests.support.results import make_result

SUMS = (np.array([30.0, 20.0]), np.array([10, 5]))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    result = make_result(
        loss=2.0, perplexity=math.exp(2.0), interval=(1.5, 2.5), words=7, word_perplexity=3.0,
        nats=50.0, bits_per_byte=1.0, seconds=1.0, versions={"torch": "2"},
        by_position={"edges": [1, 2], "nats": [1.0], "tokens": [1]},
    )  # fmt: skip
    written = write_result(tmp_path, result, SUMS)
    assert read_results(tmp_path) == [written]
    for found, expected in zip(read_results(tmp_path)[0].document_sums(), SUMS, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not list(tmp_path.glob("evaluation/.*"))


def test_gaps_and_infinities_are_strict_json(tmp_path: Path) -> None:
    write_result(tmp_path, make_result(gap="too long", loss=math.nan, length=128), None)
    write_result(tmp_path, make_result(loss=900.0, perplexity=math.inf), SUMS)
    for path in tmp_path.glob("evaluation/*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    exploded, gap = read_results(tmp_path)
    assert exploded.perplexity == math.inf
    assert gap.gap == "too long"
    assert math.isnan(gap.loss)
    assert gap.documents is None
    with pytest.raises(DataError, match="too long"):
        gap.document_sums()


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 10}, {"split": "test"}, {"data_digest": "e" * 64}, {"precision": "bf16"},
        {"protocol": "sliding", "stride": 8}, {"protocol": "sliding", "stride": 16},
        {"length": 128}, {"targets": "sample_100_seed_0_from_1"},
    ],
)  # fmt: skip
def test_another_measurement_has_another_file(tmp_path: Path, changes: dict) -> None:
    first, second = make_result(), make_result(**changes)
    assert first.file_stem != second.file_stem
    assert not first.is_of(second)
    assert first.is_of(dataclasses.replace(first, loss=9.0, seconds=5.0))
    assert not first.is_of(dataclasses.replace(first, checkpoint="another"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"run": "old"}', "schema_version is None, this program reads 1; remove it"),
        ('{"schema_version": 1, "run": "short"}', "damaged"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "bad.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_results(tmp_path)
    assert "bad.json" in str(caught.value)


def test_reading_needs_no_torch() -> None:
    program = "import sys, distributed_lm.evaluation.results; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
