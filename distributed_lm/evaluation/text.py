"""What the scored tokens stand for: words and bytes, so that tokenizers can be compared.

Word-level perplexity follows WikiText-103 (Merity et al. 2017; fairseq's and GPT-2's evaluations):
``exp(total nats / words)``, where words are what white space separates plus one end-of-line token
for each line. Nats include those of end-of-document tokens, which stand for no text.
"""

from typing import NamedTuple

import numpy as np

from distributed_lm.data.tokenizer import Tokenizer


class TextCounts(NamedTuple):
    """Of the text behind some tokens."""

    words: int
    """White-space words, and one for each line."""
    size: int
    """UTF-8 bytes."""


def count(text: bytes) -> TextCounts:
    """A last line without a newline is a line too; a text begun inside a word counts that word."""
    content = text.decode("utf-8", errors="replace")
    lines = content.count("\n") + (content != "" and not content.endswith("\n"))
    return TextCounts(len(content.split()) + lines, len(text))


def count_text(
    tokenizer: Tokenizer, stream: np.ndarray, document_ends: np.ndarray, scored: np.ndarray
) -> TextCounts:
    """Words and bytes of documents' scored tokens.

    Args:
        document_ends: of ``evaluation_document_ends``.
        scored: [documents] how many tokens of each are scored: all, all but its first, or none.
    """
    words = size = 0
    starts = np.concatenate(([0], document_ends[:-1])).astype(np.int64)
    for start, end, tokens in zip(starts, document_ends, scored, strict=True):
        if tokens:
            assert end - start - tokens in (0, 1), "part of a document"
            ids = stream[int(end) - int(tokens) : int(end)]
            counted = count(tokenizer.decode_bytes(ids.tolist()))
            words, size = words + counted.words, size + counted.size
    return TextCounts(words, size)
