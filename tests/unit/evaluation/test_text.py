"""Words and bytes behind scored tokens."""

from pathlib import Path

import numpy as np
import pytest

from distributed_lm.config import load_config
from distributed_lm.data.tokenizer import ByteTokenizer, Gpt2Tokenizer, JsonTokenizer, train_bpe
from distributed_lm.evaluation.scored_data import ScoredData
from distributed_lm.evaluation.text import count, count_text
from distributed_lm.prepare_data import prepare_data

TEXT = "Zwölf Boxkämpfer 🥊 jagen\n\nViktor\t<|endoftext|> quer."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # The first lines of WikiText-103's validation set: a title between two empty lines.
        (" \n = Homarus gammarus = \n \n", 4 + 3),
        ("one two\nthree", 3 + 2),
        ("one two\nthree\n", 3 + 2),
        ("\n", 1),
        ("", 0),
    ],
)
def test_words_are_wikitext_s(text: str, words: int) -> None:
    assert count(text.encode()).words == words


@pytest.mark.parametrize("kind", ["gpt2", "bytes", "bpe"])
def test_bytes_add_up_token_by_token_also_inside_a_character(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_bpe(["no umlauts and no boxing gloves here"], 300, path)  # so characters are cut
    tokenizer = {
        "gpt2": Gpt2Tokenizer,
        "bytes": ByteTokenizer,
        "bpe": lambda: JsonTokenizer(path, "bpe"),
    }[kind]()
    ids = [*tokenizer.encode(TEXT).tolist(), tokenizer.end_of_document]
    assert tokenizer.decode_bytes(ids) == TEXT.encode()
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == TEXT.encode()


def test_documents_are_counted_apart_and_only_where_scored() -> None:
    tokenizer = ByteTokenizer()
    texts = ["one two", "three four\n", "five"]
    parts = [[*tokenizer.encode(text).tolist(), 256] for text in texts]
    stream = np.concatenate(parts).astype(np.uint16)
    ends = np.cumsum([len(part) for part in parts])
    # All but the first token of the first document, none of the last.
    counted = count_text(tokenizer, stream, ends, np.array([7, 12, 0]))
    assert counted == (2 + 1 + 2 + 1, 6 + 11)


def test_a_whole_split_has_the_manifest_s_bytes(speeches_folder: Path, tmp_path: Path) -> None:
    speeches = [str(path) for path in sorted(speeches_folder.glob("*.txt"))[:12]]
    prepare_data(tmp_path / "data", speeches, tokenizer="bpe:400", split="0.5,0.5,0")
    fixed = [f"data.path={tmp_path / 'data'}", "model.vocab_size=null"]
    config = load_config("configs/runs/smoke.yaml", [*fixed, "evaluation.max_tokens=0"])
    data = ScoredData.of(config)
    record = data.corpora[0].manifest.splits["valid"]
    assert len(data.document_ends) == record.documents > 1
    assert data.document_ends[-1] == len(data.stream) == record.tokens
    end = data.corpora[0].manifest.end_of_document
    np.testing.assert_array_equal(np.flatnonzero(data.stream == end) + 1, data.document_ends)
    counted = data.count_text(data.document_lengths)
    assert counted.size == record.bytes
    cut = load_config("configs/runs/smoke.yaml", [*fixed, "evaluation.max_tokens=100"])
    part = ScoredData.of(cut)
    assert part.document_ends.tolist() == [101]
    assert part.digest != data.digest
    assert part.count_text(np.array([101])).size < counted.size
