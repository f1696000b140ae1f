r"""Flow-GRPO's sampler converges at order min(1, eta^2).

The sampler adds the noise sigma_t = eta sqrt(t / (1 - t)) to the flow, whose marginals
are the same for every eta in continuous time; at t = 1, where sigma is infinite, the
next time of the grid replaces t in 1 - t.  That guard and the steps after it make an
error of order one, which the later noise forgets only like K^(-eta^2), K the number of
steps; beside it stands the usual error of order 1/K:

    Var X_K - C = A K^(-eta^2) + B K^(-1) + ...

On Gaussian data of variance C with the exact velocity the variance is a recursion,
exact to rounding; it and the constant A are in `sdebench.closed_form.flow_sampler`.

**The local order** p_K = log2(error_K / error_2K) approaches the order p.  With the
next term g orders further on, p_K - p falls by the factor 2^-g per doubling, so that

    |p_2K - p| = |p_K - p_2K| / (2^g - 1)                          to leading order,

which the last two doublings give without a constant chosen by hand.  At eta = 1 the
two terms merge to (log K) / K, the difference is 1 / (log K + const), and

    |p_2K - 1| = sqrt(|p_K - p_2K| / log 2).

The simulation is the sampler as its code has it, with t from 1 to 0, the velocity as
the network's output, and the mean

    x (1 + sigma^2 / (2 t) dt) + v (1 + sigma^2 (1 - t) / (2 t)) dt,    dt < 0;

the recursion's algebra takes no part.

Source: the sampler of J. Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO); the order is
our derivation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.closed_form.flow_sampler import (
    order,
    order_of_next_term,
    terminal_variance_error,
)
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    exact,
    interval_of,
    records,
)
from sdebench.measure.intervals import Interval
from sdebench.report.format import interval, plain
from sdebench.simulate.noise import normals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

DATA_VARIANCE = 0.5
NOISE_LEVELS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5)
LADDER = tuple(25 * 2**j for j in range(17))
"""Numbers of steps of the recursion."""
SIMULATED_LEVELS = (0.0, 0.5, 0.7, 1.0)
SIMULATED_STEPS = (10, 40)
N_PATHS, BLOCK = 1 << 20, 1 << 16
N_INTERVALS = len(SIMULATED_LEVELS) * len(SIMULATED_STEPS)
MARGIN = 1.0
"""Percent by which the simulated variance may differ from the recursion's."""
SAFETY = 2.0
"""Times the next term that the local order may be off: the terms after it are less."""
LABEL_DISTANCE = 2.6
"""Least ratio of the heights of two labels in the figure."""


def simulated_variance(noise_level: float, n_steps: int, seed: int) -> Interval:
    """Return the variance of the sampler's last state as simulated.

    The state is Gaussian with mean zero, so that the interval is exact.
    """
    from scipy.special import chdtri

    total = 0.0
    for first in range(0, N_PATHS, BLOCK):
        z = normals(seed, n_steps, first, BLOCK, 0, n_steps + 1, 1)[..., 0]
        total += float(np.sum(sampler(noise_level, z[0], z[1:]) ** 2))
    tail = 0.5 * (1.0 - LEVEL) / N_INTERVALS
    low, high = (total / chdtri(N_PATHS, p) for p in (tail, 1.0 - tail))
    return Interval(total / N_PATHS, float(low), float(high))


def sampler(noise_level: float, x: Array, noises: Array) -> Array:
    """Return the last states of the sampler from x (n,) with noises (K, n)."""
    times = np.linspace(1.0, 0.0, len(noises) + 1)
    for t, after, z in zip(times, times[1:], noises, strict=False):
        dt = after - t
        v = velocity(x, t)
        sigma = noise_level * np.sqrt(t / (1.0 - (after if t == 1.0 else t)))
        mean = x * (1.0 + sigma**2 / (2.0 * t) * dt)
        mean += v * (1.0 + sigma**2 * (1.0 - t) / (2.0 * t)) * dt
        x = mean + sigma * np.sqrt(-dt) * z
    return x


def velocity(x: Array, t: float) -> Array:
    """Return E[noise - data | x], x = (1 - t) data + t noise: a perfect network's."""
    variance = (1.0 - t) ** 2 * DATA_VARIANCE + t**2
    return (t - (1.0 - t) * DATA_VARIANCE) / variance * x


def local_order(evidence: pd.DataFrame, noise_level: float) -> tuple[float, float]:
    """Return the order of the last doubling, and the next term's part in it."""
    mine = _errors(evidence, noise_level)
    before, last = _local_orders(mine["error"].to_numpy())[-2:]
    change = abs(last - before)
    gap = order_of_next_term(noise_level) - order(noise_level)
    part = change / (2.0**gap - 1.0) if gap else sqrt(change / log(2.0))
    return float(last), float(part)


def _errors(evidence: pd.DataFrame, noise_level: float) -> pd.DataFrame:
    mine = evidence["kind"].eq("exact") & evidence["noise_level"].eq(noise_level)
    return evidence[mine].sort_values("n_steps")


def _local_orders(errors: Array) -> Array:
    return np.log2(np.abs(errors[:-1] / errors[1:]))


@dataclass(frozen=True)
class FlowGRPOSamplerOrder(Claim):
    """Less noise, slower convergence: the order is the square of the noise level."""

    statement: ClassVar[str] = (
        "The stochastic sampler of Flow-GRPO with noise level η > 0 converges at order "
        "min(1, η²) in the number of steps K: its error falls like K^(−η²) for η < 1, "
        "so at the published η = 0.7 like K^(−0.49), though the same grid without "
        "noise (η = 0) has order 1."
    )
    source: ClassVar[str] = (
        "The sampler of J. Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO); the order is "
        "our derivation"
    )
    procedure: ClassVar[str] = (
        f"Data N(0, {DATA_VARIANCE}), exact velocity, K equal steps: the variance of "
        "the last state minus the data's by an exact recursion, for η = "
        f"{', '.join(f'{eta:g}' for eta in NOISE_LEVELS)} and K = {LADDER[0]} to "
        f"{LADDER[-1]:,}, doubling; the local order is that of one doubling. "
        f"Simulated: the sampler as its code has it, {N_PATHS:,} paths with K = "
        f"{' and '.join(map(str, SIMULATED_STEPS))}."
    )
    decision_rule: ClassVar[str] = (
        "Supported if for every η the local order of the last doubling is min(1, η²), "
        f"1 for η = 0, within {SAFETY:.0f} times what the next term of the error's "
        "expansion makes of it, which follows from the change over the last two "
        "doublings; and if the simulated variances are within "
        f"{MARGIN:.0f} % of the recursion; refuted if one of these is excluded; "
        "undecided otherwise. Orders are exact; the intervals of the variances "
        f"{JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, object]] = []
        count = len(NOISE_LEVELS) * len(LADDER) + N_INTERVALS
        cells = [("exact", eta, k) for eta in NOISE_LEVELS for k in LADDER]
        cells += [
            ("simulated", eta, k) for eta in SIMULATED_LEVELS for k in SIMULATED_STEPS
        ]
        for kind, noise_level, n_steps in cells:
            found = Interval(np.nan, np.nan, np.nan)
            if kind == "simulated":
                found = simulated_variance(noise_level, n_steps, seed)
            error = terminal_variance_error(noise_level, n_steps, DATA_VARIANCE)
            rows.append(
                {
                    "kind": kind,
                    "noise_level": noise_level,
                    "n_steps": n_steps,
                    "error": error,
                    **columns(found),
                }
            )
            progress(len(rows), count)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        out = []
        for noise_level in sorted(set(evidence["noise_level"])):
            found, part = local_order(evidence, noise_level)
            out.append(
                Check(
                    quantity=f"η = {noise_level:g}: local order at the largest K",
                    interval=exact(found),
                    least=round(order(noise_level) - SAFETY * part, 6),
                    most=round(order(noise_level) + SAFETY * part, 6),
                )
            )
        for row in records(evidence[evidence["kind"] == "simulated"]):
            variance = DATA_VARIANCE + row.error
            ratio = (100.0 * (x / variance - 1.0) for x in interval_of(row))
            out.append(
                Check(
                    quantity=f"η = {row.noise_level:g}, K = {row.n_steps}: simulated "
                    "minus exact variance",
                    interval=Interval(*ratio),
                    least=-MARGIN,
                    most=MARGIN,
                    unit="%",
                )
            )
        return out

    def summary(self, evidence: pd.DataFrame) -> str:
        texts = [
            f"{plain(local_order(evidence, level)[0])} at η = {level:g}"
            for level in sorted(set(evidence["noise_level"]))
        ]
        published = _errors(evidence, 0.7)
        largest = float(published["error"].iloc[-1])
        return (
            f"The local orders at K = {max(evidence['n_steps']):,} are "
            f"{', '.join(texts)}. At η = 0.7 the variance is still "
            f"{plain(100.0 * largest / DATA_VARIANCE, 2)} % too large there."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = []
        for level in sorted(set(evidence["noise_level"])):
            errors = _errors(evidence, level).set_index("n_steps")["error"]
            found, part = local_order(evidence, level)
            shown = {
                f"error at K = {k:,}": f"{plain(100.0 * errors[k] / DATA_VARIANCE)} %"
                for k in (50, 400, 25600)
            }
            rows.append(
                {
                    "η": f"{level:g}",
                    **shown,
                    "local order at the largest K": plain(found, 4),
                    "min(1, η²); η = 0: 1": f"{order(level):g}",
                    "part of the next term": plain(part, 2),
                    **_simulated(evidence, level),
                }
            )
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.6)
            panels = figure.subplots(1, 3)
            _draw_variances(panels[0], evidence)
            _draw_errors(panels[1], evidence)
            _draw_orders(panels[2], evidence)
            for axes in panels:
                finish_axes(axes)
            settle(figure)
        return figure


def _simulated(evidence: pd.DataFrame, noise_level: float) -> dict[str, str]:
    """Return the simulated and exact variances as texts, by their headings."""
    kind, level = evidence["kind"].eq("simulated"), evidence["noise_level"]
    mine = evidence[kind & level.eq(noise_level)].set_index("n_steps")
    texts = {}
    for k in sorted(set(evidence[kind]["n_steps"])):
        text = "–"
        if k in mine.index:
            row = mine.loc[k]
            text = f"{interval(*interval_of(row))}; {DATA_VARIANCE + row['error']:.4f}"
        texts[f"variance at K = {k}, simulated; exact"] = text
    return texts


def _colors(levels: list[float]) -> dict[float, tuple[float, float, float]]:
    import seaborn as sns

    return dict(zip(levels, sns.color_palette("viridis", len(levels)), strict=True))


def _draw_variances(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw the variance against the number of steps, exact and simulated."""
    from matplotlib.ticker import NullLocator

    colors = _colors(sorted(set(evidence["noise_level"])))
    simulated = evidence[evidence["kind"] == "simulated"]
    for level, rows in simulated.groupby("noise_level"):
        eta = float(str(level))
        steps = np.unique(np.geomspace(8, 2000, 60).astype(int))
        exact_values = [
            DATA_VARIANCE + terminal_variance_error(eta, int(k)) for k in steps
        ]
        axes.plot(steps, exact_values, color=colors[eta], lw=1.2, label=f"η = {eta:g}")
        value = rows["value"].to_numpy()
        ends = [value - rows["low"], rows["high"] - value]
        axes.errorbar(
            rows["n_steps"], value, yerr=ends, fmt="o", ms=3, color=colors[eta]
        )
    axes.axhline(DATA_VARIANCE, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
    axes.set_xscale("log")
    ticks = (10, 40, 200, 1000)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of steps K")
    axes.set_title("variance of the last state; data: 0.5", loc="left", pad=3)
    axes.legend(loc="lower right")


def _draw_errors(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw the size of the error against the number of steps."""
    from matplotlib.ticker import NullLocator

    ends = {}
    for level, color in _colors(sorted(set(evidence["noise_level"]))).items():
        rows = _errors(evidence, level)
        size = rows["error"].abs() / DATA_VARIANCE
        axes.loglog(rows["n_steps"], size, color=color, lw=1.2)
        ends[level] = color, float(size.iloc[-1])
    height = 0.0
    for level, (color, end) in sorted(ends.items(), key=lambda item: item[1][1]):
        height = max(end, LABEL_DISTANCE * height)
        axes.text(1.3 * LADDER[-1], height, f"{level:g}", va="center", color=color)
    axes.set_xlim(LADDER[0] / 2.0, 6.0 * LADDER[-1])
    ticks = [10.0**k for k in range(2, 7)]
    axes.set_xticks(ticks)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of steps K")
    axes.set_title("|error| / 0.5; η at the lines", loc="left", pad=3)


def _draw_orders(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw local orders at several K against the noise level, and min(1, eta^2)."""
    levels = np.linspace(0.01, 1.55, 200)
    curve = np.minimum(1.0, levels**2)
    axes.plot(levels, curve, color="0.35", lw=1.0, label="min(1, η²)")
    axes.plot([0.0], [1.0], "x", color="0.35", ms=6, label="1 at η = 0")
    for n_steps, shade in {LADDER[10]: "0.6", LADDER[-1]: "0.0"}.items():
        points = []
        for level in sorted(set(evidence["noise_level"])):
            rows = _errors(evidence, level)
            place = list(rows["n_steps"]).index(n_steps) - 1
            points.append((level, _local_orders(rows["error"].to_numpy())[place]))
        label = f"K = {n_steps:,}"
        axes.plot(*zip(*points, strict=True), "o", ms=3.5, color=shade, label=label)
    axes.set_ylim(-0.1, 1.75)
    axes.set_xlabel("noise level η")
    axes.set_title("local order in 1/K", loc="left", pad=3)
    axes.legend(loc="upper left")
