"""asv: bias, variance and efficiency of the estimators on a small fixed grid.

asv takes every tracked number for a cost, lower is better, and compares ratios without
error bars.  So each is deterministic (counter-based noise, fixed seed), and what is
tracked is the size of the error, the variance, and the work for a given error.
"""

from __future__ import annotations

import math
from typing import Any

PROBLEMS = ["brownian_linear", "ou_linear:dim=4", "two_modes"]
ESTIMATORS = ["pathwise", "reinforce", "adjoint_matching", "path_importance_sampling"]
SETTINGS: dict[str, Any] = {
    "n_steps": 25,
    "n_paths": 256,
    "n_replicates": 16,
    "seed": 1,
}

Cell = tuple[float, float, float] | None


def as_track(value: Any) -> float:
    """Return a number that asv can store and compare.

    Infinity would hang ``asv publish``, a negative number would be compared the wrong
    way round, and an array or a float32 cannot be stored.

    Parameters
    ----------
    value : a real number, or None where the quantity does not exist.

    Raises
    ------
    SkipNotImplemented
        For None: asv shows "n/a".
    ValueError
        For NaN, infinity, a negative number or something that is not a number.
    """
    if value is None:
        from asv_runner.benchmarks.mark import SkipNotImplemented

        raise SkipNotImplemented("not applicable")
    if isinstance(value, bool | str | bytes):
        raise ValueError(f"not a number: {value!r}")
    try:
        number = float(value)
    except TypeError as error:
        raise ValueError(f"not a number: {value!r}") from error
    if not math.isfinite(number) or number < 0.0:
        raise ValueError(f"a tracked number must be finite and >= 0, got {number}")
    return number


def cell(problem: str, estimator: str) -> Cell:
    """Return relative error, relative variance and MSE times cost of one cell.

    All are relative to the norm of the exact answer.  None if the estimator does not
    apply or there is no exact answer.
    """
    import sdebench

    try:
        row = sdebench.measure(problem, estimator, **SETTINGS).row
    except sdebench.NotApplicableError:
        return None
    if row["bias"] is None:
        return None
    evaluations = row["evaluations"] * row["n_paths"]
    return (
        math.hypot(*row["bias"]) / row["scale"],
        row["relative_variance"],
        row["mse"] / row["scale"] ** 2 * evaluations,
    )


class Accuracy:
    """Size of the error, variance and inverse efficiency of each estimator."""

    version = "1"
    unit = "relative"
    timeout = 240
    param_names = ("problem", "estimator")
    params = (PROBLEMS, ESTIMATORS)

    def setup_cache(self) -> dict[tuple[str, str], Cell]:
        return {(p, e): cell(p, e) for p in PROBLEMS for e in ESTIMATORS}

    setup_cache.timeout = 600  # type: ignore[attr-defined]

    def _track(self, table: Any, problem: str, estimator: str, index: int) -> float:
        found = table[problem, estimator]
        return as_track(None if found is None else found[index])

    def track_bias(self, table: Any, problem: str, estimator: str) -> float:
        return self._track(table, problem, estimator, 0)

    def track_variance(self, table: Any, problem: str, estimator: str) -> float:
        return self._track(table, problem, estimator, 1)

    def track_inverse_efficiency(
        self, table: Any, problem: str, estimator: str
    ) -> float:
        return self._track(table, problem, estimator, 2)
