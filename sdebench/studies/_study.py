"""What a study is: numbers of a source beside ours, without a verdict.

A number of a source is kept as it was printed, ``"0.3830"``: its last digit says how
exact it is.  Ours is exact, an interval of no width, or measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from math import log10
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from sdebench.experiments.experiment import (
    LEVEL,
    Experiment,
    columns,
    interval_of,
    records,
    signed,
)
from sdebench.measure.intervals import Interval
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED, DERIVED = "published", "derived"
"""Origins of a number: printed or drawn in a paper; worked out from its formulae."""
EQUAL, INSIDE, OUTSIDE = "equal", "inside", "outside"


@dataclass(frozen=True)
class Study(Experiment):
    """A table of comparisons, and a figure or none.

    Class attributes
    ----------------
    subject : what is set beside what, in one or two sentences.
    """

    subject: ClassVar[str]

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return comparison_table(evidence)

    def figure(self, evidence: pd.DataFrame) -> Figure | None:
        return None


def level_of_each(n_intervals: int) -> float:
    """Return the level of each of so many intervals that hold jointly at `LEVEL`."""
    return 1.0 - (1.0 - LEVEL) / n_intervals


def compared(
    quantity: str, printed: str, ours: Interval, origin: str = DERIVED
) -> dict[str, Any]:
    """Return a row of evidence: a number of the source, as printed, beside ours.

    A study may add columns of its own.
    """
    row = {"quantity": quantity, "printed": printed, "origin": origin}
    return row | columns(ours)


def agreement(printed: str, ours: Interval) -> str:
    """Return how the number as printed lies to ours.

    An exact number of ours is ``equal`` if it is the printed one to the last digit,
    else the difference is said; a measured one has the printed one ``inside`` its
    interval or ``outside``, with the difference.
    """
    source, half_unit = float(printed), _half_unit(printed)
    value, low, high = ours
    difference = plain(value - source, 2).replace("-", "−")
    difference = difference if value < source else f"+{difference}"
    if low == high:
        return EQUAL if abs(value - source) <= half_unit * (1.0 + 1e-9) else difference
    if low - half_unit <= source <= high + half_unit:
        return INSIDE
    return f"{OUTSIDE}, {difference}"


def comparison_table(evidence: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `compared` as texts."""
    return pd.DataFrame(
        [
            {
                "quantity": row.quantity,
                "source": f"{row.printed} ({row.origin})",
                "ours": text_of(interval_of(row), row.printed),
                "agreement": agreement(row.printed, interval_of(row)),
            }
            for row in records(evidence)
        ]
    )


def count_agreeing(evidence: pd.DataFrame) -> int:
    """Return the number of rows that are equal or inside."""
    found = [agreement(row.printed, interval_of(row)) for row in records(evidence)]
    return sum(text in (EQUAL, INSIDE) for text in found)


def text_of(ours: Interval, printed: str) -> str:
    """Return our number; an exact one with a digit more than the printed one."""
    value, low, high = ours
    decimals = -int(_exponent(printed))
    if low == high:
        return f"{value:.{max(decimals + 1, 0)}f}" if value else "0 (exact)"
    if low <= 0.0:
        return signed(ours, max(decimals, 2 - round(log10(high - low))))
    return interval(*ours)


def _exponent(printed: str) -> int:
    return int(Decimal(printed).as_tuple().exponent)


def _half_unit(printed: str) -> float:
    return 0.5 * 10.0 ** _exponent(printed)
