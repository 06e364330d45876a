"""The tokenizer of a prepared data set as ``tokenizer.json``, which ``AutoTokenizer`` reads."""

import json
import shutil
from pathlib import Path
from typing import Any

from distributed_lm.data.manifest import Manifest
from distributed_lm.data.tokenizer import (
    END_OF_DOCUMENT,
    TOKENIZER_FILE,
    gpt2_ranks,
    tokenizer_of,
)

# What a comparison of two tokenizers encodes: several scripts, digits, spaces, line ends.
SAMPLE = (
    "Train short, test long: attention with linear biases.\n\n  In 2022,\tperplexity fell 3.14%…\n"
    "naïve façade — Übung; Ελληνικά, русский, 日本語, العربية 🙂 def f(x): return x[1:]\r\nI'll"
)


def write_tokenizer(output: Path, data: Path, manifest: Manifest) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` that give the data set's ids.

    Raises:
        DataError: if the data set's tokenizer is not the one its manifest names.
    """
    tokenizer_of(data, manifest)  # its fingerprint
    record = manifest.tokenizer
    file = output / TOKENIZER_FILE
    if record.kind == "bytes":
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        _write_byte_level(file, vocabulary, [], use_regex=False)
    elif record.kind == "gpt2":
        vocabulary, merges = _vocabulary_and_merges(gpt2_ranks())
        _write_byte_level(file, vocabulary, merges, use_regex=True)
    else:
        assert record.file is not None, f"a {record.kind} tokenizer has a file"
        shutil.copyfile(data / record.file, file)
    end = _name_of(file, manifest.end_of_document)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(output / "tokenizer_config.json", content)


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _vocabulary_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[list[str]]]:
    """tiktoken's ranks as a BPE's: each token of several bytes comes from the two parts that the
    merges of lower rank leave of it."""
    characters = byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    merges = [
        [text(part) for part in _parts(token, ranks)]
        for token in sorted(ranks, key=lambda token: ranks[token])
        if len(token) > 1
    ]
    return vocabulary, merges


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[index] + parts[index + 1] for index in range(len(parts) - 1)]
        lowest = min(range(len(pairs)), key=lambda index: ranks.get(pairs[index], len(ranks)))
        parts[lowest : lowest + 2] = [pairs[lowest]]
    return parts


def _write_byte_level(
    file: Path, vocabulary: dict[str, int], merges: list[list[str]], use_regex: bool
) -> None:
    """A BPE over bytes, with the end of a document as the token after all others.

    Args:
        use_regex: whether text is first split as GPT-2 does.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
    end = {
        "id": len(vocabulary),
        "content": END_OF_DOCUMENT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    _write_json(file, content)


def _name_of(file: Path, token: int) -> str:
    from tokenizers import Tokenizer as Engine

    return str(Engine.from_file(str(file)).id_to_token(token))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
