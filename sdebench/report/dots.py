"""Dot plots: one row per estimator in one band per problem, intervals on a log axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sdebench.report import cells as cell_tools
from sdebench.report.cells import Cell
from sdebench.report.style import (
    Look,
    draw_legend,
    family,
    finish_axes,
    key,
    looks,
    new_figure,
    settle,
    style,
)
from sdebench.report.summarize import INFINITE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW, _BAND = 0.088, 0.075  # inches: height of a row, margin of a band
_WIDE = 5.0  # inches from which on a figure has room for three columns of keys
Rows = list[tuple[float, Cell]]


def dot_figure(
    cells: list[Cell],
    panels: Sequence[tuple[str, str]],
    width: float,
    tick_text: Callable[[float, int], str] | None = None,
) -> Figure:
    """Return panels side by side on one scale; ``panels`` are (column, axis label)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    drawn = looks(c["estimator"] for c in cells)
    names = cell_tools.problem_labels(cells)
    rows, bands, height = _layout(cells, drawn, names)
    split = any(stem == "relative_bias" for stem, _ in panels)
    left, right = _limits(cells, [stem for stem, _ in panels], split)
    with style():
        keys = 3 if width > _WIDE else 1
        body = height + 0.5  # ticks and labels below the rows
        figure = new_figure(width, body)
        grid = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)
        for axes, (stem, label) in zip(grid[0], panels, strict=True):
            axes.set_xscale("log")
            axes.set_xlim(left, right)
            for _, top, bottom in bands[1::2]:
                axes.axhspan(top, bottom, color="0.965", lw=0, zorder=0)
            _draw(axes, rows, drawn, stem)
            if stem == "relative_bias":
                _exact_gaps(axes, rows)
            if stem == "relative_bias_own":
                _no_split(axes, cells, bands)
            axes.set_xlabel(label)
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_minor_locator(NullLocator())
            if tick_text:
                axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
            finish_axes(axes, grid="x")
            axes.tick_params(axis="y", length=0)
        first = grid[0][0]
        first.set_ylim(height, 0.0)
        first.set_yticks([0.5 * (a + b) for _, a, b in bands])
        first.set_yticklabels([names[n] for n, _, _ in bands])
        extra = []
        if split and any(c["relative_bias_discretization"] > 0.0 for c in cells):
            tick = key(color="black", ls="", marker="|", ms=7, mew=1.0)
            extra.append((tick, "exact discretization bias"))
        if any(_reaches_zero(c, stem) for c in cells for stem, _ in panels):
            limit = key(color="0.35", lw=1.1, marker="<", ms=3)
            extra.append((limit, "interval reaches zero"))
        if any(c["verdict"] == INFINITE for c in cells):
            doubt = key(color="0.35", ls="", marker="o", ms=4, mfc="white")
            extra.append((doubt, "infinite variance suspected"))
        draw_legend(figure, drawn, cells, keys, "bar", extra, body)
        settle(figure)
    return figure


def _layout(
    cells: list[Cell], drawn: dict[str, Look], names: dict[str, str]
) -> tuple[Rows, list[tuple[str, float, float]], float]:
    """Return rows and bands (inches from the top) and the height of them all."""
    rows: Rows = []
    bands = []
    y = 0.0
    for problem, mine in cell_tools.by_problem(cells).items():
        start = y
        y += _BAND
        for _, row in cell_tools.series(mine, drawn):
            for cell in row:
                rows.append((y + _ROW / 2, cell))
                y += _ROW
        lines = 1 + names[problem].count("\n")
        y = max(y + _BAND, start + 0.08 + 0.14 * lines)  # a name needs its lines
        bands.append((problem, start, y))
    return rows, bands, y


def _limits(
    cells: list[Cell], stems: Iterable[str], split: bool
) -> tuple[float, float]:
    """Return limits of a log axis with room for the words at the left edge."""
    found = [
        c[stem + end]
        for c in cells
        for stem in stems
        for end in ("", "_low", "_high")
        if end != "" or c[f"{stem}_low"] > 0.0
    ]
    if split:
        found += [c["relative_bias_discretization"] for c in cells]
    positive = [v for v in found if v > 0.0 and math.isfinite(v)] or [0.1]
    a, b = math.log10(min(positive)), math.log10(max(positive))
    pad = max(0.06 * (b - a), 0.12, 0.5 * (2.0 - (b - a)))
    words = 0.10 * (b - a + 2 * pad)
    return 10.0 ** (a - pad - words), 10.0 ** (b + pad)


def _reaches_zero(cell: Cell, stem: str) -> bool:
    return cell[f"{stem}_low"] <= 0.0 and cell[f"{stem}_high"] > 0.0


def _draw(axes: Axes, rows: Rows, drawn: dict[str, Look], stem: str) -> None:
    left, right = axes.get_xlim()
    span = math.log10(right / left)
    edge, arrow = left * 10.0 ** (0.012 * span), 10.0 ** (0.05 * span)
    for y, cell in rows:
        look = drawn[cell["estimator"]]
        value, low, high = (cell[stem + end] for end in ("", "_low", "_high"))
        if cell["status"] != "ok":
            word = "n/a" if cell["status"] == "not applicable" else cell["status"]
        elif low == high == 0.0:
            word = "0 exactly"
        else:
            word = ""
            _interval(axes, y, (value, low, high), look, cell, arrow)
        if word:
            axes.text(edge, y, word, color=look.ink, size=5.8, va="center_baseline")


def _interval(
    axes: Axes,
    y: float,
    numbers: tuple[float, float, float],
    look: Look,
    cell: Cell,
    arrow: float,
) -> None:
    """Draw an estimate and its interval; an end at 0 or infinity becomes an arrow.

    An upper limit is a bar with an arrow to the left and no marker: the estimate is
    not told apart from zero.  An open marker is an interval that is in doubt.
    """
    value, low, high = numbers
    head: dict[str, Any] = {
        "color": look.color,
        "ms": 2.6,
        "mew": 0.0,
        "ls": "",
        "clip_on": False,
    }
    start, stop = low, high
    if high > 0.0 and not low > 0.0 and math.isfinite(high):
        start = high / arrow
        axes.plot([start], [y], marker="<", **head)
        axes.plot([high], [y], marker="|", ms=3.6, mew=1.1, color=look.color)
    elif high == math.inf and value > 0.0:
        start = low if low > 0.0 else value
        stop = axes.get_xlim()[1]
        axes.plot([stop], [y], marker=">", **head)
    if start > 0.0 and stop > 0.0:
        axes.plot([start, stop], [y, y], "-", color=look.color, lw=1.1)
    if value > 0.0 and not low <= 0.0:  # a value without interval is still a value
        marker = family(cell["problem_class"])[1]
        face = "white" if cell["verdict"] == INFINITE else look.color
        axes.plot([value], [y], marker, ms=3.0, mew=0.7, mfc=face, mec=look.color)


def _exact_gaps(axes: Axes, rows: Rows) -> None:
    """Mark the exact discretization bias over the neighbouring rows that share it."""
    runs: list[tuple[float, float, float]] = []
    for y, cell in rows:
        gap = cell["relative_bias_discretization"]
        if cell["status"] != "ok" or not gap > 0.0:
            continue
        if runs:
            value, top, bottom = runs[-1]
            if math.isclose(value, gap, rel_tol=1e-9) and y - bottom < 1.5 * _ROW:
                runs[-1] = (gap, top, y)
                continue
        runs.append((gap, y, y))
    for gap, top, bottom in runs:
        ends = [top - 0.5 * _ROW, bottom + 0.5 * _ROW]
        axes.plot([gap, gap], ends, color="black", lw=0.9, zorder=1.5)


def _no_split(
    axes: Axes, cells: list[Cell], bands: list[tuple[str, float, float]]
) -> None:
    """Say where the split of the bias is not known, instead of leaving a void."""
    groups = cell_tools.by_problem(cells)
    for name, top, bottom in bands:
        if not any(c["relative_bias_own_high"] >= 0.0 for c in groups[name]):
            axes.text(
                0.5,
                0.5 * (top + bottom),
                "no exact discretized answer",
                color="0.5",
                size=6.5,
                style="italic",
                ha="center",
                va="center",
                transform=axes.get_yaxis_transform(),
            )
