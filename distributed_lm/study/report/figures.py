"""The report's pictures. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_lm.study.measures import RunSet

# Okabe and Ito's palette: told apart by colour-blind readers. Markers repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Beyond this many times the best perplexity a curve says no more than that it has exploded.
TALLEST = 30.0


@dataclass(frozen=True)
class Figure:
    """A picture in two formats, below the report's folder."""

    name: str
    title: str
    caption: str

    def path(self, folder: Path, suffix: str) -> Path:
        return folder / "plots" / f"{self.name}.{suffix}"


def draw_figures(runs: RunSet, folder: Path) -> list[Figure]:
    """Draw what the runs have data for, as ``plots/*.svg`` and ``*.png``."""
    drawn = []
    for figure, draw in FIGURES:
        if _draw(figure, draw, runs, folder):
            drawn.append(figure)
    return drawn


def _draw(figure: Figure, draw: Callable[[Any, RunSet], bool], runs: RunSet, folder: Path) -> bool:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text in the SVG; equal data gives equal files.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": figure.name})
    from matplotlib import pyplot

    canvas = pyplot.figure(figsize=(8.0, 4.6), layout="constrained")
    try:
        if not draw(canvas, runs):
            return False
        for suffix in ("svg", "png"):
            path = figure.path(folder, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if suffix == "svg" else {}
            canvas.savefig(path, dpi=150, metadata=metadata)
    finally:
        pyplot.close(canvas)
    return True


def _extrapolation(canvas: Any, runs: RunSet) -> bool:
    lengths = runs.lengths()
    if len(lengths) < 2:
        return False
    axes = canvas.subplots()
    best = np.inf
    for number, arm in enumerate(runs.arms):
        known = {length: runs.mean_loss(arm, length) for length in lengths}
        points = {length: one for length, one in known.items() if one is not None}
        if not points:
            continue
        x = list(points)
        mean = np.exp([one.mean for one in points.values()])
        best = min(best, *(value for value in mean if np.isfinite(value)), np.inf)
        axes.plot(x, mean, label=arm, **_style(number))
        low, high = zip(*(one.interval() for one in points.values()), strict=True)
        if np.isfinite(low).all():
            axes.fill_between(
                x, np.exp(low), np.exp(np.minimum(high, 50.0)),
                color=_style(number)["color"], alpha=0.15, linewidth=0,
            )  # fmt: skip
    for length in sorted({runs.any_config(arm).data.sequence_length for arm in runs.arms}):
        axes.axvline(length, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if not np.isfinite(best):
        return False
    axes.set_ylim(best * 0.95, min(axes.get_ylim()[1], best * TALLEST))
    axes.set_xticks(lengths, labels=[str(length) for length in lengths])
    axes.minorticks_off()
    _plain_ticks(axes)
    axes.set_xlabel("context length at evaluation (tokens; dotted: lengths trained at)")
    axes.set_ylabel("perplexity per token")
    _finish(axes)
    return True


def _by_position(canvas: Any, runs: RunSet) -> bool:
    lengths = runs.lengths()
    if not lengths:
        return False
    axes = canvas.subplots()
    drawn = False
    for number, arm in enumerate(runs.arms):
        found = [runs.result(arm, seed, lengths[-1]) for seed in runs.seeds_of(arm)]
        bins = [one.by_position for one in found if one is not None and one.by_position]
        if not bins:
            continue
        nats = np.sum([one["nats"] for one in bins], axis=0)
        tokens = np.sum([one["tokens"] for one in bins], axis=0)
        edges = np.array(bins[0]["edges"], dtype=float)
        middle = np.sqrt((edges[:-1] + 1) * edges[1:])
        axes.plot(middle, nats / tokens, label=arm, **_style(number))
        drawn = True
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"position in the window of {lengths[-1]} tokens")
    axes.set_ylabel("loss (nats per token)")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, min(top, bottom + np.log(TALLEST)))
    _finish(axes)
    return drawn


def _training(canvas: Any, runs: RunSet) -> bool:
    left, right = canvas.subplots(1, 2, sharey=True)
    drawn = False
    for number, arm in enumerate(runs.arms):
        config = runs.any_config(arm)
        curves = [runs.curve(arm, seed) for seed in runs.seeds_of(arm)]
        known = [curve.validation.get(config.data.sequence_length, {}) for curve in curves]
        steps = sorted(set.intersection(*(set(one) for one in known))) if known else []
        if not steps:
            continue
        losses = np.mean([[one[step] for step in steps] for one in known], axis=0)
        clocks = [np.interp(steps, curve.steps, curve.seconds) for curve in curves if curve.steps]
        left.plot(np.array(steps) * config.tokens_per_step, losses, label=arm, **_style(number))
        right.plot(np.mean(clocks, axis=0), losses, label=arm, **_style(number))
        drawn = True
    left.set_xlabel("tokens trained on")
    right.set_xlabel("training clock (s, without evaluation)")
    left.set_ylabel("validation loss at the trained length\n(nats per token)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _finish(right)
    return drawn


def _context(canvas: Any, runs: RunSet) -> bool:
    lengths = runs.lengths("context")
    if len(lengths) < 2:
        return False
    axes = canvas.subplots()
    for number, arm in enumerate(runs.arms):
        points = {length: runs.mean_loss(arm, length, "context") for length in lengths}
        known = {length: one.mean for length, one in points.items() if one is not None}
        if known:
            axes.plot(list(known), list(known.values()), label=arm, **_style(number))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=[str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context before the scored one (the same tokens at every point)")
    axes.set_ylabel("loss (nats per token)")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, min(top, bottom + np.log(TALLEST)))
    _finish(axes)
    return True


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": "-" if number < len(COLOURS) else "--",
        "markersize": 4.5,
        "linewidth": 1.4,
    }


def _plain_ticks(axes: Any) -> None:
    """Round numbers on a logarithmic axis of perplexities."""
    low, high = axes.get_ylim()
    steps = [mantissa * 10**power for power in range(-1, 7) for mantissa in (1, 1.5, 2, 3, 4, 5, 7)]
    chosen = [step for step in steps if low <= step <= high]
    axes.set_yticks(chosen, labels=[f"{step:g}" for step in chosen])


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")


FIGURES = (
    (
        Figure(
            "extrapolation",
            "Perplexity against context length",
            "Mean over the seeds; bands are 95% intervals over seeds and documents. A curve that "
            "leaves the picture goes on rising.",
        ),
        _extrapolation,
    ),
    (
        Figure(
            "context",
            "What more context is worth",
            "The same tokens, scored with exactly as many tokens before them: without the early "
            "tokens of a window, which have less.",
        ),
        _context,
    ),
    (
        Figure(
            "by_position",
            "Loss by position in the longest window",
            "Where in the window a model fails.",
        ),
        _by_position,
    ),
    (
        Figure(
            "training",
            "Validation during training",
            "Mean over the seeds, against tokens and against the training clock.",
        ),
        _training,
    ),
)
