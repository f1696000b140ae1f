"""The rows that a first look needs, of all that a suite measured."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

HEADLINE_COLUMNS = (
    "problem",
    "estimator",
    "bias",
    "discretization",
    "own",
    "variance",
    "cost",
    "time",
    "verdict",
)

LABELS = {
    "problem": "problem_label",
    "estimator": "estimator_label",
    "point": "point",
}
"""The column that a filter of rows reads."""


def headline(
    frame: pd.DataFrame, points: Collection[str] = ("halfway",)
) -> pd.DataFrame:
    """Return the cells with every setting at its default, at some evaluation points.

    One row per problem, estimator and point: default parameters, options and steps,
    numba, float64, Euler-Maruyama.  Empty if none was measured.
    """
    if not len(frame):
        return frame
    # of a problem that torch alone can simulate there is nothing else
    backends = frame["backend"].groupby(frame["problem_label"])
    plain = (
        (frame["problem_label"] == frame["problem"])
        & (frame["estimator_label"] == frame["estimator"])
        & (frame["n_steps"] == frame["default_steps"])
        & frame["point"].isin(list(points))
        & (frame["backend"] == backends.transform("min"))
        & (frame["dtype"] == "float64")
        & (frame["scheme"] == "euler_maruyama")
    )
    chosen = frame[plain]
    chosen.attrs.update(frame.attrs)
    return chosen
