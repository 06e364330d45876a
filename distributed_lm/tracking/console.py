"""A run on the terminal: a progress line that stays, or one plain line per record in a log."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

# Of the newest step time in the running mean behind the ETA.
SMOOTHING = 0.1


class Console:
    """Shows records on standard output.

    On a terminal, train records move one progress line, and everything else is printed above it.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._console = rich.console.Console(highlight=False, markup=False, soft_wrap=True)
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._progress: Progress | None = None
        self._mean_step_seconds: float | None = None

    def say(self, line: str) -> None:
        """Print one line of text."""
        self._console.print(line)

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "train":
            self._show_train(values)
        elif kind == "evaluation":
            self.say(evaluation_line(values))
        else:
            self.say(event_line(values))

    def finish(self, exit_code: int = 0) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show_train(self, values: Mapping[str, Any]) -> None:
        step = values["step"]
        text = train_text(values, LIVE_NUMBERS if self._live else tuple(NUMBERS))
        eta = self._remaining_seconds(step, values.get("step_seconds"))
        if eta is not None:
            text += f" eta {timedelta(seconds=round(eta))}"
        if not self._live:
            self.say(f"step {step}/{self._total_steps} {text}")
            return
        if self._progress is None:
            self._progress = self._start_progress()
        self._progress.update(self._progress.task_ids[0], completed=step, text=text)

    def _start_progress(self) -> Progress:
        progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
        )
        progress.add_task("training", total=self._total_steps, text="")
        progress.start()
        return progress

    def _remaining_seconds(self, step: int, step_seconds: float | None) -> float | None:
        if step_seconds is None:
            return None
        mean = self._mean_step_seconds
        mean = step_seconds if mean is None else mean + SMOOTHING * (step_seconds - mean)
        self._mean_step_seconds = mean
        return max(0, self._total_steps - step) * mean


def train_text(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """The numbers of a train record called ``names``, as far as it has them."""
    return " ".join(NUMBERS[name](values[name]) for name in names if values.get(name) is not None)


def evaluation_line(values: Mapping[str, Any]) -> str:
    return (
        f"step {values['step']} evaluation {values['split']} length {values['length']}: "
        f"perplexity {values['perplexity']:.3f} loss {values['loss']:.4f} "
        f"({values['tokens_scored']:,} tokens, {values['protocol']})"
    )


def event_line(values: Mapping[str, Any]) -> str:
    return f"step {values.get('step', 0)} {values['event']}: {values.get('message', '')}"


def short_number(value: float) -> str:
    """Three digits or so: 950, 12.3k, 4.56M."""
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"


# How a person wants to read the numbers of a train record.
NUMBERS: Mapping[str, Callable[[float], str]] = MappingProxyType(
    {
        "loss": "loss {:.4f}".format,
        "grad_norm": "grad {:.2f}".format,
        "learning_rate": "lr {:.1e}".format,
        "tokens_per_second": lambda value: f"{short_number(value)} tok/s",
        "mfu": "mfu {:.1%}".format,
    }
)
# Those that fit beside a progress bar in 80 columns.
LIVE_NUMBERS = ("loss", "tokens_per_second", "mfu")
