"""Perplexity against context length for several runs, as a table and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_lm.config import RunConfig
from distributed_lm.errors import DataError
from distributed_lm.evaluation.results import FOLDER, read_results

# Okabe and Ito's palette: told apart by colour-blind readers. Markers repeat the distinction.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


@dataclass(frozen=True)
class Curve:
    """One run's perplexities by context length, all over the same tokens."""

    label: str
    trained_length: int
    perplexities: dict[int, float]
    tokens_scored: int

    @property
    def at_trained_length(self) -> float:
        return self.perplexities[self.trained_length]

    def ratio(self, length: int) -> float:
        """Perplexity at ``length`` over that at the trained length."""
        return self.perplexities[length] / self.at_trained_length


def read_curve(config: RunConfig, label: str) -> Curve:
    """The results of a run's last evaluated step at its configured lengths.

    Raises:
        DataError: if a file is damaged, if some length is missing, or lengths were not scored on
            the same tokens.
    """
    folder = config.run_dir / FOLDER
    wanted = config.evaluation_lengths
    chosen = [
        result
        for result in read_results(config.run_dir)
        if result.step == config.train.steps
        and result.split == config.evaluation.split
        and result.protocol == "nonoverlapping"
        and result.length in wanted
    ]
    if sorted(result.length for result in chosen) != sorted(wanted):
        raise DataError(
            f"{folder}: expected one result at step {config.train.steps} for each of "
            f"{list(wanted)}, found lengths {sorted(result.length for result in chosen)}; "
            "remove results of other evaluations, or train the run again"
        )
    scored = {(result.tokens_scored, result.data_digest) for result in chosen}
    if len(scored) != 1:
        raise DataError(f"{folder}: the lengths were scored on different tokens: {sorted(scored)}")
    perplexities = {result.length: result.perplexity for result in chosen}
    return Curve(
        label,
        config.data.sequence_length,
        dict(sorted(perplexities.items())),
        chosen[0].tokens_scored,
    )


def markdown_table(curves: Sequence[Curve]) -> str:
    """One row per run, one column per length, as multiples of the trained length."""
    lengths = list(curves[0].perplexities)
    trained = curves[0].trained_length
    heads = [f"{length} ({length / trained:g}L)" for length in lengths]
    rows = [["position", *heads], ["---", *["---:"] * len(heads)]]
    rows += [
        [curve.label, *[f"{curve.perplexities[length]:.3f}" for length in lengths]]
        for curve in curves
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Perplexity against context length, both on logarithmic axes, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    for curve, (colour, marker) in zip(curves, STYLES, strict=False):
        lengths, values = list(curve.perplexities), list(curve.perplexities.values())
        axes.plot(lengths, values, color=colour, marker=marker, label=curve.label)
    trained = curves[0].trained_length
    axes.axvline(trained, color="0.6", linestyle=":", linewidth=1)
    axes.annotate(
        f"trained at L = {trained}",
        (trained, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(5, -12),
        textcoords="offset points",
        color="0.4",
        fontsize="small",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(curves[0].perplexities), labels=[str(n) for n in curves[0].perplexities])
    ticks = _perplexity_ticks(curves)
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("context length at evaluation (tokens)")
    axes.set_ylabel("perplexity")
    axes.set_title("Train short, test long")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _perplexity_ticks(curves: Sequence[Curve]) -> list[float]:
    """Round numbers that cover all curves."""
    values = [value for curve in curves for value in curve.perplexities.values()]
    steps = [mantissa * 10**power for power in range(6) for mantissa in (1, 1.5, 2, 3, 4, 5, 7)]
    below = [step for step in steps if step <= min(values)][-1:]
    return below + [step for step in steps if min(values) < step < max(values) * 1.2]
