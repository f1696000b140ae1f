"""One row of plain numbers per measured cell: what tables and figures are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sdebench.report.format import finite, labels, plain

if TYPE_CHECKING:
    import pandas as pd

INFINITE = "infinite variance suspected"
SETTINGS = ("scheme", "backend", "dtype", "device")
ENDS = ("", "_low", "_high")
_COPIED = (
    *("tail_index", "tail_index_low", "tail_index_high"),
    *("drift_evaluations", "vjp_evaluations", "evaluations"),
    *("seconds", "ns_per_path_step"),
)
_TINY = 1e-12  # an exact answer below this is zero up to rounding


def _vector(value: Any) -> list[float]:
    """Return a stored list as floats; [] for a missing one."""
    if value is None or isinstance(value, str) or not hasattr(value, "__iter__"):
        x = finite(value)
        return [] if math.isnan(x) else [x]
    return [finite(v) for v in value]


def _norm(x: Iterable[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in x))


def _norm_interval(low: list[float], high: list[float]) -> tuple[float, float]:
    """Return the range of the norm over a box of simultaneous intervals."""
    if not low or len(low) != len(high):
        return math.nan, math.nan
    ends = list(zip(low, high, strict=True))
    return (
        _norm(max(0.0, a, -b) for a, b in ends),
        _norm(max(abs(a), abs(b)) for a, b in ends),
    )


def _triple(row: dict[str, Any], stem: str) -> list[float]:
    """Return a stored estimate and the ends of its interval."""
    return [finite(row.get(stem + end)) for end in ENDS]


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Return bias and variance of one measured row, relative to the scale of the row.

    Without a scale (the exact answer is zero or unknown) the numbers are absolute, and
    ``absolute`` says so.
    """
    truth, discrete = _vector(row.get("truth")), _vector(row.get("truth_discrete"))
    scale = finite(row.get("scale"))
    if math.isnan(scale):
        scale = _norm(truth) if truth else math.nan
    variance, relative = _triple(row, "variance"), _triple(row, "relative_variance")
    # Zero up to rounding is no scale; nor is an unknown one, where there are numbers.
    absolute = scale <= _TINY or (
        math.isnan(relative[0]) and not math.isnan(variance[0])
    )
    numbers = {}
    if absolute:
        numbers["relative_variance"] = variance
        for part in ("", "_own"):
            numbers[f"relative_bias{part}"] = _absolute_bias(row, part)
        scale = 1.0
    else:
        # Scaled like the estimate, where the row has no ends of its own.
        factor = relative[0] / variance[0] if variance[0] > 0.0 else 1.0
        bounds = [
            v * factor if math.isnan(r) else r
            for r, v in zip(relative, variance, strict=True)
        ]
        numbers["relative_variance"] = [relative[0], *bounds[1:]]
        for part in ("", "_own"):
            numbers[f"relative_bias{part}"] = _triple(row, f"relative_bias{part}")
    out: dict[str, Any] = {"absolute": absolute}
    for stem, triple in numbers.items():
        out |= dict(zip((stem + end for end in ENDS), triple, strict=True))
    gap = _vector(row.get("bias_discretization"))
    if not gap and truth and len(discrete) == len(truth):
        gap = [a - b for a, b in zip(discrete, truth, strict=True)]
    out["relative_bias_discretization"] = _norm(gap) / scale if gap else math.nan
    _round_to_zero(out, str(row.get("dtype") or "float64"))
    return out


def _absolute_bias(row: dict[str, Any], part: str) -> list[float]:
    """Return the debiased norm of the bias and its range over the intervals."""
    value = _vector(row.get(f"bias{part}"))
    if not value:
        return [math.nan] * 3
    spread = _norm(_vector(row.get("std_error")))
    low, high = (_vector(row.get(f"bias{part}{end}")) for end in ENDS[1:])
    return [
        math.sqrt(max(0.0, _norm(value) ** 2 - spread**2)),
        *_norm_interval(low, high),
    ]


def _round_to_zero(out: dict[str, Any], dtype: str) -> None:
    """Set what is rounding of an exact zero to zero: no digits of noise are shown.

    An estimator without variance has a bias interval as wide as the rounding of its
    contributions, which is a few thousand units in the last place.
    """
    unit = 1.2e-7 if "32" in dtype else 2.3e-16
    if out["relative_bias_discretization"] <= 4096.0 * unit:
        out["relative_bias_discretization"] = 0.0
    if not abs(out["relative_variance"]) <= (256.0 * unit) ** 2:
        return
    out |= {f"relative_variance{end}": 0.0 for end in ENDS}
    for stem in ("relative_bias", "relative_bias_own"):
        if abs(out[f"{stem}_high"]) <= 4096.0 * unit:
            out |= {stem + end: 0.0 for end in ENDS}


def _efficiency(row: dict[str, Any], cell: dict[str, Any]) -> dict[str, float]:
    """Return the measured efficiency and its interval.

    Where the row has no interval it follows from those of bias and variance: the
    squared error at n paths is bias² + variance/n, and efficiency is inversely
    proportional to it.
    """
    value, low, high = _triple(row, "efficiency_evaluations")
    if math.isnan(low) or math.isnan(high):
        n = finite(row.get("n_paths"))
        error = [
            cell[f"relative_bias{e}"] ** 2 + cell[f"relative_variance{e}"] / n
            for e in ENDS
        ]
        low = value * error[0] / error[2] if error[2] else math.nan
        high = value * error[0] / error[1] if error[1] else math.nan
    return {"efficiency": value, "efficiency_low": low, "efficiency_high": high}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row of numbers per cell, for tables and figures.

    Parameters
    ----------
    frame : measured rows (`sdebench.run`, `sdebench.load`); columns may be missing.

    Returns
    -------
    pandas.DataFrame
        Names with their options, point, steps and estimand; relative bias in total,
        of the discretization (exact) and of the estimator; relative variance of one
        path; each with the ends of its interval (``_low``, ``_high``); tail index,
        evaluations per path, nanoseconds per path and step, efficiency, verdict, sample
        sizes and origin.  Fractions of the row's scale (the norm of the exact answer;
        1 for log Z, whose error is a relative error of Z), not percent; where there is
        no scale ``absolute`` is true.  Rows that were not measured have NaN in every
        number and a reason.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    problems = _names(rows, "problem", "problem_parameters")
    estimators = _names(rows, "estimator", "estimator_options")
    cells = []
    for row, problem, estimator in zip(rows, problems, estimators, strict=True):
        status = _text(row, "status") or "ok"
        measured = row if status == "ok" else {"dtype": row.get("dtype")}
        cell: dict[str, Any] = {
            "problem": problem,
            "estimator": estimator,
            "point": _point(row),
            "steps": _count(row.get("n_steps")),
            "default_steps": _count(row.get("default_steps")),
            "problem_class": _text(row, "problem_class"),
            "estimand": _text(row, "estimand"),
        }
        cell |= _numbers(measured)
        cell["bias_components"] = _vector(measured.get("bias"))
        cell["bias_std_errors"] = _vector(measured.get("std_error"))
        for key in _COPIED:
            cell[key] = finite(measured.get(key))
        if cell["relative_variance"] == 0.0:  # no tail without a spread
            cell |= {f"tail_index{end}": math.nan for end in ENDS}
        cell |= _efficiency(measured, cell)
        cell["verdict"] = _text(measured, "verdict")
        for key in ("n_replicates", "n_paths"):
            cell[key] = _count(row.get(key))
        cell["confidence"] = finite(row.get("confidence"))
        cell |= {"status": status, "reason": _text(row, "reason")}
        for key in (*SETTINGS, "seed", "commit", "machine", "sdebench_version"):
            cell[key] = _text(row, key)
        cells.append(cell)
    table = pd.DataFrame(cells, columns=None if cells else ["problem", "estimator"])
    for key in ("steps", "default_steps", "n_replicates", "n_paths"):
        if key in table:
            table[key] = table[key].astype("Int64")
    command = frame.attrs.get("command")
    if command is None and "command" in frame:
        command = "; ".join(dict.fromkeys(frame["command"].dropna().map(str)))
    if command:
        table.attrs["command"] = command
    return table


def _names(rows: list[dict[str, Any]], kind: str, parameters: str) -> list[str]:
    """Return the labels stored in the rows, or such as follow from the parameters."""
    made = labels([_text(r, kind) for r in rows], [r.get(parameters) for r in rows])
    return [
        _text(r, f"{kind}_label") or name for r, name in zip(rows, made, strict=True)
    ]


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None or value != value else str(value)


def _count(value: Any) -> int | None:
    x = finite(value)
    return int(x) if math.isfinite(x) else None


def _point(row: dict[str, Any]) -> str:
    """Return the name of the evaluation point, or θ itself where it has none."""
    theta = ", ".join(plain(v) for v in _vector(row.get("theta")))
    return _text(row, "point") or (f"θ = ({theta})" if theta else "")
