"""Show how far preparing is: a bar on a terminal, a plain line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class TokenizingProgress:
    """Counts documents and bytes of text, and how much of the input on disk they came from.

    Args:
        total_bytes: input bytes on disk, 0 if not known.
        shards: number of shards to do, which measures progress if the bytes are not known.
    """

    def __init__(self, console: Console, total_bytes: int, shards: int) -> None:
        self._console = console
        self._by_bytes = total_bytes > 0
        self._total = total_bytes if self._by_bytes else shards
        self._finished = 0
        self._bytes_in_progress = 0
        self.documents = 0
        self.text_bytes = 0
        self._start = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("tokenising"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("tokenising", total=self._total, rates="")

    def __enter__(self) -> "TokenizingProgress":
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        if kind is None:
            self._console.print(
                f"tokenised {self._rates()} in {self._seconds():.1f} s", highlight=False
            )

    def update(self, documents: int, text_bytes: int) -> None:
        self.documents += documents
        self.text_bytes += text_bytes
        self._bytes_in_progress += text_bytes
        self._show()

    def finish_shard(self, size: int) -> None:
        """Count a shard of ``size`` input bytes as done."""
        self._finished += size if self._by_bytes else 1
        # Text is not as long as the file it came from (markup, compression): start over.
        self._bytes_in_progress = max(0, self._bytes_in_progress - size)
        self._show()

    def _show(self) -> None:
        done = self._finished + (self._bytes_in_progress if self._by_bytes else 0)
        done = min(done, self._total)
        self._bar.update(self._task, completed=done, rates=self._short_rates())
        now = time.monotonic()
        if self._console.is_terminal or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = self._seconds() * (self._total - done) / done if done else float("nan")
        self._console.print(
            f"tokenising {100 * done / max(1, self._total):.0f}%: {self._rates()}, "
            f"about {left:.0f} s left",
            highlight=False,
        )

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-6)

    def _rates(self) -> str:
        seconds, megabytes = self._seconds(), self.text_bytes / 1e6
        return (
            f"{self.documents:,} documents ({self.documents / seconds:,.0f}/s), "
            f"{megabytes:,.1f} MB ({megabytes / seconds:,.1f} MB/s)"
        )

    def _short_rates(self) -> str:
        """For the bar, which has to fit a narrow terminal."""
        seconds = self._seconds()
        return (
            f"{self.documents / seconds:,.0f} documents/s, "
            f"{self.text_bytes / 1e6 / seconds:,.1f} MB/s"
        )
