"""The text that is scored: tokens, documents, and what identifies them."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distributed_lm.config import RunConfig
from distributed_lm.data.corpora import (
    Corpus,
    corpora_hash,
    evaluation_digest,
    evaluation_document_ends,
    evaluation_stream,
    open_corpora,
)
from distributed_lm.data.tokenizer import tokenizer_of
from distributed_lm.evaluation.text import TextCounts, count_text


@dataclass(frozen=True)
class ScoredData:
    """``evaluation.split`` of a run's corpora, up to ``evaluation.max_tokens``."""

    split: str
    stream: np.ndarray
    """Token ids, contiguous."""
    document_ends: np.ndarray
    """Of ``evaluation_document_ends``."""
    digest: str
    """Identity of the tokens and documents above."""
    corpora: list[Corpus]
    _counted: dict[bytes, TextCounts] = field(default_factory=dict)
    """Every length scores the same tokens."""

    @classmethod
    def of(cls, config: RunConfig) -> "ScoredData":
        """Raises DataError as ``evaluation_stream``."""
        return cls(
            config.evaluation.split,
            evaluation_stream(config),
            evaluation_document_ends(config),
            evaluation_digest(config),
            open_corpora(config),
        )

    @property
    def num_targets(self) -> int:
        """Tokens that can be scored: all but the first."""
        return len(self.stream) - 1

    @property
    def corpus_hash(self) -> str:
        """Identity of the training tokens."""
        return corpora_hash(self.corpora)

    @property
    def tokenizer(self) -> str:
        """Fingerprint."""
        return self.corpora[0].manifest.tokenizer.fingerprint

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        return np.diff(self.document_ends, prepend=0)

    def count_text(self, scored_tokens: np.ndarray) -> TextCounts:
        """Words and bytes behind each document's scored tokens (all but the first at most).

        Raises:
            DataError: if the tokenizer cannot be had.
        """
        key = scored_tokens.tobytes()
        if key not in self._counted:
            corpus = self.corpora[0]
            tokenizer = tokenizer_of(corpus.folder, corpus.manifest)
            self._counted[key] = count_text(
                tokenizer, self.stream, self.document_ends, scored_tokens
            )
        return self._counted[key]
