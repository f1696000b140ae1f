"""What a claim is, and how it is decided.

Every number that decides a claim has an interval, and a region where it must lie if
the claim is true.  The intervals of a claim hold all at once with probability
1 - `ERROR_RATE` at least, so that a wrong "supported" or "refuted" has at most the
probability `ERROR_RATE`, whatever the truth is: such a verdict needs an interval that
misses its number.  An exact number is an interval of no width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.measure.intervals import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ERROR_RATE = 0.001
"""Largest probability of a wrong verdict of one claim."""
LEVEL = 1.0 - ERROR_RATE
"""Joint confidence level of all intervals of one claim."""

JOINTLY = (
    f"hold together with probability {100 * LEVEL:.1f} %: a wrong verdict has at most "
    f"the probability {100 * ERROR_RATE:.1f} %."
)
"""How every rule ends: the error rate of the decision."""

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
HOLDS, FAILS, OPEN = "holds", "fails", "open"

Progress = Callable[[int, int], None]
"""Called with the work done and the whole work."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A number that must lie between ``least`` and ``most`` if the claim is true.

    ``quantity`` says which number; ``unit`` stands behind it.
    """

    quantity: str
    interval: Interval
    least: float = -inf
    most: float = inf
    unit: str = ""

    @property
    def outcome(self) -> str:
        """``holds`` or ``fails`` if the whole interval agrees on it, else ``open``."""
        _, low, high = self.interval
        if self.least <= low and high <= self.most:
            return HOLDS
        return FAILS if high < self.least or low > self.most else OPEN


@dataclass(frozen=True)
class Decision:
    """The verdict, one sentence with the numbers, and the checks behind it."""

    verdict: str
    sentence: str
    checks: Sequence[Check]


@dataclass(frozen=True)
class Claim(ABC):
    """A statement, its experiment and its decision.

    The evidence is a tidy frame: one row per number with the ends of its interval,
    and columns that say what it is.

    Class attributes
    ----------------
    statement : what is claimed, in our words, precise enough to be false.
    source : who says so, and where.
    procedure : what is computed and simulated.
    decision_rule : what the numbers must be, and the probability of a wrong verdict.
    """

    statement: ClassVar[str]
    source: ClassVar[str]
    procedure: ClassVar[str]
    decision_rule: ClassVar[str]

    @property
    def name(self) -> str:
        """The file's stem, the claim's name everywhere."""
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        """Return the evidence; the same seed gives the same numbers."""

    @abstractmethod
    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        """Return the numbers that decide the claim."""

    @abstractmethod
    def summary(self, evidence: pd.DataFrame) -> str:
        """Return one sentence with the main numbers, true whatever the verdict."""

    @abstractmethod
    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        """Return the main numbers as texts, for the page."""

    @abstractmethod
    def figure(self, evidence: pd.DataFrame) -> Figure:
        """Return the figure behind the verdict."""

    def decide(self, evidence: pd.DataFrame) -> Decision:
        """Return the decision that the rule prescribes."""
        checks = self.checks(evidence)
        outcomes = {check.outcome for check in checks}
        verdict = UNDECIDED
        if FAILS in outcomes:
            verdict = REFUTED
        elif outcomes == {HOLDS}:
            verdict = SUPPORTED
        return Decision(verdict, self.summary(evidence), checks)


def records(frame: pd.DataFrame) -> list[Any]:
    """Return the rows of a frame, columns as attributes and the index as ``Index``."""
    return list(frame.itertuples())


def columns(interval: Interval) -> dict[str, float]:
    """Return the columns of evidence that hold a number and its interval."""
    return dict(zip(("value", "low", "high"), interval, strict=True))


def interval_of(row: Any) -> Interval:
    """Return the columns ``value``, ``low`` and ``high`` of a row of evidence."""
    return Interval(*(float(getattr(row, name)) for name in ("value", "low", "high")))


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
