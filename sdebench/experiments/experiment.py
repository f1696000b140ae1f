"""What an experiment is: named by its file, evidence as a tidy frame, shown as texts.

The intervals of one experiment hold all at once with probability 1 - `ERROR_RATE` at
least.  An exact number is an interval of no width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.measure.intervals import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ERROR_RATE = 0.001
"""Largest probability that one of an experiment's intervals misses its number."""
LEVEL = 1.0 - ERROR_RATE
"""Joint confidence level of all intervals of one experiment."""

Progress = Callable[[int, int], None]
"""Called with the work done and the whole work."""


@dataclass(frozen=True)
class Experiment(ABC):
    """Numbers with intervals, a table and a figure of them.

    The evidence is a tidy frame: one row per number with the ends of its interval,
    and columns that say what it is.

    Class attributes
    ----------------
    source : who says so, and where.
    procedure : what is computed and simulated.
    """

    source: ClassVar[str]
    procedure: ClassVar[str]

    @property
    def name(self) -> str:
        """The file's stem, the experiment's name everywhere."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        """Return the evidence; the same seed gives the same numbers."""

    @abstractmethod
    def summary(self, evidence: pd.DataFrame) -> str:
        """Return one sentence with the main numbers, true whatever they are."""

    @abstractmethod
    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        """Return the main numbers as texts, for the page."""

    @abstractmethod
    def figure(self, evidence: pd.DataFrame) -> Figure | None:
        """Return the figure of the main numbers, or None."""


def records(frame: pd.DataFrame) -> list[Any]:
    """Return the rows of a frame, columns as attributes and the index as ``Index``."""
    return list(frame.itertuples())


def columns(interval: Interval) -> dict[str, float]:
    """Return the columns of evidence that hold a number and its interval."""
    return dict(zip(("value", "low", "high"), interval, strict=True))


def interval_of(row: Any) -> Interval:
    """Return the columns ``value``, ``low`` and ``high`` of a row of evidence."""
    return Interval(*(float(getattr(row, name)) for name in ("value", "low", "high")))


def exact(value: float) -> Interval:
    """Return an exact number, an interval of no width."""
    return Interval(value, value, value)


def signed(interval: Interval, decimals: int = 2) -> str:
    """Return a number that may be negative with its interval, ends rounded outwards.

    `sdebench.report.format.interval` is for sizes, which are never negative.
    """
    value, low, high = interval
    if low == high:
        return f"{value:.{decimals}f}"
    scale = 10.0**decimals
    low, high = floor(low * scale) / scale, ceil(high * scale) / scale
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"
