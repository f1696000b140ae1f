r"""Guidance by the reward of the posterior mean does not sample the tilted law.

A denoiser D_t(x) = E[X_1 | X_t = x] of the base process makes a guidance without any
training: the control of the reward at the posterior mean, instead of the mean of e^r,

    guided    u  = sigma grad r(D_t(x))
    optimal   u* = sigma grad log E[e^{r(X_1)} | X_t = x].

For data N(0, C) and the reward -k x^2 / 2 both are closed forms.  With the posterior
variance S_t the optimal control is that of guidance divided by 1 + k S_t, so that
guidance is too strong, most of all at the noisy end.  D_t is a martingale of the base
with quadratic variation C - S_t; in this clock, s = C - S_t from 0 to C,

    guided    dD = -k D ds + dB,               Var X_1 = (1 - e^{-2 k C}) / (2 k)
    optimal   dD = -k D / (1 + k S) ds + dB,   Var X_1 = C / (1 + k C),

on every schedule.  A linear reward b x is the exception: there, and for Gaussian data,
r(D) differs from log E[e^r | x] by a constant and guidance is optimal.  For mixtures
it is not.

The experiment simulates the guided process by Euler-Maruyama with N and 2 N steps,
removes the error of order 1/N by Richardson's extrapolation, and shares with the
formulae the base process only.

Source: Chung et al. 2023, arXiv:2209.14687, section 3 (one-point approximation of the
posterior); the closed forms are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.closed_form import log_quadratics as lq
from sdebench.experiments.experiment import (
    Progress,
    columns,
    interval_of,
    records,
)
from sdebench.experiments.measuring import extrapolated
from sdebench.measure.intervals import Interval
from sdebench.report.format import interval, plain
from sdebench.tilting_problem import TiltingProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

RATE = 8.0
"""Of the VP schedule: the memory of the start, alpha_0^2, is 3e-4."""
N_STEPS = 200
BLOCK, N_BLOCKS = 1 << 16, 4
N_PATHS = BLOCK * N_BLOCKS
TOLERANCE = 5.0
"""Percent of the tilted law's number that still counts as sampling it."""

CURVATURES = (0.25, 1.0, 4.0)
INVERSE_TEMPERATURES = (0.125, 1.0)
TIMES = np.linspace(0.0, 1.0, 101)[:-1]


def guided_variance(k: float, variance: float = 1.0) -> float:
    """Return Var X_1 under guidance for data N(0, C), reward -k x^2 / 2."""
    return float(-np.expm1(-2.0 * k * variance) / (2.0 * k))


def tilted_variance(k: float, variance: float = 1.0) -> float:
    """Return the variance of the tilted law."""
    return variance / (1.0 + k * variance)


@dataclass(frozen=True)
class Setting:
    """A problem and the moment of X_1 that is compared with the tilted law's."""

    name: str
    problem: TiltingProblem
    moment: str  # "mean", "variance" or "share of the right mode"

    def values(self, x: Array) -> Array:
        """Return numbers whose mean is the moment, of a sample (n,)."""
        if self.moment == "mean":
            return x
        if self.moment == "variance":
            return np.square(x - x.mean())
        return (x > 0.0).astype(float)

    def tilted(self) -> float:
        """Return the exact moment of the tilted law."""
        from scipy.stats import norm

        weights, means, variances = self.problem.family.ideal_law(
            self.problem.theta_star
        )
        mean = float(weights @ means[:, 0])
        if self.moment == "mean":
            return mean
        if self.moment == "variance":
            return float(weights @ (variances[:, 0] + means[:, 0] ** 2) - mean**2)
        right = norm.cdf(means[:, 0] / np.sqrt(variances[:, 0]))
        return float(weights @ right)


def _gaussian(**reward: float) -> TiltingProblem:
    problem = registry.problem("gaussian_tilt", variance=1.0, rate=RATE, **reward)
    assert isinstance(problem, TiltingProblem)
    return problem


def _modes(beta: float) -> TiltingProblem:
    problem = registry.problem("two_modes", beta=beta, rate=RATE, start="marginal")
    assert isinstance(problem, TiltingProblem)
    return problem


def settings() -> list[Setting]:
    """Return what is simulated."""
    return [
        Setting("one mode, r = x", _gaussian(slope=1.0, curvature=0.0), "mean"),
        *(
            Setting(
                f"one mode, r = −{k:g} x²/2",
                _gaussian(slope=0.0, curvature=k),
                "variance",
            )
            for k in CURVATURES
        ),
        *(
            Setting(
                f"two modes, r = −{beta:g} (x − 3)²/2",
                _modes(beta),
                "share of the right mode",
            )
            for beta in INVERSE_TEMPERATURES
        ),
    ]


N_INTERVALS = 1 + len(CURVATURES) + len(INVERSE_TEMPERATURES)


def guidance(problem: TiltingProblem, x: Array, t: float) -> Array:
    """Return the guided control sigma grad r(D_t(x)) of states (n, 1)."""
    base = problem.family.base
    rows = base.marginal(t)
    scale, offset, noise = base.backward(t, base.horizon)
    # Tweedie's formula, and its derivative
    denoised = (x - offset + noise * lq.gradient(rows, x)) / scale
    slope = (1.0 + noise * lq.hessian(rows, x)[..., 0]) / scale
    pull = lq.gradient(problem.family.reward_rows(problem.theta_star), denoised)
    return base.sigma(t) * slope * pull


def terminal(problem: TiltingProblem, n_steps: int, rng: np.random.Generator) -> Array:
    """Return X_1 (n,) of `N_PATHS` guided paths."""
    found = []
    start = problem.truth.base_marginal(0.0)
    times = problem.time_grid(n_steps)
    for _ in range(N_BLOCKS):
        x = start.sample(rng, BLOCK)
        for t, h in zip(times[:-1], np.diff(times), strict=True):
            sigma = problem.family.base.sigma(t)
            drift = problem.drift(x, t) + sigma * guidance(problem, x, t)
            x = x + h * drift + np.sqrt(h) * sigma * rng.standard_normal(x.shape)
        found.append(x[:, 0])
    return np.concatenate(found)


def simulated(setting: Setting, rng: np.random.Generator) -> Interval:
    """Return the moment of X_1 under guidance, extrapolated to continuous time."""
    moments = []
    for n_steps in (N_STEPS, 2 * N_STEPS):
        values = setting.values(terminal(setting.problem, n_steps, rng))
        moments.append((float(values.mean()), float(values.var() / len(values))))
    coarse, fine = moments
    return extrapolated(coarse, fine, N_PATHS, N_INTERVALS)


def excess(problem: TiltingProblem) -> Array:
    """Return the distance of guidance from u*, relative to u*, at `TIMES`.

    Root mean squares under the optimally controlled law, by quadrature.
    """
    found = []
    for t in TIMES:
        law = problem.truth.tilted_marginal(float(t))
        reach = 9.0 * np.sqrt(law.covariances.max()) + np.abs(law.means).max()
        x = np.linspace(-reach, reach, 4001)[:, None]
        density = np.exp(law.log_density(x))
        best = problem.truth.control(x, float(t))
        gap = guidance(problem, x, float(t)) - best
        squares = [float(density @ np.sum(v**2, axis=1)) for v in (gap, best)]
        found.append(np.sqrt(squares[0] / squares[1]))
    return np.array(found)


@dataclass(frozen=True)
class PosteriorMeanGuidance(Claim):
    """Guidance by the reward of the posterior mean samples the tilted law."""

    statement: ClassVar[str] = (
        "A denoising process guided by the gradient of the reward at the posterior "
        "mean, r(E[X₁ | X_t]), ends in the tilted law p e^r / Z: moments and the "
        f"share of each mode are right to {TOLERANCE:g} %."
    )
    source: ClassVar[str] = (
        "Chung et al. 2023, arXiv:2209.14687, section 3: the one-point approximation "
        "of the posterior, used as guidance by a reward; the closed forms are ours"
    )
    procedure: ClassVar[str] = (
        f"The guided process is simulated ({N_PATHS:,} paths with {N_STEPS} and as "
        f"many with {2 * N_STEPS} Euler–Maruyama steps, extrapolated) on the VP "
        "schedule with memoryless noise, for data N(0, 1) with a linear reward and "
        f"with quadratic ones, k = {', '.join(f'{k:g}' for k in CURVATURES)}, and for "
        "two modes at ±3 with a quadratic reward, β = "
        f"{', '.join(f'{b:g}' for b in INVERSE_TEMPERATURES)}. Measured is the mean or "
        "variance of X₁, or the share of the right mode, in percent of the tilted "
        "law's."
    )
    decision_rule: ClassVar[str] = (
        f"Supported if all numbers are within {TOLERANCE:g} % of the tilted law's; "
        "refuted if one is not; undecided if an interval leaves it open. "
        f"All {N_INTERVALS} intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rng = np.random.default_rng(seed)
        rows = []
        for done, setting in enumerate(settings(), start=1):
            target = setting.tilted()
            share = simulated(setting, rng).scaled(100.0 / target)
            rows.append(
                {
                    "setting": setting.name,
                    "moment": setting.moment,
                    "tilted": target,
                    **columns(share),
                    "closed_form": 100.0 * self._closed_form(setting) / target,
                }
            )
            progress(done, N_INTERVALS)
        return pd.DataFrame(rows)

    @staticmethod
    def _closed_form(setting: Setting) -> float:
        """Return the exact moment under guidance; NaN for mixtures."""
        if setting.moment == "variance":
            return guided_variance(float(setting.problem.theta_star[1]))
        return setting.tilted() if setting.moment == "mean" else np.nan

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        return [
            Check(
                quantity=f"{row.setting}: {row.moment} under guidance",
                interval=interval_of(row),
                least=100.0 - TOLERANCE,
                most=100.0 + TOLERANCE,
                unit="%",
            )
            for row in records(evidence)
        ]

    def summary(self, evidence: pd.DataFrame) -> str:
        texts = [
            f"{row.moment} {interval(*interval_of(row), '%')} ({row.setting})"
            for row in records(evidence)
        ]
        return (
            f"In percent of the tilted law's: {', '.join(texts)}. For Gaussian data "
            "guidance is 1 + k S times the optimal control, S the posterior variance."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "data and reward": row.setting,
                    "moment": row.moment,
                    "tilted law": plain(row.tilted, 4),
                    "guided, % of it": interval(*interval_of(row)),
                    "closed form": "–"
                    if np.isnan(row.closed_form)
                    else plain(row.closed_form, 4),
                }
                for row in records(evidence)
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.7)
            left, right = figure.subplots(1, 2)
            _draw_variance(left, evidence)
            _draw_excess(right)
            for axes in (left, right):
                finish_axes(axes)
            settle(figure)
        return figure


def _draw_variance(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw the variance of X_1 against the curvature of the reward."""
    import seaborn as sns

    blue, orange = sns.color_palette("colorblind")[:2]
    k = np.geomspace(0.1, 10.0, 200)
    axes.plot(k, [tilted_variance(v) for v in k], "--", color="0.35", label="tilted")
    guided = [guided_variance(v) for v in k]
    axes.plot(k, guided, color=blue, lw=1.2, label="guided, closed form")
    mine = evidence[evidence["moment"] == "variance"]
    unit = mine["tilted"] / 100.0
    value = mine["value"] * unit
    axes.errorbar(
        CURVATURES,
        value,
        yerr=[value - mine["low"] * unit, mine["high"] * unit - value],
        fmt="o",
        ms=4,
        color=orange,
        label="guided, simulated",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("curvature k of the reward −k x²/2")
    axes.set_ylabel("variance of X₁; data: 1")
    axes.legend(loc="lower left")


def _draw_excess(axes: Axes) -> None:
    """Draw the distance from the optimal control over time."""
    import seaborn as sns

    for setting, color in zip(
        settings()[1:], sns.color_palette("colorblind"), strict=False
    ):
        line: dict[str, Any] = {"ls": "-" if "one" in setting.name else (0, (4, 1.5))}
        axes.plot(
            TIMES,
            100.0 * excess(setting.problem),
            color=color,
            lw=1.2,
            **line,
            label=setting.name,
        )
    axes.set_yscale("log")
    axes.set_xlabel("time t; 1: data")
    axes.set_ylabel("distance from u*, % of u*")
    axes.legend(loc="lower left", fontsize="small")
