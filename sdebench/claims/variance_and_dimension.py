r"""Likelihood ratios pay for the dimension, pathwise derivatives do not.

**What is compared.** d independent copies of one problem, each coordinate with a
parameter of its own, as a network has more outputs in a larger space.  The relative
variance of a gradient estimator is the trace of the covariance of one path's
contribution over |grad J|^2: the number of paths that brings the relative error to
one.  Both trace and |grad J|^2 add up over coordinates, so that an estimator which
treats every coordinate alone has a relative variance independent of d.

With the cost c = c_1 + ... + c_d of a path and the score S_i of coordinate i,

    pathwise          g_i = dc_i / dtheta_i                        V(d) = V(1)
    likelihood ratio  g_i = (c - b) S_i + direct part,
                      b = E c                          V(d) = V(1) + w (d - 1)
                      b = 0                            a polynomial of degree 2,

with w = Var(c_1) E S_1^2 / (dJ_1/dtheta_1)^2,

because (c - b) S_i holds the noise of all other coordinates.

**One step, closed form.** X_1 = w + z, J = |w|^2/2 - q sum E X_1 at w = q/2 per
coordinate (the point halfway).  With c_0 = -3 d q^2 / 8 the mean cost and |grad J|^2 =
d q^2 / 4 the relative variances are

    pathwise 0,    b = E c: 4 (d + 1),    b = 0: 4 (d + 1) + (9/16) q^2 d^2,

the one-step prototype of every gap between zeroth-order and first-order gradients.

**The normalization matters.** If all coordinates share their parameters (a fixed
number P), one path holds d samples of the same gradient: every relative variance gains
a factor 1/d, pathwise falls like 1/d and the likelihood ratio with a baseline is flat.
The ratio of the two, which no normalization touches, grows like d in both settings.

Source: Mohamed, Rosca, Figurnov and Mnih 2020, JMLR 21(132), sections 4 and 5; Rezende,
Mohamed and Wierstra 2014, arXiv:1401.4082.  The closed forms are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, nan
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    interval_of,
    records,
    signed,
)
from sdebench.experiments.measuring import sample
from sdebench.linear_problem import LinearProblem
from sdebench.measure.intervals import Interval, variance_interval
from sdebench.problem import Problem
from sdebench.problems.brownian_linear import BrownianLinear
from sdebench.problems.ou_quadratic_easy import OUQuadraticEasy
from sdebench.report.format import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sdebench.report.style import Look

Array = NDArray[np.float64]

DIMENSIONS = (1, 2, 4, 8, 16, 32, 64)
RANGE = (8, 64)
"""Dimensions between which growth is judged: small ones still feel V(1)."""
N_STEPS = 20
ESTIMATORS = (
    "pathwise",
    "reinforce:baseline=none",
    "reinforce:baseline=leave_one_out",
    "reinforce:baseline=optimal",
)
RATIO = "leave_one_out by pathwise"
GROWS = 0.5
"""Exponent of the dimension that counts as growth."""
FLAT = 0.2
"""Exponent of the dimension, up or down, that counts as none."""
MARGIN = 10.0
"""Percent by which a measured variance may differ from its closed form."""


class _OwnParameters(LinearProblem):
    """Control family theta_i u*_i: each coordinate has a parameter of its own."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(f"coordinate_{i}" for i in range(self.dim))

    @property
    def theta_star(self) -> Array:
        return np.ones(self.dim)

    def basis(self, t: Array) -> Array:
        return np.repeat(np.eye(self.dim)[:, :, None], len(t), axis=2)

    def maps(self, t: Array) -> tuple[Array, Array]:
        quadratic, linear = self.riccati
        sigma, eye = self.model.diffusion, np.eye(self.dim)
        return (
            -np.einsum("si,nij->snij", eye, sigma.T @ quadratic(t)),
            -np.einsum("si,ni->sni", eye, linear(t) @ sigma),
        )


class _OneStep(_OwnParameters, BrownianLinear):
    """Brownian motion with a linear reward, in one step."""


class _Quadratic(_OwnParameters, OUQuadraticEasy):
    """Quadratic Ornstein-Uhlenbeck control."""


def one_step_variance(dim: int, baseline: bool, slope: float = 1.0) -> float:
    """Return the closed-form relative variance of the likelihood ratio."""
    without = 0.0 if baseline else 9.0 / 16.0 * (slope * dim) ** 2
    return 4.0 * (dim + 1) + without


@dataclass(frozen=True)
class Setting:
    """A family of problems of growing dimension and how to measure it."""

    problem: Callable[..., Problem]
    n_steps: int
    most: int
    """Replicates in dimension 1; a trace over more parameters needs fewer."""
    least: int

    def replicates(self, dim: int) -> int:
        """Return the number of replicates."""
        return max(self.most // dim, self.least)


SETTINGS = {
    "one step": Setting(_OneStep, 1, 1 << 14, 256),
    "own parameters": Setting(_Quadratic, N_STEPS, 1 << 13, 256),
    "shared parameters": Setting(OUQuadraticEasy, N_STEPS, 1 << 11, 1 << 10),
}
N_INTERVALS = len(SETTINGS) * len(DIMENSIONS) * len(ESTIMATORS)


def relative_variances(setting: Setting, dim: int, seed: int) -> list[Interval]:
    """Return the relative variance of one path of each estimator, at halfway."""
    problem = setting.problem(dim=dim)
    square = float(np.sum(problem.truth.gradient("halfway") ** 2))
    level = 1.0 - (1.0 - LEVEL) / N_INTERVALS
    replicates = setting.replicates(dim)
    return [
        variance_interval(moments, level, n_paths / square)
        for moments, n_paths in sample(
            problem, ESTIMATORS, "halfway", setting.n_steps, replicates, seed
        )
    ]


def exponent(small: Interval, large: Interval) -> Interval:
    """Return the mean exponent of the dimension over `RANGE`, with its interval."""
    span = log(RANGE[1] / RANGE[0])
    return Interval(
        log(large.estimate / small.estimate) / span,
        log(large.low / small.high) / span,
        log(large.high / small.low) / span,
    )


def _ratio(top: Interval, bottom: Interval) -> Interval:
    return Interval(
        top.estimate / bottom.estimate, top.low / bottom.high, top.high / bottom.low
    )


@dataclass(frozen=True)
class VarianceAndDimension(Claim):
    """Likelihood-ratio variance grows with the dimension, pathwise does not."""

    statement: ClassVar[str] = (
        "The relative variance of likelihood-ratio gradients grows with the dimension, "
        "with the best constant baseline too, and that of pathwise gradients does not: "
        "for d independent coordinates with a parameter each. Where the coordinates "
        "share their parameters both gain a factor 1/d; the ratio of the two grows in "
        "either case."
    )
    source: ClassVar[str] = (
        "Mohamed et al. 2020, Monte Carlo Gradient Estimation in Machine Learning, "
        "JMLR 21(132), sections 4 and 5; the closed forms are ours"
    )
    procedure: ClassVar[str] = (
        "Relative variance of one path (trace of the covariance over |∇J|²) at the "
        f"point halfway, for d = {DIMENSIONS[0]} to {DIMENSIONS[-1]}: one step of "
        "Brownian motion with a linear reward, against its closed form; and "
        f"ou_quadratic_easy with {N_STEPS} steps, with a parameter for each "
        "coordinate and with the catalogue's three shared ones. Likelihood ratios "
        "without a baseline, with the leave-one-out and with the estimated optimal one."
    )
    decision_rule: ClassVar[str] = (
        f"The exponent of d is the mean slope from d = {RANGE[0]} to {RANGE[1]} in "
        f"logarithms. Supported if, with own parameters, it is above {GROWS} for all "
        f"three likelihood ratios and within ±{FLAT} for pathwise, if that of the "
        f"ratio leave-one-out/pathwise is above {GROWS} in both settings, and if the "
        f"one-step variances are within {MARGIN:.0f} % of the closed form; refuted if "
        f"one of these is excluded; undecided otherwise. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, object]] = []
        for name, setting in SETTINGS.items():
            for dim in DIMENSIONS:
                found = relative_variances(setting, dim, seed)
                for estimator, variance in zip(ESTIMATORS, found, strict=True):
                    rows.append(
                        {
                            "setting": name,
                            "dim": dim,
                            "estimator": estimator,
                            **columns(variance),
                            "closed_form": _closed_form(name, estimator, dim),
                        }
                    )
                progress(len(rows), N_INTERVALS)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        own = _exponents(evidence, "own parameters")
        shared = _exponents(evidence, "shared parameters")
        out = [
            Check(
                quantity=f"exponent of d, own parameters, {name}",
                interval=own[name],
                least=-FLAT if name == "pathwise" else GROWS,
                most=FLAT if name == "pathwise" else inf,
            )
            for name in ESTIMATORS
        ]
        out += [
            Check(
                quantity=f"exponent of d, {kind} parameters, {RATIO}",
                interval=found[RATIO],
                least=GROWS,
            )
            for kind, found in (("own", own), ("shared", shared))
        ]
        known = evidence[evidence["closed_form"] > 0.0]
        return out + [
            Check(
                quantity=f"one step, d = {row.dim}, {row.estimator}: measured by "
                "closed-form variance",
                interval=interval_of(row).scaled(100.0 / row.closed_form),
                least=100.0 - MARGIN,
                most=100.0 + MARGIN,
                unit="%",
            )
            for row in records(known)
        ]

    def summary(self, evidence: pd.DataFrame) -> str:
        own = _exponents(evidence, "own parameters")
        shared = _exponents(evidence, "shared parameters")
        none, left_out = ESTIMATORS[1:3]
        return (
            f"With a parameter for each coordinate the relative variance from d = "
            f"{RANGE[0]} to {RANGE[1]} grows like d to the power "
            f"{signed(own[none])} without a baseline and "
            f"{signed(own[left_out])} with the leave-one-out baseline, and pathwise "
            f"like d to the power {signed(own['pathwise'])}. The statement depends on "
            "this normalization: with shared parameters the powers are "
            f"{signed(shared[none])}, {signed(shared[left_out])} and "
            f"{signed(shared['pathwise'])}. The ratio leave-one-out/pathwise grows "
            f"with the power {signed(own[RATIO])} and {signed(shared[RATIO])}."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = []
        for setting in ("own parameters", "shared parameters"):
            exponents = _exponents(evidence, setting)
            for name in ESTIMATORS:
                small, large = _ends(evidence, setting, name)
                rows.append(
                    {
                        "setting": setting,
                        "estimator": name,
                        f"relative variance, d = {RANGE[0]}": interval(*small),
                        f"d = {RANGE[1]}": interval(*large),
                        "exponent of d": signed(exponents[name]),
                    }
                )
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import (
            PAGE,
            finish_axes,
            looks,
            new_figure,
            settle,
            style,
        )

        shown = looks(ESTIMATORS)
        with style():
            figure = new_figure(PAGE, 2.9)
            panels = figure.subplots(1, len(SETTINGS), sharex=True)
            for axes, setting in zip(panels, SETTINGS, strict=True):
                _draw(axes, evidence[evidence["setting"] == setting], shown)
                axes.set_title(setting, loc="left", pad=3)
                finish_axes(axes)
            panels[0].set_ylabel("relative variance of one path")
            entries: dict[str, Any] = {}
            for axes in panels:
                handles, labels = axes.get_legend_handles_labels()
                entries |= dict(zip(labels, handles, strict=True))
            order = [*(shown[name].label for name in ESTIMATORS), "closed form"]
            figure.legend(
                [entries[label] for label in order],
                order,
                ncols=3,
                loc="outside upper center",
            )
            settle(figure)
        return figure


def _closed_form(setting: str, estimator: str, dim: int) -> float:
    """Return the closed form of the one-step problem; nan where there is none."""
    _, none, left_out, _ = ESTIMATORS
    if setting == "one step" and estimator in (none, left_out):
        return one_step_variance(dim, baseline=estimator == left_out)
    return nan


def _ends(
    evidence: pd.DataFrame, setting: str, estimator: str
) -> tuple[Interval, Interval]:
    """Return the variances at both ends of `RANGE`."""
    mine = evidence[
        (evidence["setting"] == setting) & (evidence["estimator"] == estimator)
    ].set_index("dim")
    small, large = (interval_of(mine.loc[dim]) for dim in RANGE)
    return small, large


def _exponents(evidence: pd.DataFrame, setting: str) -> dict[str, Interval]:
    """Return the exponents of all estimators and of the ratio, in one setting."""
    ends = {name: _ends(evidence, setting, name) for name in ESTIMATORS}
    found = {name: exponent(*pair) for name, pair in ends.items()}
    pairs = zip(ends[ESTIMATORS[2]], ends["pathwise"], strict=True)
    found[RATIO] = exponent(*(_ratio(top, bottom) for top, bottom in pairs))
    return found


def _draw(axes: Axes, rows: pd.DataFrame, shown: dict[str, Look]) -> None:
    """Draw the variances of one setting against the dimension."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, look in shown.items():
        mine = rows[rows["estimator"] == name]
        value = mine["value"].to_numpy()
        if not value.all():
            axes.text(0.97, 0.05, f"{name}: 0", transform=axes.transAxes, ha="right")
            continue
        axes.errorbar(
            mine["dim"],
            value,
            yerr=[value - mine["low"], mine["high"] - value],
            fmt="o",
            ls=look.line,
            lw=1.1,
            ms=3,
            color=look.color,
            label=look.label,
        )
        if mine["closed_form"].notna().any():
            axes.plot(
                mine["dim"],
                mine["closed_form"],
                color="black",
                ls=(0, (1, 1.5)),
                lw=1.2,
                zorder=5,
                label="closed form",
            )
    axes.set_xticks(DIMENSIONS, [str(d) for d in DIMENSIONS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("dimension d")
