"""The plots of ``docs/benchmarks.md``, where a picture says more than the table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot

COLOURS = ("#1f6f8b", "#c8553d", "#7a9e4e", "#8a6fb0", "#d9a441", "#555555")
GREY = "#888888"


def draw(benchmark: str, content: dict[str, Any], path: Path) -> bool:
    """Writes ``path`` if there is a plot of that benchmark's results; returns whether."""
    if benchmark not in PLOTS or not content["rows"]:
        return False
    figure = PLOTS[benchmark](content)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    return True


def attention(content: dict[str, Any]) -> Any:
    """TFLOP/s, forward and backward, by length: a panel for each precision and head dim."""
    rows = [row for row in content["rows"] if row["pass"] == "forward + backward"]
    panels = list(dict.fromkeys((row["precision"], row["head dim"]) for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    lengths = sorted({row["L"] for row in rows})
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 3.2), squeeze=False, sharex=True
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for colour, kernel in zip(COLOURS, kernels, strict=False):
            points = [
                (row["L"], row["TFLOP/s"])
                for row in rows
                if (row["precision"], row["head dim"], row["kernel"]) == (*panel, kernel)
            ]
            baseline = "no bias" in kernel
            axis.plot(
                *zip(*points, strict=True) if points else ([], []),
                color=colour,
                marker="o",
                markersize=4,
                linestyle="--" if baseline else "-",
                label=kernel if baseline else f"{kernel}, ALiBi",
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [_length(length) for length in lengths])
        axis.set_ylim(bottom=0)
        axis.set_title(f"{panel[0]}, head dim {panel[1]}", fontsize=10)
        axis.set_xlabel("L, tokens")
        _tidy(axis)
    axes[0][0].set_ylabel("TFLOP/s, causal half")
    _legend_below(figure, axes[0][0])
    figure.tight_layout()
    return figure


def claims(content: dict[str, Any]) -> Any:
    """Time and memory of each case."""
    rows = content["rows"]
    memory = next(name for name in rows[0] if name.startswith("peak MiB"))
    labels = [f"{row['position']}, L={row['L']}, {row['kernel']}" for row in rows]
    return _bars(rows, labels, {"s/step": "seconds per step", memory: memory})


def train_step(content: dict[str, Any]) -> Any:
    """Tokens per second of each case, and what they would be at a matrix product's rate."""
    rows = content["rows"]
    labels = [f"{row['case']}, {row['precision']}" for row in rows]
    # Figures inside the bars: beside them stand the marks.
    figure = _bars(
        rows, labels, {"tokens/s": "tokens per second"}, label_type="center", color="white"
    )
    walls = [row["tokens/s"] / row["of matrix product, full"] for row in rows]
    [axis] = figure.axes
    axis.scatter(walls, range(len(rows)), marker="|", s=140, color=GREY, label="matrix product")
    _legend_below(figure, axis)
    return figure


def ratios(content: dict[str, Any]) -> Any:
    """Each ratio with its quartiles; 1 is as good as what it is compared with."""
    names = list(content["ratios"])
    values = list(content["ratios"].values())
    figure, axis = pyplot.subplots(figsize=(6.5, 0.6 + 0.34 * len(names)))
    medians = [one["value"] for one in values]
    spread = [
        [one["value"] - one["low"] for one in values],
        [one["high"] - one["value"] for one in values],
    ]
    axis.barh(names, medians, xerr=spread, color=COLOURS[0], ecolor=GREY, height=0.6)
    axis.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axis.invert_yaxis()
    _tidy(axis)
    return figure


def _bars(
    rows: list[dict[str, Any]], labels: list[str], columns: dict[str, str], **figures: Any
) -> Any:
    """A panel of horizontal bars for each column, the figures written beside them, or as
    ``figures`` says to ``bar_label``."""
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(4.6 * len(columns), 0.6 + 0.34 * len(rows)), squeeze=False
    )
    for index, (axis, (column, title)) in enumerate(zip(axes[0], columns.items(), strict=True)):
        places = range(len(rows))
        bars = axis.barh(places, [row[column] for row in rows], color=COLOURS[index], height=0.6)
        values = [f"{row[column]:,.4g}" for row in rows]
        axis.bar_label(bars, values, **{"padding": 3, "fontsize": 8, **figures})
        axis.set_yticks(places, labels if index == 0 else [""] * len(rows), fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        _tidy(axis)
    figure.tight_layout()
    return figure


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _legend_below(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=len(labels),
        frameon=False,
        fontsize=9,
    )


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


PLOTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "attention": attention,
    "claims": claims,
    "train_step": train_step,
    "parallel": ratios,
}
