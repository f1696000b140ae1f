"""Small multiples: one panel per problem on shared logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sdebench.report.cells import Cell, n_steps, n_total, series, slope, squared_error
from sdebench.report.format import fold, short_labels
from sdebench.report.style import (
    Look,
    draw_legend,
    family,
    finish_axes,
    looks,
    new_figure,
    settle,
    style,
)
from sdebench.report.summarize import INFINITE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 2.3  # inches: about the width of a panel, and of a column of keys
Draw = Callable[["Axes", list[Cell], dict[str, Look]], None]


def panel_figure(
    problems: dict[str, list[Cell]],
    draw: Draw,
    width: float,
    labels: tuple[str, str],
    *,
    extra: Sequence[tuple[Any, str]] = (),
    tick_text: Callable[[float, int], str] | None = None,
    steps: dict[float, str] | None = None,
    floor: float | None = None,
    legend: str = "line",
) -> Figure:
    """Return one panel per problem.

    Parameters
    ----------
    problems : the cells of each panel.
    draw : draws the cells of a panel.
    width : of the figure, inches.
    labels : of the shared horizontal and vertical axis.
    extra : further keys of the legend.
    tick_text : text of the vertical ticks.
    steps : positions and texts of the horizontal ticks; decades by default.
    floor : lower end of the vertical axis.
    legend : ``"line"``, or ``"marker"`` to draw keys with the markers of the panels.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    cells = [c for mine in problems.values() for c in mine]
    drawn = looks(c["estimator"] for c in cells)
    short = short_labels(problems)
    keys = max(1, round(width / _PANEL))
    columns = min(len(problems), keys)
    lines = math.ceil(len(problems) / columns)
    panel = min(width / columns, 3.4)
    with style():
        body = lines * (0.74 * panel + 0.1) + 0.4  # the shared label stands below
        figure = new_figure(width, body)
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        flat = list(grid.flat)
        for axes, (name, mine) in zip(flat, problems.items(), strict=False):
            axes.set_xscale("log")
            axes.set_yscale("log")
            draw(axes, mine, drawn)
            axes.set_title(fold(short[name]), loc="left", pad=3)
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            if steps is None:
                axes.xaxis.set_major_locator(LogLocator(numticks=6))
            else:
                axes.set_xticks(list(steps), list(steps.values()))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_locator(NullLocator())
            if tick_text:
                axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
            finish_axes(axes)
        if floor:
            flat[0].set_ylim(bottom=floor)
        for i in range(len(problems), len(flat)):
            flat[i].set_visible(False)
            above = flat[i - columns]
            above.tick_params(labelbottom=True)
            above.xaxis.set_in_layout(False)  # its labels stand in the empty panel
        figure.supxlabel(labels[0], size=8)
        figure.supylabel(labels[1], size=8)
        draw_legend(figure, drawn, cells, keys, legend, extra, body)
        settle(figure)
    return figure


def step_ticks(cells: list[Cell], fraction: bool = False) -> dict[float, str]:
    """Return ticks at the numbers of steps measured, or at their inverses.

    Where they are closer than a factor of 1.8 some are left without a tick.
    """
    out: dict[float, str] = {}
    last = 0
    for n in sorted({n_steps(c) for c in cells}):
        if n >= 1.8 * last:
            out[1.0 / n if fraction else float(n)] = f"1/{n}" if fraction else f"{n}"
            last = n
    return out


def _curve(
    axes: Axes, ladder: list[Cell], look: Look, stem: str, x: list[float]
) -> None:
    """Draw a line through estimates with their intervals as bars."""
    if not ladder:
        return
    axes.plot(
        x,
        [c[stem] for c in ladder],
        color=look.color,
        ls=look.line,
        lw=1.1,
        marker=family(ladder[0]["problem_class"])[1],
        ms=3.0,
        mew=0.0,
    )
    for c, at in zip(ladder, x, strict=True):
        low, high = c[f"{stem}_low"], c[f"{stem}_high"]
        if low > 0.0 and math.isfinite(high):
            axes.plot([at, at], [low, high], color=look.color, lw=0.9)


def draw_variance(axes: Axes, cells: list[Cell], drawn: dict[str, Look]) -> None:
    """Draw relative variance against the number of steps."""
    for name, ladder in series(cells, drawn):
        good = [c for c in ladder if c["relative_variance"] > 0.0]
        x = [float(n_steps(c)) for c in good]
        _curve(axes, good, drawn[name], "relative_variance", x)


def draw_work(axes: Axes, cells: list[Cell], drawn: dict[str, Look]) -> None:
    """Draw squared error against drift evaluations."""
    for name, mine in series(cells, drawn):
        look = drawn[name]
        for c in mine:
            cost, n = c["drift_evaluations"], float(c["n_paths"])
            if c["estimand"] != "log_normalizer":  # whose bias depends on n
                last = math.log10(n_total(c))
                at = [10.0 ** (last * i / 60) for i in range(61)]
                error = [squared_error(c, k)[0] for k in at]
                x = [k * cost for k in at]
                axes.plot(x, error, color=look.color, ls=look.line, lw=1.1)
            value, low, high = squared_error(c, n)
            if low > 0.0 and math.isfinite(high):
                axes.plot([n * cost] * 2, [low, high], color=look.color, lw=0.9)
            face = "white" if c["verdict"] == INFINITE else look.color
            marker = family(c["problem_class"])[1]
            axes.plot(
                [n * cost], [value], marker, ms=3.6, mew=0.8, mfc=face, mec=look.color
            )


def draw_order(axes: Axes, cells: list[Cell], drawn: dict[str, Look]) -> None:
    """Draw relative bias against step size, exact line and fitted slopes."""
    notes: list[tuple[str, Look]] = []
    gaps: dict[str, dict[float, float]] = {}
    ladders = series(cells, drawn)
    for i, (name, ladder) in enumerate(ladders):
        look = drawn[name]
        # Side by side, so that intervals at the same step do not cover each other.
        shift = 1.03 ** (i - 0.5 * (len(ladders) - 1))
        seen = [c for c in ladder if c["relative_bias_low"] > 0.0]
        x = [shift / n_steps(c) for c in seen]
        _curve(axes, seen, look, "relative_bias", x)
        for c in ladder:
            gap, high = c["relative_bias_discretization"], c["relative_bias_high"]
            if gap > 0.0:
                gaps.setdefault(c["estimand"], {})[1.0 / n_steps(c)] = gap
            if c["relative_bias_low"] <= 0.0 and 0.0 < high < math.inf:
                at, tip = shift / n_steps(c), high / 1.6
                axes.plot([at, at], [tip, high], color=look.color, lw=0.9)
                axes.plot([at], [high], "_", color=look.color, ms=3.6, mew=0.9)
                axes.plot([at], [tip], "v", color=look.color, ms=2.6, mew=0.0)
        fit = slope(ladder)
        if fit and fit.high - fit.low < 2.0:
            text = f"order {fit.order:.2f} [{fit.low:.2f}, {fit.high:.2f}]"
            notes.append((text, look))
    for line in gaps.values():
        h = sorted(line)
        axes.plot(h, [line[x] for x in h], color="black", lw=0.9, zorder=1.5)
    for i, (text, look) in enumerate(reversed(notes)):
        axes.text(
            0.98,
            0.03 + 0.085 * i,
            text,
            color=look.ink,
            size=6.2,
            ha="right",
            transform=axes.transAxes,
            zorder=5,
            bbox={"fc": "white", "ec": "none", "pad": 0.4},
        )
