"""The size of a run's vocabulary, before anything is built. Imports no torch."""

from distributed_lm.config import RunConfig
from distributed_lm.data.manifest import read_manifest
from distributed_lm.errors import DataError
from distributed_lm.planner.vocabulary import padded_vocab_size


def vocabulary(config: RunConfig) -> int | None:
    """Rows of the embedding; None while the data set is not prepared."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    try:
        found = read_manifest(config.data.corpora[0].path).vocab_size
    except DataError:
        return None
    return padded_vocab_size(config.model, found)
