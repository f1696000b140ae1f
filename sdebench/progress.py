"""Progress of a run: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

SECONDS_BETWEEN_LINES = 5.0


class Work(Protocol):
    """Anything that is worked through; its text is what a line says of it."""

    @property
    def work(self) -> int:
        """Its size, in units of the time left."""


class Progress:
    """Shows how far a run is; a context manager.

    Parameters
    ----------
    visible : False shows nothing at all.
    stream : where to write; standard error by default, so that data can be piped.
    """

    def __init__(self, visible: bool = True, stream: TextIO | None = None) -> None:
        self.visible = visible
        self.stream = stream or sys.stderr
        self.counts: Counter[str] = Counter()
        self.total = self.finished = 0
        self.work = self.work_done = 0
        self.begin = self.last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        """Start the bar, on a terminal."""
        if self.visible and self.stream.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.fields[cells]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(elapsed_when_finished=False),
                console=Console(file=self.stream),
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state of the bar on the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if not self.visible:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def start(self, cells: Sequence[Work], total: int) -> None:
        """Announce the cells to be measured, out of ``total``."""
        self.total = total
        self.finished = total - len(cells)
        self.work = sum(cell.work for cell in cells)
        self.begin = self.last_line = time.monotonic()
        kept = f", {self.finished} of {total} kept" if self.finished else ""
        self.say(f"measuring {len(cells)} cells{kept}")
        if self._bar is not None:
            self._task = self._bar.add_task(
                "measuring", total=self.work, cells=f"{self.finished}/{total}"
            )

    def done(self, cell: Work, status: str, reason: str) -> None:
        """Count one finished cell; a failure is said at once."""
        self.counts[status] += 1
        self.finished += 1
        self.work_done += cell.work
        if status == "failed":
            self.say(f"failed: {cell}: {reason}")
        if self._bar is not None:
            cells = f"{self.finished}/{self.total}"
            self._bar.update(self._task, completed=self.work_done, cells=cells)
            return
        now = time.monotonic()
        if self.finished == self.total or now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            self.say(self._line(now - self.begin))

    def _line(self, seconds: float) -> str:
        failed = f", {self.counts['failed']} failed" if self.counts["failed"] else ""
        line = f"{self.finished}/{self.total} cells{failed}, {seconds:.0f} s"
        # The first cells compile kernels: they say nothing about the others.
        if self.work_done < 0.1 * self.work:
            return line
        left = seconds * (self.work - self.work_done) / self.work_done
        return f"{line}, {left:.0f} s left"
