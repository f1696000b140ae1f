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


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Return bias and variance of one measured row, relative to the exact answer.

    Where the exact answer is zero nothing is relative to it: the numbers are absolute
    then and ``absolute`` says so.
    """
    truth, discrete = _vector(row.get("truth")), _vector(row.get("truth_discrete"))
    size = _norm(truth) if truth else math.nan
    absolute = bool(truth) and size <= _TINY
    out: dict[str, Any] = {"absolute": absolute}
    stems = ("relative_bias", "relative_bias_own")
    if absolute:
        spread = _norm(_vector(row.get("std_error")))
        for stem, source in zip(stems, ("bias", "bias_own"), strict=True):
            value = _vector(row.get(source))
            low, high = (
                _vector(row.get(f"{source}_low")),
                _vector(row.get(f"{source}_high")),
            )
            out[f"{stem}_low"], out[f"{stem}_high"] = _norm_interval(low, high)
            squared = _norm(value) ** 2 - spread**2 if value else math.nan
            out[stem] = math.sqrt(max(0.0, squared)) if value else math.nan
        for end in ("", "_low", "_high"):
            out[f"relative_variance{end}"] = finite(row.get(f"variance{end}"))
    else:
        for stem in stems:
            for end in ("", "_low", "_high"):
                out[stem + end] = finite(row.get(stem + end))
        relative = finite(row.get("relative_variance"))
        variance = finite(row.get("variance"))
        out["relative_variance"] = relative
        for end in ("_low", "_high"):
            bound = finite(row.get(f"variance{end}"))
            # Scaled like the estimate, so that it needs no exact answer in the row.
            scale = relative / variance if variance > 0.0 else 1.0
            out[f"relative_variance{end}"] = bound * scale
    gap = _vector(row.get("bias_discretization"))
    if not gap and len(discrete) == len(truth):
        gap = [a - b for a, b in zip(discrete, truth, strict=True)]
    out["relative_bias_discretization"] = (
        _norm(gap) / (1.0 if absolute else size) if gap and truth else math.nan
    )
    _round_to_zero(out, str(row.get("dtype") or "float64"))
    return out


def _round_to_zero(out: dict[str, Any], dtype: str) -> None:
    """Set what is rounding of an exact zero to zero: no digits of noise are shown."""
    rounding = 256.0 * (1.2e-7 if "32" in dtype else 2.3e-16)
    variance = out["relative_variance"]
    if not abs(variance) <= rounding**2:
        return
    for end in ("", "_low", "_high"):
        out[f"relative_variance{end}"] = 0.0
        for stem in ("relative_bias", "relative_bias_own"):
            if abs(out[stem + end]) <= rounding:
                out[stem + end] = 0.0


def _efficiency(row: dict[str, Any], cell: dict[str, Any]) -> dict[str, float]:
    """Return the measured efficiency and its interval from those of bias and variance.

    The squared error at n paths is bias² + variance/n; the ends of the intervals of its
    two parts bound it, and efficiency is inversely proportional to it.
    """
    value = finite(row.get("efficiency_evaluations"))
    n = finite(row.get("n_paths"))
    error = [
        cell[f"relative_bias{e}"] ** 2 + cell[f"relative_variance{e}"] / n
        for e in ("", "_low", "_high")
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
        sizes and origin.  Fractions of the norm of the exact answer, not percent; where
        that is zero ``absolute`` is true and the numbers are absolute.  Rows that were
        not measured have NaN in every number and a reason.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    problems = labels(
        [_text(r, "problem") for r in rows], [r.get("problem_parameters") for r in rows]
    )
    estimators = labels(
        [_text(r, "estimator") for r in rows],
        [r.get("estimator_options") for r in rows],
    )
    cells = []
    for row, problem, estimator in zip(rows, problems, estimators, strict=True):
        status = _text(row, "status") or "ok"
        measured = row if status == "ok" else {"dtype": row.get("dtype")}
        cell: dict[str, Any] = {
            "problem": problem,
            "estimator": estimator,
            "point": _point(row),
            "steps": _count(row.get("n_steps")),
            "estimand": _text(row, "estimand"),
        }
        cell |= _numbers(measured)
        for key in ("tail_index", "tail_index_low", "tail_index_high"):
            cell[key] = finite(measured.get(key))
        for key in ("drift_evaluations", "vjp_evaluations", "ns_per_path_step"):
            cell[key] = finite(measured.get(key))
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
    for key in ("steps", "n_replicates", "n_paths"):
        if key in table:
            table[key] = table[key].astype("Int64")
    command = frame.attrs.get("command")
    if command is None and "command" in frame:
        command = "; ".join(dict.fromkeys(frame["command"].dropna().map(str)))
    if command:
        table.attrs["command"] = command
    return table


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
