"""What a claim is, and how it is decided.

Every number that decides a claim has an interval, and a region where it must lie if
the claim is true.  The intervals of a claim hold all at once with probability
1 - `ERROR_RATE` at least, so that a wrong "supported" or "refuted" has at most the
probability `ERROR_RATE`, whatever the truth is: such a verdict needs an interval that
misses its number.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar

from sdebench.experiments.experiment import ERROR_RATE, LEVEL, Experiment
from sdebench.measure.intervals import Interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

JOINTLY = (
    f"hold together with probability {100 * LEVEL:.1f} %: a wrong verdict has at most "
    f"the probability {100 * ERROR_RATE:.1f} %."
)
"""How every rule ends: the error rate of the decision."""

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"
HOLDS, FAILS, OPEN = "holds", "fails", "open"


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
class Claim(Experiment):
    """A statement, its experiment and its decision.

    Class attributes
    ----------------
    statement : what is claimed, in our words, precise enough to be false.
    decision_rule : what the numbers must be, and the probability of a wrong verdict.
    """

    statement: ClassVar[str]
    decision_rule: ClassVar[str]

    @abstractmethod
    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        """Return the numbers that decide the claim."""

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
