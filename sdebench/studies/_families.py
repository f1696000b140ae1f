"""One estimator of each family, and its variance and cost in one place.

All variances are those of one path relative to |grad J|^2 at the point (at the optimum
to that at the point zero), whatever an estimator estimates, so that they compare.  An
estimator that couples its paths is measured by whole replicates, times their paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from sdebench import registry
from sdebench.experiments.comparisons import power
from sdebench.experiments.experiment import columns, interval_of, records, signed
from sdebench.experiments.measuring import gradient_scale, sample, settings_at
from sdebench.measure.intervals import Interval, variance_interval
from sdebench.measure.workers import count_evaluations
from sdebench.problem import Problem
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES: Mapping[str, str] = {
    "pathwise": "pathwise",
    "pathwise, sticking the landing": "pathwise:sticking_the_landing=true",
    "adjoint matching": "adjoint_matching",
    "time-reversed BSDE": "time_reversed_bsde",
    "on-policy distillation": "opd",
    "REINFORCE, leave-one-out": "reinforce",
    "REINFORCE, reward to go": "reinforce:reward_to_go=true",
    "RLR": "rlr",
    "log-variance": "log_variance",
    "zeroth order": "zeroth_order:directions=rademacher",
}
"""The families' names, and the estimators as `registry.estimator` reads them."""
POINTS = ("halfway", "optimum")
ESTIMANDS = {
    "gradient": "∇J",
    "matching_gradient": "lean adjoint",
    "reward_only_gradient": "−∇E r",
}
OTHER = {"on-policy distillation": "detached KL"}
"""What is estimated, where the estimand's answer is not the target."""
WORK = 1 << 18
"""Replicates times steps and dimensions, within `LEAST` and `MOST` replicates."""
LEAST, MOST = 1 << 8, 1 << 11
SLOW = {"time-reversed BSDE": 1 << 7, "zeroth order": 1 << 8}
"""Replicates of the families with much work for each."""
COSTS = {
    "drift": "drift_evaluations",
    "derivatives": "vjp_evaluations",
    "reward": "reward_evaluations",
    "reward_gradient": "reward_gradient_evaluations",
}


def estimate_of(family: str) -> str:
    """Return what a family estimates."""
    estimand = registry.estimator(FAMILIES[family]).estimand
    return OTHER.get(family) or ESTIMANDS[estimand]


def variances(
    problem: Problem,
    n_steps: int,
    level: float,
    seed: int,
    families: Mapping[str, str] = FAMILIES,
) -> Iterator[dict[str, Any]]:
    """Yield the variance of every family at every point, each with its interval."""
    replicates = min(max(WORK // (n_steps * problem.dim), LEAST), MOST)
    for point in POINTS:
        scale = gradient_scale(problem, point) ** -2
        for family, spec in families.items():
            count = SLOW.get(family, replicates)
            found = sample(problem, [spec], point, n_steps, count, seed)
            moments, n_paths = found[0]
            yield {
                "kind": "variance",
                "problem": problem.name,
                "dim": problem.dim,
                "n_steps": n_steps,
                "point": point,
                "family": family,
                **columns(variance_interval(moments, level, scale * n_paths)),
            }


def costs(problem: Problem, n_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the evaluations per path of every family."""
    settings = settings_at(problem, POINTS[0], n_steps, 0)
    for family, spec in FAMILIES.items():
        counts = count_evaluations(problem, registry.estimator(spec), settings)
        chosen = {name: counts[counter] for name, counter in COSTS.items()}
        place = {"problem": problem.name, "dim": problem.dim, "n_steps": n_steps}
        yield {"kind": "cost"} | place | {"family": family} | chosen


def growth(rows: pd.DataFrame, size: str) -> Interval | None:
    """Return the power of ``size`` in a variance, over the upper half of its values.

    The half begins at the square root of the largest one; None without a variance.
    """
    mine = rows.set_index(size)
    largest = max(mine.index)
    first = min(n for n in mine.index if n * n >= largest)
    small, large = (interval_of(mine.loc[n]) for n in (first, largest))
    return None if large.low <= 0.0 else power(small, large, largest / first)


def table(evidence: pd.DataFrame, size: str, symbol: str) -> pd.DataFrame:
    """Return variances at the largest size, their growth, and the cost, as texts."""
    found = evidence[evidence["kind"] == "variance"]
    cost = evidence[evidence["kind"] == "cost"]
    largest = found[size].max()
    rows = []
    for (problem, family), mine in found.groupby(["problem", "family"], sort=False):
        row = {
            "problem": str(problem),
            "estimator": str(family),
            "of": estimate_of(str(family)),
        }
        for point in POINTS:
            at = mine[mine["point"] == point]
            last = [interval_of(r) for r in records(at[at[size] == largest])]
            exponent = growth(at, size) if last else None
            value = interval(*last[0]) if last else "–"
            row[f"{point}, {symbol} = {largest}"] = value
            row[f"power of {symbol}, {point}"] = signed(exponent) if exponent else "–"
        (spent,) = [
            r for r in records(cost) if (r.problem, r.family) == (problem, family)
        ]
        row[f"evaluations, N = {spent.n_steps}: drift + derivatives"] = (
            f"{plain(spent.drift)} + {plain(spent.derivatives)}"
        )
        row["reward + its gradient"] = (
            f"{plain(spent.reward)} + {plain(spent.reward_gradient)}"
        )
        rows.append(row)
    return pd.DataFrame(rows)


def looks() -> dict[str, dict[str, Any]]:
    """Return color, marker and line of every family."""
    import seaborn as sns

    palette = [*sns.color_palette("colorblind"), (0.15, 0.15, 0.15)]
    order = (0, 9, 2, 10, 7, 1, 5, 3, 4, 6)
    lines: tuple[Any, ...] = ("-", (0, (4, 1.5)))
    return {
        family: {
            "color": palette[order[i]],
            "marker": "osD^vPX<>h"[i],
            "ls": lines[i % 2],
        }
        for i, family in enumerate(FAMILIES)
    }


def draw(
    axes: Axes, rows: pd.DataFrame, size: str, drawn: dict[str, dict[str, Any]]
) -> None:
    """Draw the variances of one problem and point against a size."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    zero = []
    for family, look in drawn.items():
        mine = rows[rows["family"] == family]
        if not mine["value"].any():
            zero += [family] * len(mine[:1])
            continue
        value = mine["value"]
        reach = [value - mine["low"], mine["high"] - value]
        axes.errorbar(
            mine[size], value, yerr=reach, ms=3.2, lw=1.0, label=family, **look
        )
    shown = rows["value"][rows["value"] > 0.0]
    axes.set_ylim(shown.min() / 4.0, shown.max() * 10.0)  # intervals may be longer
    ticks = sorted(set(rows[size]))
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if zero:
        text = f"0: {', '.join(zero)}"
        axes.text(0.98, 0.98, text, transform=axes.transAxes, ha="right", va="top")


def panels(evidence: pd.DataFrame, size: str, name: str) -> Figure:
    """Return the figure: one row for each problem, one column for each point."""
    from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

    rows = evidence[evidence["kind"] == "variance"]
    problems = list(dict.fromkeys(rows["problem"]))
    drawn = looks()
    with style():
        figure = new_figure(PAGE, 0.9 + 2.4 * len(problems))
        grid = figure.subplots(len(problems), len(POINTS), sharex=True, squeeze=False)
        for line, problem in zip(grid, problems, strict=True):
            for axes, point in zip(line, POINTS, strict=True):
                here = rows[rows["problem"].eq(problem) & rows["point"].eq(point)]
                draw(axes, here, size, drawn)
                axes.set_title(f"{problem}, {point}", loc="left", pad=3)
                finish_axes(axes)
            line[0].set_ylabel("relative variance of one path")
        for axes in grid[-1]:
            axes.set_xlabel(name)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=4, loc="outside upper center")
        settle(figure)
    return figure
