"""The prepared data sets of a run, checked against one another and against the config."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distributed_lm.config import RunConfig
from distributed_lm.data.indexed import read_lengths
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
    split = config.evaluation.split
    shares = _scored_shares(config)
    parts = [
        np.memmap(corpus.folder / f"{split}.bin", corpus.manifest.dtype, mode="r", shape=(count,))
        for corpus, count in shares
    ]
    if sum(map(len, parts)) < 2:
        folders = ", ".join(str(corpus.folder) for corpus in open_corpora(config))
        raise DataError(
            f"evaluation.split={split}: holds no text in {folders}; set another "
            "evaluation.split or prepare the data with a larger share for it (--split)"
        )
    if len(parts) == 1:
        return parts[0]
    joined = np.concatenate(parts)
    joined.flags.writeable = False
    return joined


def evaluation_document_ends(config: RunConfig) -> np.ndarray:
    """Where the documents of ``evaluation_stream`` end.

    Returns:
        int64, ascending: document d is tokens ends[d − 1] … ends[d] − 1 of the stream, its
        end-of-document token included. The last is cut where the stream is.
    """
    split, ends, total = config.evaluation.split, [np.zeros(0, dtype=np.int64)], 0
    for corpus, count in _scored_shares(config):
        lengths = read_lengths(corpus.folder / split, corpus.manifest.splits[split])
        inside = np.cumsum(lengths, dtype=np.int64)
        whole = int(np.searchsorted(inside, count, side="left"))
        ends.append(total + np.minimum(inside[: whole + 1], count))
        total += count
    return np.concatenate(ends)


def evaluation_digest(config: RunConfig) -> str:
    """Identity of the tokens of ``evaluation_stream`` and their documents, wherever they lie."""
    lines = []
    for corpus, count in _scored_shares(config):
        record = corpus.manifest.splits[config.evaluation.split]
        fingerprint = corpus.manifest.tokenizer.fingerprint
        lines.append(f"{record.bin_sha256} {record.idx_sha256} {fingerprint} {count}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _scored_shares(config: RunConfig) -> list[tuple[Corpus, int]]:
    """The corpora that ``evaluation_stream`` reads, and how many tokens of each."""
    split, limit = config.evaluation.split, config.evaluation.max_tokens
    shares: list[tuple[Corpus, int]] = []
    left = limit + 1 if limit else None
    for corpus in open_corpora(config):
        tokens = corpus.manifest.splits[split].tokens
        count = tokens if left is None else min(tokens, left)
        if left is not None:
            left -= count
        if count:
            shares.append((corpus, count))
    return shares
