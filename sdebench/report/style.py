"""The looks that all figures share: one color per estimator, one marker per family.

Colors are seaborn's color-blind-safe palette.  Variants of one estimator are shades of
its color and differ in line style, so that a figure printed in gray can still be read.
An estimator's color is the hash of its name, or the next one that none before it in
the alphabet has: it depends on the catalogue, never on what else is in the frame, and
a new estimator leaves nearly all others as they are.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from sdebench.report.cells import Cell, estimands
from sdebench.report.format import short_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 7.0  # widths in inches: one column and a full page
_SMALL = 7.0  # points; the smallest text of a figure

_GRAY = 7  # of the palette, left to lines that are no estimator's
_TONES = (0.0, -0.45, 0.45, -0.25, 0.25)
"""Of the palette's colors, for the estimators, as `_SHADES` for their variants."""
_SALT = 228015
"""Of the names' hash: with it the estimators of one estimand are easy to tell apart."""
_STYLES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_SHADES = (0.0, -0.5, 0.45, -0.25, 0.25)  # towards black and towards white
_MARKERS = {
    "linear–quadratic": "o",
    "Gaussian tilt": "s",
    "mixture tilt": "D",
    "pinned start": "^",
    "linear, quartic reward": "v",
    "certified reference": "X",
    "linear, radial cost": "h",
    "polynomial diffusion": "p",
}
_OTHER_MARKER = "P"
_ESTIMAND_TEXT = {
    "gradient": "",
    "reward_only_gradient": "reward-only gradient",
    "matching_gradient": "matching gradient",
    "cross_entropy_gradient": "cross-entropy gradient",
    "log_normalizer": "log Z",
}


@dataclass(frozen=True)
class Look:
    """How one variant of an estimator is drawn, and its label."""

    label: str
    color: tuple[float, float, float]
    line: Any

    @property
    def ink(self) -> tuple[float, float, float]:
        """The color for text: dark enough to be read on white."""
        r, g, b = self.color
        light = 0.2126 * r + 0.7152 * g + 0.0722 * b
        scale = min(1.0, 0.48 / light) if light > 0.0 else 1.0
        return r * scale, g * scale, b * scale


def family(problem_class: str) -> tuple[str, str]:
    """Return a class of problems and its marker."""
    name = problem_class or "other"
    return name, _MARKERS.get(name, _OTHER_MARKER)


def looks(estimators: Iterable[str]) -> dict[str, Look]:
    """Map full labels of estimators to their looks, in the order of drawing."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    del palette[_GRAY]
    names = list(dict.fromkeys(estimators))
    slots = _slots({n.partition(":")[0] for n in names}, len(_TONES) * len(palette))
    short, order = short_labels(names), list(slots)
    # The plain name comes first; the sort is stable and keeps the other variants.
    names.sort(key=lambda n: (order.index(n.partition(":")[0]), ":" in n))
    out = {}
    for name in names:
        base = name.partition(":")[0]
        i = [n for n in names if n.partition(":")[0] == base].index(name)
        # The first variant (the plain name if there is one) has the pure color.
        turn, place = divmod(slots[base], len(palette))
        color = _shaded(
            _shaded(palette[place], _TONES[turn]), _SHADES[i % len(_SHADES)]
        )
        out[name] = Look(short[name], color, _STYLES[i % len(_STYLES)])
    return out


def _slots(bases: set[str], count: int) -> dict[str, int]:
    """Return a position in the palette for every estimator, the catalogue's first."""
    from sdebench.registry import estimator_names

    catalogue = estimator_names()
    slots: dict[str, int] = {}
    for name in (*catalogue, *sorted(bases - set(catalogue))):
        taken = set(slots.values()) if len(slots) < count else set()
        hashes = (
            crc32(f"{_SALT}{name}{i}".encode()) % count for i in itertools.count()
        )
        slots[name] = next(slot for slot in hashes if slot not in taken)
    return slots


def _shaded(
    color: tuple[float, float, float], shift: float
) -> tuple[float, float, float]:
    """Return a color moved towards black (shift < 0) or white (> 0)."""
    target = 0.0 if shift < 0.0 else 1.0
    r, g, b = (c + abs(shift) * (target - c) for c in color)
    return r, g, b


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the style inside a ``with`` block and leave no trace behind."""
    import matplotlib as mpl
    import seaborn as sns

    small = ("xtick.labelsize", "ytick.labelsize", "font.size", "legend.fontsize")
    text: dict[str, Any] = dict.fromkeys(small, _SMALL)
    text |= {"axes.labelsize": 8.0, "axes.titlesize": 8.0}
    lines: dict[str, Any] = {
        "axes.linewidth": 0.7,
        "grid.linewidth": 0.5,
        "grid.color": "0.9",
        "axes.edgecolor": "0.35",
        "legend.frameon": False,
        "svg.fonttype": "path",
        "svg.hashsalt": "sdebench",
        "pdf.fonttype": 42,
    }
    base: dict[str, Any] = sns.axes_style("whitegrid") | sns.plotting_context("paper")
    settings: Any = {**base, **text, **lines}
    with mpl.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return a figure that pyplot does not know: nothing to close, nothing global."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> None:
    """Lay the figure out once and keep the result for every later drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def finish_axes(axes: Axes, *, grid: str = "both") -> None:
    """Fix ticks and grid on the axes themselves, so that later drawing keeps them."""
    axes.tick_params(labelsize=_SMALL, length=2.5, width=0.6, color="0.35", pad=2)
    axes.tick_params(which="minor", length=0)
    axes.grid(visible=False, which="both")
    axes.grid(visible=True, axis=grid, which="major", color="0.9", linewidth=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def key(**looks_of_line: Any) -> Any:
    """Return a handle for the legend, drawn like a line of a figure."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **looks_of_line)


def draw_legend(
    figure: Figure,
    drawn: dict[str, Look],
    cells: list[Cell],
    columns: int,
    kind: str,
    extra: Sequence[tuple[Any, str]],
    body: float,
) -> None:
    """Draw the legend above the axes: estimators by estimand, families, ``extra``.

    ``kind`` is ``"bar"`` for dot plots, ``"line"`` for curves, ``"marker"`` for curves
    where log-normalizers are single markers.  The legend has at most ``columns``, and
    fewer where they do not fit; the figure gets the height ``body`` (inches) and its.
    """
    found = estimands(cells)
    entries: list[tuple[Any, str]] = []
    for estimand in found:
        names = {c["estimator"] for c in cells if c["estimand"] == estimand}
        # Errors of different estimands do not compare: say so where there are several.
        what = _ESTIMAND_TEXT.get(estimand, estimand) if len(found) > 1 else ""
        for name, look in drawn.items():
            if name not in names:
                continue
            if kind == "bar":
                handle = key(color=look.color, lw=2.6)
            elif kind == "marker" and estimand == "log_normalizer":
                handle = key(color=look.color, ls="", marker="o", ms=4, mew=0.0)
            else:
                handle = key(color=look.color, ls=look.line, lw=1.3)
            entries.append((handle, f"{look.label} ({what})" if what else look.label))
    families = dict(family(c["problem_class"]) for c in cells)
    for name, marker in families.items() if len(families) > 1 else ():
        entries.append((key(color="0.35", ls="", marker=marker, ms=4), name))
    entries += extra
    for n in range(columns, 0, -1):
        legend = figure.legend(
            [handle for handle, _ in entries],
            [text for _, text in entries],
            ncols=n,
            loc="outside upper center",
            handlelength=2.2,
            columnspacing=1.4,
            labelspacing=0.35,
            borderaxespad=0.3,
        )
        box = legend.get_window_extent()
        if n == 1 or box.width < 0.98 * figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(body + box.height / figure.dpi)
