"""Which cells a figure shows, and the numbers it derives from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sdebench.errors import ResultsError, unknown
from sdebench.problem import ESTIMANDS
from sdebench.report.format import fold, short_labels
from sdebench.report.summarize import summary

if TYPE_CHECKING:
    import pandas as pd

    from sdebench.measure.order import OrderFit

Cell = dict[str, Any]
_FURTHEST = 1e4
_ROUNDING = 1e-9


def choose(frame: pd.DataFrame, point: str | None, steps: int | None) -> list[Cell]:
    """Return the measured and unmeasured cells at one point, one row per setting.

    The point is ``halfway`` by default, or the first one.  Of cells that differ only in
    backend, precision or device the one with the most paths is kept.
    """
    table = frame if "absolute" in frame.columns else summary(frame)
    cells: list[Cell] = table.to_dict("records")  # type: ignore[assignment]
    points = list(dict.fromkeys(c["point"] for c in cells))
    if not points:
        raise ResultsError("the frame has no rows; run `sdebench run` first")
    if point is None:
        point = "halfway" if "halfway" in points else points[0]
    if point not in points:
        raise unknown("evaluation point", point, points)
    kept: dict[tuple[str, ...], Cell] = {}
    schemes = {c["scheme"] for c in cells if c["scheme"]}
    for cell in cells:
        if cell["point"] != point or (steps is not None and cell["steps"] != steps):
            continue
        if len(schemes) > 1 and cell["scheme"]:
            mark = "," if ":" in cell["estimator"] else ":"
            cell["estimator"] += f"{mark}scheme={cell['scheme']}"
        keys = ("problem", "estimator", "estimand", "steps", "status")
        key = tuple(str(cell[k]) for k in keys)
        if key not in kept or n_total(cell) > n_total(kept[key]):
            kept[key] = cell
    return [_open_ends(c) for c in kept.values()]


def _open_ends(cell: Cell) -> Cell:
    """Return the cell with an upper end far beyond its estimate drawn as infinite.

    The interval of a variance under heavy tails spans any number of powers of ten,
    and one such end would press all else into a corner.  So would a bias of the size
    of rounding, which is drawn as zero.
    """
    far = {
        f"{stem}_high": math.inf
        for stem in ("relative_bias", "relative_bias_own", "relative_variance")
        if cell[f"{stem}_low"] > 0.0 and cell[f"{stem}_high"] > _FURTHEST * cell[stem]
    }
    for stem in ("relative_bias", "relative_bias_own"):
        if cell[f"{stem}_low"] <= 0.0 <= cell[f"{stem}_high"] < _ROUNDING:
            far |= {f"{stem}_low": 0.0, f"{stem}_high": 0.0}
    return cell | far


def require(cells: list[Cell], key: str, what: str) -> list[Cell]:
    """Return the measured cells that have a number; raise if there are none."""
    ok = [c for c in cells if c["status"] == "ok" and c[key] == c[key]]
    if not ok:
        raise ResultsError(
            f"none of {len(cells)} cells has a {what}; measure some with "
            "`sdebench run`, or choose another point"
        )
    return ok


def _known(x: Any) -> bool:
    return x is not None and x == x


def n_total(cell: Cell) -> float:
    """Return the number of paths over all replicates; 0 if not recorded."""
    n, r = cell["n_paths"], cell["n_replicates"]
    return float(n) * float(r) if _known(n) and _known(r) else 0.0


def n_steps(cell: Cell) -> int:
    """Return the number of time steps; 0 if not recorded."""
    return int(cell["steps"]) if _known(cell["steps"]) else 0


def by_problem(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Return the cells of each problem, in order of appearance."""
    out: dict[str, list[Cell]] = {}
    for cell in cells:
        out.setdefault(cell["problem"], []).append(cell)
    return out


def one_step_count(cells: list[Cell]) -> list[Cell]:
    """Keep per problem its default number of steps, or the one most cells share."""
    out = []
    for mine in by_problem(cells).values():
        counts: dict[int, int] = {}
        for c in mine:
            counts[n_steps(c)] = counts.get(n_steps(c), 0) + 1
        default = mine[0].get("default_steps")
        best = max(counts, key=lambda n: (n == default, counts[n], n))
        out += [c for c in mine if n_steps(c) == best]
    return out


def ladders(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Return the problems measured with two or more different numbers of steps."""
    ok = by_problem(c for c in cells if c["status"] == "ok" and n_steps(c) > 0)
    return {k: v for k, v in ok.items() if len({n_steps(c) for c in v}) > 1}


def series(cells: list[Cell], names: Iterable[str]) -> list[tuple[str, list[Cell]]]:
    """Return the cells of each estimator, in the order given, by number of steps."""
    out = []
    for name in names:
        mine = sorted((c for c in cells if c["estimator"] == name), key=n_steps)
        if mine:
            out.append((name, mine))
    return out


def estimands(cells: Iterable[Cell]) -> list[str]:
    """Return what is estimated, the gradient first."""
    found = list(dict.fromkeys(c["estimand"] for c in cells if c["estimand"]))
    order = [e for e in ESTIMANDS if e in found]
    return order + [e for e in found if e not in order]


def problem_labels(cells: list[Cell]) -> dict[str, str]:
    """Return short names of problems, with the number of steps where it differs."""
    short = short_labels(c["problem"] for c in cells)
    steps = {c["problem"]: n_steps(c) for c in cells}
    if len(set(steps.values())) > 1:
        return {k: f"{fold(v)}\nN = {steps[k]}" for k, v in short.items()}
    return {k: fold(v) for k, v in short.items()}


def squared_error(cell: Cell, n: float) -> tuple[float, float, float]:
    """Return the squared error of an average of n paths and the ends of its interval.

    It is bias² + variance/n, relative as these are.  A bias that is not told apart from
    zero counts as zero in the estimate and with its upper end in the interval.
    """
    out = []
    for end in ("", "_low", "_high"):
        bias = cell[f"relative_bias{end}"]
        if not bias > 0.0 or (end == "" and not cell["relative_bias_low"] > 0.0):
            bias = 0.0
        out.append(bias * bias + cell[f"relative_variance{end}"] / n)
    return out[0], out[1], out[2]


def slope(ladder: list[Cell]) -> OrderFit | None:
    """Return the weak order of a ladder of step counts, or None if undetermined."""
    from sdebench.measure.order import fit_order

    usable = [c for c in ladder if c["bias_components"] and any(c["bias_std_errors"])]
    if len({n_steps(c) for c in usable}) < 3:
        return None
    fit = fit_order(
        [1.0 / n_steps(c) for c in usable],
        [c["bias_components"] for c in usable],
        [c["bias_std_errors"] for c in usable],
    )
    return None if fit.undetermined else fit
