"""The word-level vocabulary and WikiText's form, against fairseq's rules written out by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distributed_lm.data.manifest import read_manifest
from distributed_lm.data.tokenizer import JsonTokenizer, tokenizer_of
from distributed_lm.data.wikitext import articles
from distributed_lm.data.words import SPECIAL, sorted_words, train_words
from distributed_lm.errors import DataError
from distributed_lm.prepare_data import prepare_data
from tests.support.wikitext import HUB_CONFIG, SPLITS, write_hub_folder

EOS, UNK = 2, 3


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def fairseq_ids(lines: list[str], vocabulary: dict[str, int]) -> list[int]:
    """``Dictionary.encode_line`` of each line: its words and the end of the line."""
    ids = []
    for line in lines:
        ids += [vocabulary.get(word, UNK) for word in line.split()] + [EOS]
    return ids


def words_tokenizer(path: Path, *texts: str) -> JsonTokenizer:
    train_words(texts, path / "tokenizer.json")
    return JsonTokenizer(path / "tokenizer.json", "words")


def test_ids_are_by_frequency_then_code_point_after_the_special_symbols() -> None:
    texts = ["b a a c\nZ <unk> <unk> <unk> </s>", "é b a d"]
    assert sorted_words(texts) == [*SPECIAL, "a", "b", "Z", "c", "d", "é"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_every_line_ends_and_the_last_one_with_the_document(tmp_path: Path, end: str) -> None:
    text = "a b\n\n a\u2003zebra\x1db <unk>" + end
    tokenizer = words_tokenizer(tmp_path, "a a b")
    assert tokenizer.end_of_document == EOS
    assert tokenizer.vocab_size == 6
    ids = [*tokenizer.encode(text), tokenizer.end_of_document]
    assert ids == [4, 5, EOS, EOS, 4, UNK, 5, UNK, EOS]
    assert tokenizer.decode([4, UNK, EOS]) == "a <unk> </s>"


def test_wikitext_is_fairseqs_stream(tmp_path: Path, speeches: list[Path]) -> None:
    rows = write_hub_folder(tmp_path / "hub", speeches)
    output = tmp_path / "set"
    options = {"dataset": str(tmp_path / "hub"), "dataset_config": HUB_CONFIG, "wikitext": True}
    prepare_data(output, tokenizer="words", workers=2, **options)
    manifest = read_manifest(output)

    # The vocabulary is of the training split alone.
    counts = Counter(word for line in rows["train"] for word in line.split())
    expected = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *expected])}
    assert manifest.vocab_size == len(vocabulary)
    assert manifest.tokenizer.kind == "words"
    assert tokenizer_of(output, manifest).vocab_size == len(vocabulary)

    for name, ours in (("train", "train"), ("validation", "valid"), ("test", "test")):
        ids = np.fromfile(output / f"{ours}.bin", dtype=manifest.dtype)
        assert ids.tolist() == fairseq_ids(rows[name], vocabulary)
        # Documents are articles, also the one that the two files of the training split part.
        articles = len(speeches[SPLITS[name]])
        assert manifest.splits[ours].documents == articles
    assert (np.fromfile(output / "valid.bin", dtype=manifest.dtype) == UNK).any()

    again = tmp_path / "again"
    prepare_data(again, tokenizer="words", workers=1, **options)
    assert read_manifest(again).corpus_hash == manifest.corpus_hash


def test_an_article_begins_with_a_title_after_an_empty_line() -> None:
    first = ["", " = First = \n", "", " a \n", " = not a title = \n", "", " = = Part = = \n", ""]
    second = [" = Second = \n", " = x = y = \n", "", " b \n"]
    rows = [(row, f"row {number}") for number, row in enumerate([*first, *second])]
    joined = ["".join(row.rstrip("\n") + "\n" for row in part) for part in (first, second)]
    assert list(articles(rows)) == [(joined[0], "row 0"), (joined[1], "row 8")]
    # What is not text is for the reader to count and skip.
    assert list(articles([(None, "row 0"), (" a \n", "row 1")])) == [
        (None, "row 0"),
        (" a \n", "row 1"),
    ]


def test_wikitext_that_was_saved_to_disk(tmp_path: Path, speeches: list[Path]) -> None:
    import datasets

    write_hub_folder(tmp_path / "hub", speeches)
    datasets.load_dataset(str(tmp_path / "hub"), HUB_CONFIG).save_to_disk(tmp_path / "saved")
    manifests = []
    for name in ("hub", "saved"):
        options = {"dataset_config": HUB_CONFIG, "wikitext": True, "tokenizer": "words"}
        prepare_data(tmp_path / name / "set", dataset=str(tmp_path / name), workers=1, **options)
        manifests.append(read_manifest(tmp_path / name / "set"))
    assert manifests[0].splits == manifests[1].splits


def test_words_of_ordinary_files(tmp_path: Path, speeches: list[Path]) -> None:
    """The vocabulary is all of the training documents', however small the shards."""
    sets = []
    for size in (64.0, 0.05):
        output = tmp_path / f"set-{size}"
        files = [str(path) for path in speeches[:6]]
        options = {"split": "0.6,0.2,0.2", "shard_megabytes": size, "workers": 1}
        prepare_data(output, files, tokenizer="words", **options)
        sets.append(read_manifest(output))
    assert sets[0].corpus_hash == sets[1].corpus_hash
    assert sets[0].vocab_size > 1500


def test_wikitext_without_a_data_set_is_refused(tmp_path: Path, speeches: list[Path]) -> None:
    with pytest.raises(DataError, match="--wikitext: says how a --dataset is read"):
        prepare_data(tmp_path / "set", [str(speeches[0])], wikitext=True)
