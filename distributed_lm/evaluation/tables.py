"""Results as tables on a terminal."""

import math
from collections.abc import Sequence

from rich.table import Table

from distributed_lm.evaluation.early_tokens import context_curve, decompose
from distributed_lm.evaluation.results import Result


def results_table(results: Sequence[Result], note: str) -> list[Table]:
    """Tables of results of one protocol; ``note`` goes under the first."""
    first = results[0]
    stride = f", stride {first.stride}" if first.stride != first.length else ""
    title = f"{first.run}, step {first.step}, {first.split} split, {first.protocol}{stride}"
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    columns = ("context", "perplexity", "nats/token", "95% interval", "ppl/word", "bits/byte")
    for column in (*columns, "tokens"):
        table.add_column(column, justify="right")
    for result in results:
        if result.gap is not None:
            table.add_row(str(result.length), "gap", result.gap)
            continue
        low, high = result.interval
        table.add_row(
            str(result.length),
            f"{result.perplexity:.4f}",
            f"{result.loss:.6f}",
            "" if math.isnan(low) else f"{low:.3f}–{high:.3f}",
            _or_empty(result.word_perplexity, ".5g"),
            _or_empty(result.bits_per_byte, ".4f"),
            str(result.tokens_scored),
        )
    tables = [table]
    if first.protocol == "context":
        tables.append(_decomposition_table(results))
    return tables


def _decomposition_table(results: Sequence[Result]) -> Table:
    """What each doubling gains, and why, from the shortest context that was asked for."""
    curve = context_curve(results)
    title = "gain of a nonoverlapping evaluation from a longer context, nats per token"
    table = Table(title=title, title_justify="left")
    for column in ("from", "to", "gain", "early tokens", "longer context", "its 95% interval"):
        table.add_column(column, justify="right")
    for shorter, longer in zip(curve.contexts, curve.contexts[1:], strict=False):
        if shorter < results[0].trained_length:
            continue
        split = decompose(curve, shorter, longer)
        low, high = split.longer_context.interval
        table.add_row(
            str(shorter),
            str(longer),
            f"{split.gain.nats:.5f}",
            f"{split.fewer_early_tokens.nats:.5f}",
            f"{split.longer_context.nats:.5f}",
            "" if math.isnan(low) else f"{low:.5f}–{high:.5f}",
        )
    return table


def _or_empty(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
