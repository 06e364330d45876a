"""A hash chain over the blocks that training has seen: equal heads mean equal data, in order.

It knows nothing of the layout or the sequence length, so a run's head can be compared with that
of a run on other hardware, of its own resumption, or of a run at another length.
"""

import hashlib
from collections.abc import Iterable

_DOMAIN = b"distributed_lm data ledger 1\n"


def genesis(corpus_hash: str) -> str:
    """The head before the first step (hex): says which corpora, weights and tokenizer."""
    return hashlib.sha256(_DOMAIN + corpus_hash.encode()).hexdigest()


def advance(head: str, blocks: Iterable[tuple[int, int, int]]) -> str:
    """The head after a step that saw ``blocks``, each (corpus, epoch, block), in step order."""
    line = ";".join(f"{corpus},{epoch},{block}" for corpus, epoch, block in blocks)
    return hashlib.sha256(f"{head}\n{line}".encode()).hexdigest()
