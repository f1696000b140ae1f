"""What the figures of several experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP<>Xh"
_STYLES: Sequence[Any] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


def problem_looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return color, marker and line style of each problem, from its place in names."""
    import seaborn as sns

    palette = sns.color_palette("colorblind", 7)
    return {
        name: {
            "color": palette[i % len(palette)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "ls": _STYLES[i % len(_STYLES)],
        }
        for i, name in enumerate(names)
    }


def target_colors() -> dict[str, Any]:
    """Return the color of each regression target of the score."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    names = ("conditional", "target", "novel", "adjoint", "affine")
    return {name: palette[i] for name, i in zip(names, (3, 1, 0, 2, 4), strict=True)}


def plain_ticks(axes: Axes) -> None:
    """Write the vertical decades as numbers: 0.1, 1, 10."""
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")


def draw_ladder(
    axes: Axes, rows: pd.DataFrame, column: str, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw a column against the number of steps, one line per problem."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_ticks(axes)
    for name, mine in rows.groupby("problem"):
        if (mine[column] > 0.0).all():
            look = looks[str(name)]
            axes.plot(mine["n_steps"], mine[column], ms=3.5, lw=1.1, label=name, **look)
    steps = [25, 50, 100, 200, 400, 800]
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of time steps N")


def draw_slope(axes: Axes, order: int) -> None:
    """Draw the slope of an error of this order at the lower left, with its name."""
    left, bottom = axes.get_xlim()[0] * 1.25, axes.get_ylim()[0]
    steps = [left, 4.0 * left]
    height = bottom * 1.6 * 4.0**order
    axes.plot(steps, [height, height / 4.0**order], color="0.35", lw=0.9)
    text = "1/N" if order == 1 else f"1/N{'⁰¹²³'[order]}"
    axes.text(1.4 * left, height / 1.4**order * 1.15, text, color="0.35")


def add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Set the legend of one panel above the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=columns, loc="outside upper center")
