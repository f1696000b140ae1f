"""Figures of measured cells: bias, variance, work–precision and weak order.

Every figure takes the frame of measurements and returns a matplotlib ``Figure`` that is
not registered with pyplot; `figures` writes them all.  Color is the estimator (shade
and line style its variant), marker the family of the problem, in every figure alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdebench.errors import ResultsError, unknown
from sdebench.report import cells as cell_tools
from sdebench.report.cells import Cell, choose, one_step_count, require
from sdebench.report.dots import dot_figure
from sdebench.report.panels import (
    draw_order,
    draw_variance,
    draw_work,
    panel_figure,
    step_ticks,
)
from sdebench.report.style import COLUMN, PAGE, key, style
from sdebench.report.summarize import summary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "COLUMN",
    "PAGE",
    "bias_figure",
    "figures",
    "order_figure",
    "variance_figure",
    "work_precision_figure",
]

FORMATS = ("png", "svg", "pdf")
_ROW_PER_ESTIMATOR = ("bias", "variance")
_TOGETHER = 4


def _percent(x: float, _position: int = 0) -> str:
    """Return a tick label in percent without needless digits."""
    return f"{100.0 * x:.0f} %" if x >= 0.01 else f"{100.0 * x:.4g} %"


def _ticks(cells: list[Cell]) -> Callable[[float, int], str]:
    """Return the text of bias ticks: percent, unless some numbers are absolute."""
    if any(c["absolute"] for c in cells):
        return lambda x, _: f"{x:.4g}"
    return _percent


def _relative(what: str, cells: list[Cell]) -> str:
    """Return an axis label that owns up to numbers that cannot be relative."""
    if any(c["absolute"] for c in cells):
        return f"{what} (absolute where there is no scale)"
    return what


def bias_figure(
    frame: pd.DataFrame,
    *,
    point: str | None = None,
    steps: int | None = None,
    width: float = PAGE,
) -> Figure:
    """Return relative bias with simultaneous intervals, per problem and estimator.

    Left the whole bias, with the exact discretization bias as a line where it is known;
    right the estimator's own bias, where the split is exact (not in narrow figures).
    A bar with an arrow is an interval that reaches zero.

    Parameters
    ----------
    frame : measured rows or their `summary`.
    point : evaluation point; default ``halfway``, or the first one.
    steps : number of time steps; default the one that most cells of a problem share.
    width : inches; ``PAGE`` or ``COLUMN``.

    Raises
    ------
    ResultsError
        If no cell at that point has a bias.
    UnknownNameError
        For a point that was not measured.
    """
    cells = one_step_count(choose(frame, point, steps))
    ok = require(cells, "relative_bias_high", "bias with an interval")
    panels = [("relative_bias", _relative("relative bias", ok))]
    if width > COLUMN + 1.0 and any(c["relative_bias_own_high"] >= 0.0 for c in ok):
        panels.append(("relative_bias_own", "relative bias of the estimator alone"))
    return dot_figure(cells, panels, width, _ticks(ok))


def variance_figure(
    frame: pd.DataFrame,
    *,
    point: str | None = None,
    steps: int | None = None,
    against: str = "auto",
    width: float = PAGE,
) -> Figure:
    """Return the relative variance of one path, per problem and estimator.

    Parameters
    ----------
    against : ``"steps"`` draws it against the number of time steps, ``"problems"`` as
        one row per estimator; ``"auto"`` takes steps where a ladder was measured.

    The other parameters and the errors are those of `bias_figure`.
    """
    if against not in ("auto", "steps", "problems"):
        raise unknown("axis", against, ("auto", "steps", "problems"))
    cells = choose(frame, point, steps)
    ok = require(cells, "relative_variance", "variance")
    label = _relative("relative variance of one path", ok)
    ladders = cell_tools.ladders(cells) if against != "problems" else {}
    if against == "steps" and not ladders:
        raise _no_ladder()
    if not ladders:
        return dot_figure(one_step_count(cells), [("relative_variance", label)], width)
    ticks = step_ticks([c for mine in ladders.values() for c in mine])
    labels = ("number of time steps", label)
    return panel_figure(ladders, draw_variance, width, labels, steps=ticks)


def _no_ladder() -> ResultsError:
    return ResultsError(
        "no problem was measured with two or more numbers of steps; run a ladder, for "
        "example `sdebench run full`"
    )


def work_precision_figure(
    frame: pd.DataFrame,
    *,
    point: str | None = None,
    steps: int | None = None,
    width: float = PAGE,
) -> Figure:
    """Return the mean squared relative error against cost, one panel per problem.

    An average of n paths costs n times the drift evaluations of one path and has the
    squared error bias² + variance/n; the line runs over all n that were measured, the
    marker is the n of one replicate with its interval.  Lower left is better; a line
    that flattens has reached its bias.  Estimators whose bias depends on n (logarithms
    of means) are markers only.  Errors that are absolute, for want of a scale, are left
    out: they do not compare with relative ones.

    The parameters and the errors are those of `bias_figure`.
    """
    cells = one_step_count(choose(frame, point, steps))
    ok = [
        c
        for c in require(cells, "relative_variance", "variance")
        if not c["absolute"]
        and c["drift_evaluations"] > 0.0
        and cell_tools.n_total(c) > 0.0
        and cell_tools.squared_error(c, float(c["n_paths"]))[0] > 0.0
    ]
    require(ok, "drift_evaluations", "cost and an error above zero")
    labels = ("drift evaluations", "mean squared relative error")
    problems = cell_tools.by_problem(ok)
    return panel_figure(problems, draw_work, width, labels, legend="marker")


def order_figure(
    frame: pd.DataFrame, *, point: str | None = None, width: float = PAGE
) -> Figure:
    """Return relative bias against the step size, with the fitted weak order.

    Bars are simultaneous intervals; an arrow is one that reaches zero.  The black line
    is the exact discretization bias where it is known.  The slope is fitted to the
    logarithms, weighted by the intervals, and shown where three step sizes or more have
    a bias that is told apart from zero.

    The parameters and the errors are those of `bias_figure`.
    """
    ladders = cell_tools.ladders(choose(frame, point, None))
    if not ladders:
        raise _no_ladder()
    cells = [c for mine in ladders.values() for c in mine]
    ok = require(cells, "relative_bias_high", "bias with an interval")
    exact = [c["relative_bias_discretization"] for c in ok]
    shown = [c["relative_bias"] for c in ok if c["relative_bias_low"] > 0.0] + exact
    positive = [v for v in shown if v > 0.0]
    extra = []
    if any(v > 0.0 for v in exact):
        extra.append((key(color="black", lw=0.9), "exact discretization bias"))
    return panel_figure(
        ladders,
        draw_order,
        width,
        ("step size / horizon", _relative("relative bias", ok)),
        extra=extra,
        tick_text=_ticks(ok),
        steps=step_ticks(cells, fraction=True),
        floor=min(positive) / 12.0 if positive else None,  # room for the slopes
    )


def figures(
    frame: pd.DataFrame,
    folder: str | Path,
    formats: Sequence[str] = FORMATS,
    *,
    dpi: int = 200,
    width: float = PAGE,
) -> list[Path]:
    """Write every figure the frame has data for, and return the files.

    Parameters
    ----------
    frame : measured rows or their `summary`.
    folder : made if it does not exist; files are called ``bias_halfway.png`` and so on.
        Of more than four problems those with a row per estimator would be metres long:
        they are a file per problem, ``bias_halfway/two_modes.png``.
    formats : of ``png``, ``svg`` and ``pdf``.
    dpi : resolution of png.
    width : inches.

    Raises
    ------
    UnknownNameError
        For an unknown format.
    ResultsError
        If no figure could be drawn, or the folder cannot be written.
    """
    for name in formats:
        if name not in FORMATS:
            raise unknown("figure format", name, FORMATS)
    table = frame if "absolute" in frame.columns else summary(frame)
    drawers: dict[str, Callable[..., Figure]] = {
        "bias": bias_figure,
        "variance": lambda t, **kw: variance_figure(t, against="problems", **kw),
        "variance_steps": lambda t, **kw: variance_figure(t, against="steps", **kw),
        "work_precision": work_precision_figure,
        "order": order_figure,
    }
    out: list[Path] = []
    for point in dict.fromkeys(table["point"]) if "point" in table else ():
        for kind, drawer in drawers.items():
            stem = "".join(x if x.isalnum() else "_" for x in f"{kind} {point}".strip())
            for name, rows in _pages(table, stem, kind in _ROW_PER_ESTIMATOR):
                try:
                    figure = drawer(rows, point=point, width=width)
                except ResultsError:
                    continue  # nothing of this kind was measured
                out += _save(figure, Path(folder), name, formats, dpi)
    if not out:
        raise ResultsError(
            f"no figure can be drawn from {len(table)} rows: none holds a measured "
            "bias or variance; run `sdebench run` first"
        )
    return out


def _pages(
    table: pd.DataFrame, stem: str, tall: bool
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the files of a figure without their endings, each with its rows."""
    problems = table["problem"].str.partition(":")[0]
    if not tall or problems.nunique() <= _TOGETHER:
        yield stem, table
        return
    for problem, rows in table.groupby(problems, sort=False):
        yield f"{stem}/{problem}", rows


def _save(
    figure: Figure, folder: Path, stem: str, formats: Sequence[str], dpi: int
) -> list[Path]:
    """Write one figure in all formats, the same bytes each time."""
    # Dates are left out: the same results must give the same files.
    dates: dict[str, dict[str, Any]] = {
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
        "png": {"Software": None},
    }
    out = []
    try:
        with style():
            for name in formats:
                path = folder / f"{stem}.{name}"
                path.parent.mkdir(parents=True, exist_ok=True)
                metadata = {"Title": f"sdebench: {stem}"} | dates[name]
                figure.savefig(path, format=name, dpi=dpi, metadata=metadata)
                out.append(path)
    except OSError as error:
        raise ResultsError(
            f"figure {stem} cannot be written to {folder}: {error}; free some space or "
            "choose another folder"
        ) from error
    return out
