"""The prepared data sets of a run, checked against one another and against the config."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed_lm.config import RunConfig
from distributed_lm.data.manifest import Manifest, SplitRecord, read_manifest
from distributed_lm.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """One prepared data set and its share in a run."""

    folder: Path
    weight: float
    """As in the config: relative to the other corpora's."""
    manifest: Manifest

    @property
    def train(self) -> SplitRecord:
        return self.manifest.splits["train"]

    def blocks_per_epoch(self, block_length: int) -> int:
        """Whole blocks in the training split; the last token is only ever a label."""
        return (self.train.tokens - 1) // block_length


def open_corpora(config: RunConfig) -> list[Corpus]:
    """The data sets that ``data.path`` names.

    Raises:
        DataError: if one is missing or damaged, if their tokenizers differ, or if the model's
            vocabulary is too small for them.
    """
    corpora = [
        Corpus(Path(entry.path), entry.weight, read_manifest(entry.path))
        for entry in config.data.corpora
    ]
    if not corpora:
        raise DataError("data.path: names no data set; give a folder made by prepare-data")
    first = corpora[0]
    for other in corpora[1:]:
        ours, theirs = first.manifest.tokenizer, other.manifest.tokenizer
        if ours.fingerprint != theirs.fingerprint:
            raise DataError(
                f"data.path: {first.folder} was tokenised with {ours.kind} "
                f"({ours.fingerprint[:12]}) and {other.folder} with {theirs.kind} "
                f"({theirs.fingerprint[:12]}); prepare both with the same --tokenizer"
            )
    rows, needed = config.model.vocab_size, first.manifest.vocab_size
    if rows is not None and rows < needed:
        raise DataError(
            f"model.vocab_size={rows} is smaller than the {needed} tokens of {first.folder}'s "
            f"tokenizer; set model.vocab_size to at least {needed}, or leave it out"
        )
    return corpora


def corpora_hash(corpora: Sequence[Corpus]) -> str:
    """Identity of the training tokens of all corpora and their weights, wherever they lie."""
    total = sum(corpus.weight for corpus in corpora)
    lines = [f"{corpus.manifest.corpus_hash} {corpus.weight / total!r}" for corpus in corpora]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def evaluation_stream(config: RunConfig) -> np.ndarray:
    """The tokens to score: ``evaluation.split`` of every corpus in order, documents in file order.

    Returns:
        Token ids, 1-D, contiguous (fairseq's ``sample-break-mode none``), at most
        ``evaluation.max_tokens`` + 1 of them when that is not 0: the last is only a label. It is
        read-only and in the data set's dtype (uint16 or int32), for one corpus a memory map:
        convert the slices you use.

    Raises:
        DataError: as ``open_corpora``, or if the split holds fewer than two tokens.
    """
    split, limit = config.evaluation.split, config.evaluation.max_tokens
    wanted = limit + 1 if limit else None
    parts: list[np.ndarray] = []
    corpora = open_corpora(config)
    for corpus in corpora:
        tokens = corpus.manifest.splits[split].tokens
        count = tokens if wanted is None else min(tokens, wanted - sum(map(len, parts)))
        if count:
            file = corpus.folder / f"{split}.bin"
            parts.append(np.memmap(file, corpus.manifest.dtype, mode="r", shape=(count,)))
    if sum(map(len, parts)) < 2:
        raise DataError(
            f"evaluation.split={split}: holds no text in "
            f"{', '.join(str(corpus.folder) for corpus in corpora)}; set another "
            "evaluation.split or prepare the data with a larger share for it (--split)"
        )
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate(parts)
    joined.flags.writeable = False
    return joined
