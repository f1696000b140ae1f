r"""One weighted sample for several expectations, with control variates.

f = N(0, 1), phi = (x, x^2, e^{0.8 x}), each weighted by one over its variance, so that
plain sampling has S = 3.  The best proposal g ~ f sqrt(sum w (phi - beta)^2) and the
best coefficients beta for it are found in turns
(`sdebench.closed_form.control_variate_sampling`).
The self-normalized choice beta = I is far from the best one.

Exact values are sums over a fine grid; the estimator itself,

    I_j_hat = mean[(phi_j - beta_j) f/g] + beta_j,      X ~ g,

is run on draws from g by the inverse of its distribution function, and its variance and
its bias measured.  The adaptive algorithm has to learn beta from a sample: here from
draws of f, on which the same turns are taken; then a fresh sample is drawn, which keeps
the estimate without bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench.closed_form.control_variate_sampling import (
    alternate,
    best_beta,
    best_ratio,
    variance,
)
from sdebench.closed_form.log_quadratics import Array
from sdebench.experiments.experiment import Progress, exact, records
from sdebench.measure.intervals import Interval, variance_interval
from sdebench.measure.moments import sample_moments
from sdebench.studies._study import Study, compared, count_agreeing, level_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = np.linspace(-14.0, 14.0, 56_001)
N_DRAWS = 1 << 20
PILOTS = (30, 300, 3000)
"""Draws from f that beta is learned from."""
RATE = 0.8
PLAIN, ALONE, TURNS, AT_MEANS = (
    "plain sampling",
    "best proposal alone, β = 0",
    "proposal and β in turns",
    "best proposal at β = I",
)
PRINTED = {PLAIN: "3.000", ALONE: "1.173", TURNS: "0.9598", AT_MEANS: "1.804"}
PRINTED_BETA = ("-0.584", "-0.372", "0.311")
NAMES = ("x", "x²", "exp(0.8 x)")


def functions(x: Array) -> Array:
    """Return phi (3, n) at the points (n,)."""
    return np.array([x, x**2, np.exp(RATE * x)])


def law(grid: Array = GRID) -> Array:
    """Return the probabilities of the grid's points under f."""
    density = np.exp(-0.5 * grid**2)
    return np.asarray(density / density.sum())


def closed_moments() -> tuple[Array, Array]:
    """Return I and the variances of phi under f, by formula."""
    growth = np.exp(0.5 * RATE**2)
    return np.array([0.0, 1.0, growth]), np.array([1.0, 2.0, growth**4 - growth**2])


@dataclass(frozen=True)
class Scheme:
    """A ratio g/f on the grid and coefficients."""

    ratio: Array
    beta: Array

    def variance(self) -> float:
        """Return S, a sum over the grid."""
        return variance(functions(GRID), law(), _weights(), self.ratio, self.beta)

    def draw(self, count: int, seed: int) -> Array:
        """Return the estimates (count, 3) of single draws from g."""
        cumulative = np.cumsum(law() * self.ratio)
        rng = np.random.Generator(np.random.Philox(key=seed))
        places = np.searchsorted(cumulative / cumulative[-1], rng.random(count))
        phi = functions(GRID[places])
        return ((phi - self.beta[:, None]) / self.ratio[places] + self.beta[:, None]).T


def _weights() -> Array:
    return np.asarray(1.0 / closed_moments()[1])


def schemes() -> dict[str, Scheme]:
    """Return the four schemes of the table."""
    phi, f, w = functions(GRID), law(), _weights()
    means = closed_moments()[0]
    turns = alternate(phi, f, w)
    zero = np.zeros(3)
    return {
        PLAIN: Scheme(np.ones_like(GRID), zero),
        ALONE: Scheme(best_ratio(phi, f, w, zero), zero),
        TURNS: Scheme(turns.ratio, turns.beta),
        AT_MEANS: Scheme(best_ratio(phi, f, w, means), means),
    }


def learned(count: int, seed: int) -> Scheme:
    """Return the scheme whose beta comes from ``count`` draws of f."""
    rng = np.random.Generator(np.random.Philox(key=[seed, count]))
    x = rng.standard_normal(count)
    found = alternate(functions(x), np.full(count, 1.0 / count), _weights())
    return Scheme(
        best_ratio(functions(GRID), law(), _weights(), found.beta), found.beta
    )


def measured_variance(scheme: Scheme, seed: int, n_intervals: int) -> Interval:
    """Return the weighted variance of one draw, measured."""
    values = scheme.draw(N_DRAWS, seed) * np.sqrt(_weights())
    return variance_interval(sample_moments(values), level_of_each(n_intervals))


def turns_from(beta: Array, count: int) -> list[float]:
    """Return S after each of the first turns from ``beta``."""
    phi, f, w = functions(GRID), law(), _weights()
    found = []
    for _ in range(count):
        ratio = best_ratio(phi, f, w, beta)
        beta = best_beta(phi, f, ratio)
        found.append(variance(phi, f, w, ratio, beta))
    return found


@dataclass(frozen=True)
class AdaptiveImportanceSampling(Study):
    """Variance of one weighted sample for three expectations."""

    subject: ClassVar[str] = (
        "Three expectations from one weighted sample: the variance with the best "
        "proposal, with control variates f/g, and with both found in turns, derived "
        "and as the estimator has it."
    )
    source: ClassVar[str] = (
        "arXiv:2212.00568 (adaptive importance sampling with control variates for "
        "several expectations); numbers derived"
    )
    procedure: ClassVar[str] = (
        "f = N(0, 1), φ = (x, x², e^0.8x), S = Σ Var_j of one draw over the variances "
        "of plain sampling. Exact: sums over a grid. Measured: the estimator on "
        f"{N_DRAWS:,} draws from g. Learned: β from draws of f by the same turns, then "
        "the exact S of the fresh sample."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows = list(_rows(seed, progress))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        table = evidence[evidence["part"] != "learned"]
        found = evidence[evidence["part"] == "learned"].set_index("pilot")["value"]
        least = evidence[evidence["part"] == "exact"].set_index("quantity")["value"]
        loss = 100.0 * (found / least[TURNS] - 1.0)
        return (
            f"{count_agreeing(table)} of {len(table)} numbers agree. The best pair has "
            f"S = {least[TURNS]:.4f}, against {least[ALONE]:.4f} without control "
            f"variate and {least[AT_MEANS]:.4f} at β = I. With β learned from "
            f"{', '.join(f'{count:,}' for count in PILOTS)} draws S is "
            f"{', '.join(f'{loss[count]:.2g}' for count in PILOTS)} % above the best."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rest = evidence[evidence["part"] == "learned"]
        own = [
            {
                "quantity": row.quantity,
                "source": "–",
                "ours": f"{row.value:.4f}",
                "agreement": "–",
            }
            for row in records(rest)
        ]
        agreed = super().table(evidence[evidence["part"] != "learned"])
        return pd.concat([agreed, pd.DataFrame(own)], ignore_index=True)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.6)
            left, right = figure.subplots(1, 2)
            _draw_densities(left)
            _draw_turns(right)
            for axes in (left, right):
                finish_axes(axes)
                axes.legend()
            settle(figure)
        return figure


def _rows(seed: int, progress: Progress) -> Iterator[dict[str, Any]]:
    found = schemes()
    total = len(found) + 1
    for done, (name, scheme) in enumerate(found.items(), start=1):
        printed = PRINTED[name]
        yield compared(name, printed, exact(scheme.variance())) | {"part": "exact"}
        measured = measured_variance(scheme, seed, len(found))
        yield compared(f"{name}, measured", printed, measured) | {"part": "measured"}
        progress(done, total)
    pairs = zip(NAMES, PRINTED_BETA, found[TURNS].beta, strict=True)
    for name, printed, value in pairs:
        row = compared(f"best β of {name}", printed, exact(float(value)))
        yield row | {"part": "beta"}
    for count in PILOTS:
        value = learned(count, seed).variance()
        row = compared(f"β learned from {count:,} draws", "0", exact(value))
        yield row | {"part": "learned", "pilot": count}
    progress(total, total)


def _draw_densities(axes: Axes) -> None:
    """Draw f and the proposals."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    step = GRID[1] - GRID[0]
    density = law() / step
    shown = np.abs(GRID) < 5.5
    for color, (name, scheme) in zip(palette, schemes().items(), strict=False):
        label = "f" if name == PLAIN else name
        values = density * scheme.ratio
        axes.plot(GRID[shown], values[shown], color=color, lw=1.2, label=label)
    axes.set_ylim(0.0, 0.62)
    axes.set_xlabel("x")
    axes.set_ylabel("density of the draws")


def _draw_turns(axes: Axes) -> None:
    """Draw S after each turn from a few starts."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")[1:]
    starts = {
        "β = 0": np.zeros(3),
        "β = I": closed_moments()[0],
        "β = (2, −2, 4)": np.array([2.0, -2.0, 4.0]),
    }
    count = 30
    for color, (name, beta) in zip(palette, starts.items(), strict=False):
        values = turns_from(beta, count)
        axes.plot(range(1, count + 1), values, "o-", ms=2.5, color=color, label=name)
    axes.axhline(schemes()[TURNS].variance(), color="0.35", lw=0.8, ls=(0, (4, 1.5)))
    axes.set_xlabel("turns")
    axes.set_ylabel("S after so many turns")
