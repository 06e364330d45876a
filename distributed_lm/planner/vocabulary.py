"""Rows of the embedding."""

from distributed_lm.config import ModelConfig
from distributed_lm.errors import ConfigError


def padded_vocab_size(model: ModelConfig, data_vocab_size: int) -> int:
    """Rows of the embedding: as configured, or the data set's padded to a multiple of 64.

    The padding is independent of the layout, so a checkpoint fits any of them.

    Raises:
        ConfigError: if the vocabulary has no words for the last adaptive band.
    """
    rows = model.vocab_size or -(-data_vocab_size // 64) * 64
    if model.adaptive is not None and rows <= model.adaptive.cutoffs[-1]:
        raise ConfigError(
            f"model.adaptive.cutoffs={list(model.adaptive.cutoffs)}: the data set's vocabulary has "
            f"only {data_vocab_size} words; choose cutoffs below that"
        )
    return rows
