"""A word-level vocabulary from a corpus, as ``fairseq-preprocess`` makes it for WikiText-103.

Words are what white space separates, every line ends in ``</s>`` (also an empty one), a word that
the training text lacks is ``<unk>``. Ids are by falling frequency, ties by code point, after four
special symbols: adaptive embeddings take the order of the ids for the order of frequency. Source:
``fairseq/data/dictionary.py``, whose 267,737 symbols for WikiText-103 it pads to 267,744.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

END_OF_LINE, UNKNOWN = "</s>", "<unk>"
SPECIAL = ("<s>", "<pad>", END_OF_LINE, UNKNOWN)


def train_words(texts: Iterable[str], path: Path) -> None:
    """Count the words of ``texts`` and save a ``tokenizer.json``.

    Its last line end is left to the end-of-document token, which is the same one.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    vocabulary = {word: number for number, word in enumerate(sorted_words(texts))}
    engine = Engine(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    engine.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\n\z"), ""),
            normalizers.Replace("\n", f" {END_OF_LINE} "),
            # White space to Python and so to fairseq, but not to this library.
            normalizers.Replace(Regex("[\x1c-\x1f]"), " "),
        ]
    )
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path.write_text(engine.to_str(), encoding="utf-8")


def sorted_words(texts: Iterable[str]) -> list[str]:
    """The special symbols, then every other word of ``texts``, the most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    for word in SPECIAL:
        counts.pop(word, None)
    return [*SPECIAL, *sorted(counts, key=lambda word: (-counts[word], word))]
