"""Pictures of a problem: its laws under the base and the tilt, and the control u*."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import NotExactError
from sdebench.report.style import finish_axes, key, new_figure, settle, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sdebench.closed_form.gaussian_mixture import GaussianMixture
    from sdebench.problem import Problem

Array = NDArray[np.float64]
Law = Callable[[float], "GaussianMixture"]

_BASE, _TILTED, _IDEAL = "0.45", "#0173b2", "#d55e00"
_UP, _DOWN = (0.835, 0.369, 0.0), (0.004, 0.451, 0.698)  # signs of the control
_SPREAD = 3.5  # standard deviations of the laws that are shown
_MASS = (0.95, 0.5)  # probabilities inside the contour lines
_TIMES = (0.25, 0.6, 1.0)  # of the horizon
_WIDTH = 7.0


def problem_figure(problem: Problem) -> tuple[Figure, str]:
    """Return the picture of a problem and the words that say what it shows.

    Raises
    ------
    NotExactError
        If the law at the end has no density in closed form.
    """
    return _plane(problem) if problem.dim == 2 else _line(problem)


def _ideal(problem: Problem) -> GaussianMixture | None:
    """Return the tilted terminal law p_T exp(r) / Z, where it is known."""
    from sdebench.tilting_problem import TiltingTruth

    truth = problem.truth
    return truth.ideal_law() if isinstance(truth, TiltingTruth) else None


# ---- one dimension, or a line through more -----------------------------------------
def _direction(problem: Problem) -> tuple[Array, str]:
    """Return the unit vector along which the tilt moves the mean, and its name."""
    end = problem.time_span[1]
    truth = problem.truth
    shift = truth.tilted_marginal(end).mean() - truth.base_marginal(end).mean()
    length = float(np.linalg.norm(shift))
    if problem.dim == 1 or length < 1e-9:
        return np.eye(problem.dim)[0], "the first coordinate"
    return shift / length, "the direction in which the tilt moves the mean"


def _line(problem: Problem) -> tuple[Figure, str]:
    """Draw u*(x, t) over time beside the laws at the end."""
    from matplotlib.gridspec import GridSpec

    along, name = _direction(problem)
    start, end = problem.time_span

    def project(law: GaussianMixture) -> GaussianMixture:
        return law if problem.dim == 1 else law.push_forward(along[None])

    laws: list[tuple[str, GaussianMixture, str, Any]] = [
        ("base", project(problem.truth.base_marginal(end)), _BASE, "-"),
        ("under u*", project(problem.truth.tilted_marginal(end)), _TILTED, "-"),
    ]
    x = _range([law for _, law, _, _ in laws], 181)
    ideal = _ideal(problem)
    missed = ideal is not None and _differ(project(ideal), laws[1][1], x)
    if ideal and missed:
        laws.append(("ideal tilt", project(ideal), _IDEAL, (0, (4, 1.5))))
    times = np.linspace(start, end, 65)
    line = x[::2, None] * along
    control = np.array([problem.truth.control(line, t) @ along for t in times]).T
    with style():
        figure = new_figure(_WIDTH, 2.9)
        grid = GridSpec(1, 3, figure, width_ratios=(3.2, 0.09, 1.5))
        map_axes = figure.add_subplot(grid[0])
        bar_axes = figure.add_subplot(grid[1])
        law_axes = figure.add_subplot(grid[2])
        top = _heat(map_axes, control, (start, end, x[0], x[-1]))
        _flow(map_axes, lambda t: project(problem.truth.tilted_marginal(t)), times, x)
        map_axes.set_xlabel("t")
        map_axes.set_ylabel("x" if problem.dim == 1 else "x along the direction")
        _scale(bar_axes, top)
        for label, law, color, line_style in laws:
            density = np.exp(law.log_density(x[:, None]))
            law_axes.plot(density, x, color=color, ls=line_style, lw=1.2, label=label)
        law_axes.set_ylim(x[0], x[-1])
        law_axes.set_xlim(left=0.0)
        law_axes.set_xlabel("density at the end")
        law_axes.set_xticks([])
        law_axes.legend(loc="best", handlelength=1.6, borderaxespad=0.2)
        for axes in (map_axes, law_axes):
            finish_axes(axes)
            axes.grid(visible=False)
        settle(figure)
    control_text = "the optimal control u*(x, t)"
    if problem.dim > 1:
        control_text = (
            f"the component of {control_text} along {name}, on the line through the "
            "origin in that direction"
        )
    text = (
        f"Left: {control_text}; lines enclose where the law of "
        "X_t under u* has more than a half and a twentieth of its peak. Right: the "
        f"law of X_T{'' if problem.dim == 1 else ' along the same direction'} under "
        "the base process and under u*"
    )
    if missed:
        text += (
            "; u* does not reach the ideal tilt p_T exp(r) / Z, because the end "
            "remembers the start"
        )
    return figure, f"{text}."


def _range(laws: list[GaussianMixture], n: int) -> Array:
    """Return points on the line that cover what the laws have."""
    means = np.array([law.mean()[0] for law in laws])
    spreads = np.array([np.sqrt(law.covariance()[0, 0]) for law in laws])
    low, high = np.min(means - _SPREAD * spreads), np.max(means + _SPREAD * spreads)
    return np.linspace(low, high, n)


def _differ(first: GaussianMixture, second: GaussianMixture, x: Array) -> bool:
    """Return whether two densities can be told apart by eye."""
    one, two = (np.exp(law.log_density(x[:, None])) for law in (first, second))
    return bool(np.max(np.abs(one - two)) > 0.003 * np.max(two))


def _heat(
    axes: Axes, values: Array, extent: tuple[float, float, float, float]
) -> float:
    """Draw values as colors, transparent where zero; return the largest size."""
    top = float(np.max(np.abs(values))) or 1.0
    axes.imshow(
        _colors(values / top),
        extent=extent,
        aspect="auto",
        origin="lower",
        interpolation="none",
    )
    return top


def _colors(values: Array) -> Array:
    """Return red-green-blue-alpha of numbers in [-1, 1]: both themes show through."""
    rgba = np.empty((*values.shape, 4))
    rgba[..., :3] = np.where(values[..., None] >= 0.0, _UP, _DOWN)
    rgba[..., 3] = 0.9 * np.abs(values)
    return rgba


def _scale(axes: Axes, top: float) -> None:
    """Draw the color scale of `_heat`."""
    values = np.linspace(-1.0, 1.0, 64)[:, None]
    axes.imshow(
        _colors(values),
        extent=(0.0, 1.0, -top, top),
        aspect="auto",
        origin="lower",
        interpolation="none",
    )
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.tick_params(labelsize=7, length=2, pad=2)
    axes.set_title("u*", size=8, pad=3)


def _flow(axes: Axes, law: Law, times: Array, x: Array) -> None:
    """Draw where the law of X_t has its mass; a start at a point is left out."""
    shown, columns = [], []
    for t in times:
        try:
            density = law(t).log_density(x[:, None])
        except NotExactError:
            continue
        shown.append(t)
        columns.append(np.exp(density - np.max(density)))
    axes.contour(
        shown, x, np.array(columns).T, levels=(0.05, 0.5), colors="0.25", linewidths=0.7
    )


# ---- two dimensions ---------------------------------------------------------------
def _plane(problem: Problem) -> tuple[Figure, str]:
    """Draw both laws as contours and u* as arrows, at three times."""
    start, end = problem.time_span
    times = [start + part * (end - start) for part in _TIMES]
    pairs = [
        (problem.truth.base_marginal(t), problem.truth.tilted_marginal(t))
        for t in times
    ]
    box = _box([law for pair in pairs for law in pair])
    arrows = _points(box, 13)
    fields = [problem.truth.control(arrows, t) for t in times]
    seen = [_likely(pair, arrows) for pair in pairs]
    lengths = [np.linalg.norm(f[m], axis=-1) for f, m in zip(fields, seen, strict=True)]
    longest = float(np.max(np.concatenate(lengths))) or 1.0
    with style():
        figure = new_figure(_WIDTH, 3.0)
        panels = figure.subplots(1, len(times), sharex=True, sharey=True)
        zipped = zip(panels, times, pairs, fields, seen, strict=True)
        for axes, t, pair, field, mask in zipped:
            _contours(axes, pair, box)
            quiver = axes.quiver(
                *arrows[mask].T,
                *field[mask].T,
                color="0.25",
                angles="xy",
                scale_units="xy",
                scale=longest / (0.14 * (box[0][1] - box[0][0])),
                width=0.006,
            )
            axes.set_title(f"t = {t:.3g}", loc="left", pad=3)
            axes.set_aspect("equal")
            axes.set_xlabel("x₁")
            finish_axes(axes)
            axes.grid(visible=False)
        panels[0].set_ylabel("x₂")
        handles = [key(color=_BASE, lw=1.3), key(color=_TILTED, lw=1.3)]
        texts = ["base", "under u*"]
        figure.legend(handles, texts, loc="outside upper center", ncols=2)
        size = float(f"{longest:.1g}")
        panels[-1].quiverkey(quiver, 0.88, 1.06, size, f"|u*| = {size:g}", labelpos="W")
        settle(figure)
    return figure, (
        "The laws of X_t under the base process and under u*, as the smallest regions "
        "that hold 50 and 95 % of the probability, and u*(x, t) as arrows where paths "
        "are likely; the panel on the right is the end."
    )


def _box(laws: list[GaussianMixture]) -> tuple[tuple[float, float], ...]:
    """Return the limits of both axes: a square."""
    means = np.array([law.mean() for law in laws])
    spreads = np.array([np.sqrt(np.diag(law.covariance())) for law in laws])
    low = np.min(means - 2.6 * spreads, axis=0)
    high = np.max(means + 2.6 * spreads, axis=0)
    middle, half = 0.5 * (low + high), 0.5 * np.max(high - low)
    return tuple((float(m - half), float(m + half)) for m in middle)


def _points(box: tuple[tuple[float, float], ...], n: int) -> Array:
    axes = [np.linspace(low, high, n) for low, high in box]
    return np.stack(np.meshgrid(*axes, indexing="xy"), axis=-1).reshape(-1, 2)


def _likely(pair: tuple[GaussianMixture, GaussianMixture], points: Array) -> Array:
    """Return where one of two laws has more than a hundredth of its peak."""
    out = np.zeros(len(points), dtype=bool)
    for law in pair:
        density = law.log_density(points)
        out |= density > np.max(density) + np.log(0.01)
    return out


def _contours(
    axes: Axes,
    pair: tuple[GaussianMixture, GaussianMixture],
    box: tuple[tuple[float, float], ...],
) -> None:
    n = 61
    points = _points(box, n)
    x, y = (np.linspace(low, high, n) for low, high in box)
    for law, color in zip(pair, (_BASE, _TILTED), strict=True):
        density = np.exp(law.log_density(points))
        sorted_density = np.sort(density)[::-1]
        inside = np.cumsum(sorted_density) / np.sum(sorted_density)
        levels = [sorted_density[np.searchsorted(inside, mass)] for mass in _MASS]
        axes.contour(
            x, y, density.reshape(n, n), levels=levels, colors=color, linewidths=1.1
        )
