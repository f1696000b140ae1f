r"""Variances of gradient estimators in one Gaussian step.

x = theta + sigma eps with the reward R = x^2, so that dE R/dtheta = 2 theta.  One
sample of each estimator has the variance

    pathwise, 2 x                                      4 sigma^2
    likelihood ratio, R eps / sigma                    theta^4/sigma^2 + 14 theta^2
                                                       + 15 sigma^2
    with the baseline E R = theta^2 + sigma^2          8 theta^2 + 10 sigma^2
    with the best constant, theta^2 + 3 sigma^2        8 theta^2 + 6 sigma^2.

In d dimensions with R = b . x the traces are 0 for pathwise and, for the likelihood
ratio, (b . theta)^2 d / sigma^2 + (d + 1) |b|^2 without a baseline and (d + 1) |b|^2
with the baseline b . theta.

A baseline known exactly is a reward less a constant.  Baselines from the sample cost
more: with the mean of the other n - 1 paths n times the variance of the mean is that
of the exact baseline plus

    (Var R / sigma^2 + (2 theta)^2) / (n - 1) = (8 theta^2 + 2 sigma^2) / (n - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.experiments.experiment import Progress, records
from sdebench.experiments.measuring import N_PATHS, sample
from sdebench.linear_problem import Array, LinearProblem, Profile
from sdebench.measure.intervals import Interval, variance_interval
from sdebench.studies._study import Study, compared, count_agreeing, level_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTINGS = ((0.5, 1.0), (1.0, 0.5), (2.0, 0.3))
"""theta and sigma of the quadratic reward."""
DIMENSIONS = (1, 4, 16, 64)
MEAN, SIGMA = 0.5, 0.7
"""Coordinates of theta and sigma of the linear reward; b = (1, ..., 1)."""
MOST, LEAST = 1 << 16, 1 << 12
"""Replicates in dimension 1, and at least; a trace over more parameters needs fewer."""
N_INTERVALS = 5 * len(SETTINGS) + 3 * len(DIMENSIONS)

PATHWISE = "pathwise:objective=reward"
NO_BASELINE = "reinforce:objective=reward,baseline=none"
LEAVE_ONE_OUT = "reinforce:objective=reward,baseline=leave_one_out"


@dataclass(frozen=True)
class Case:
    """A way to estimate: what is run, the constant baseline, and the variance."""

    estimator: str
    baseline: Callable[[float, float], float]
    variance: Callable[[float, float], float]


def leave_one_out_variance(theta: float, sigma: float, n: int = N_PATHS) -> float:
    """Return n times the variance of the mean with the baseline of the others."""
    own = 8.0 * theta**2 + 10.0 * sigma**2
    return own + (8.0 * theta**2 + 2.0 * sigma**2) / (n - 1)


CASES: Mapping[str, Case] = {
    "pathwise": Case(PATHWISE, lambda t, s: 0.0, lambda t, s: 4 * s**2),
    "likelihood ratio, no baseline": Case(
        NO_BASELINE,
        lambda t, s: 0.0,
        lambda t, s: t**4 / s**2 + 14 * t**2 + 15 * s**2,
    ),
    "likelihood ratio, mean reward": Case(
        NO_BASELINE, lambda t, s: t**2 + s**2, lambda t, s: 8 * t**2 + 10 * s**2
    ),
    "likelihood ratio, best constant": Case(
        NO_BASELINE, lambda t, s: t**2 + 3 * s**2, lambda t, s: 8 * t**2 + 6 * s**2
    ),
    f"likelihood ratio, mean of {N_PATHS - 1} others": Case(
        LEAVE_ONE_OUT, lambda t, s: 0.0, leave_one_out_variance
    ),
}
TRACES: Mapping[str, Case] = {
    "pathwise": Case(PATHWISE, lambda d, s: 0.0, lambda d, s: 0.0),
    "likelihood ratio, no baseline": Case(
        NO_BASELINE,
        lambda d, s: 0.0,
        lambda d, s: (MEAN * d) ** 2 * d / s**2 + (d + 1) * d,
    ),
    "likelihood ratio, mean reward": Case(
        NO_BASELINE, lambda d, s: MEAN * d, lambda d, s: (d + 1) * d
    ),
}
"""The same for the linear reward, in the dimension and sigma; |b|^2 = d."""


@dataclass(frozen=True, kw_only=True)
class _OneStep(LinearProblem):
    """x = theta + sigma eps; rewards slope sum x - curvature |x|^2 / 2 - constant."""

    dim: int = 1
    sigma: float = 1.0
    slope: float = 0.0
    curvature: float = 0.0
    constant: float = 0.0

    def build(self) -> LinearQuadratic:
        eye = np.eye(self.dim)
        return LinearQuadratic(
            drift_matrix=0.0 * eye,
            drift_offset=np.zeros(self.dim),
            diffusion=self.sigma * eye,
            running=0.0 * eye,
            reward_quadratic=self.curvature * eye,
            reward_linear=np.full(self.dim, self.slope),
            reward_constant=-self.constant,
            horizon=1.0,
            start_mean=np.zeros(self.dim),
            start_covariance=0.0 * eye,
        )

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(f"mean_{i}" for i in range(self.dim))

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return tuple(Profile(n, i, 0) for i, n in enumerate(self.parameter_names))

    @property
    def theta_star(self) -> Array:
        return np.zeros(self.dim)

    def spatial_map(self, name: str, t: Array) -> tuple[Array, Array]:
        bias = np.zeros((len(t), self.dim))
        bias[:, self.parameter_names.index(name)] = 1.0 / self.sigma
        return np.zeros((len(t), self.dim, self.dim)), bias


def measured_variance(
    problem: _OneStep, theta: Array, estimator: str, seed: int
) -> Interval:
    """Return n times the variance of an estimate from n paths, with its interval."""
    point = [float(v) for v in theta]
    replicates = max(MOST // problem.dim, LEAST)
    ((moments, count),) = sample(problem, [estimator], point, 1, replicates, seed)
    return variance_interval(moments, level_of_each(N_INTERVALS), count)


def _cells() -> Iterator[tuple[_OneStep, float, str, Case, float]]:
    """Yield problem, every theta_i, the case with its name, and its variance."""
    for theta, sigma in SETTINGS:
        for name, case in CASES.items():
            # the cost x^2 - baseline: R with the sign of an objective
            constant = -case.baseline(theta, sigma)
            problem = _OneStep(sigma=sigma, curvature=2.0, constant=constant)
            yield problem, theta, name, case, case.variance(theta, sigma)
    for dim in DIMENSIONS:
        for name, case in TRACES.items():
            constant = case.baseline(dim, SIGMA)
            problem = _OneStep(dim=dim, sigma=SIGMA, slope=1.0, constant=constant)
            yield problem, MEAN, name, case, case.variance(dim, SIGMA)


@dataclass(frozen=True)
class OneStepGaussian(Study):
    """Variances of pathwise and likelihood-ratio gradients in closed form."""

    subject: ClassVar[str] = (
        "Variance of one path's gradient of E R, x = θ + σ ε: pathwise and likelihood "
        "ratio with several baselines, for R = x² and for a linear reward in d "
        "dimensions, by formula and as our estimators have it."
    )
    source: ClassVar[str] = "Elementary (Gaussian moments); derived"
    procedure: ClassVar[str] = (
        f"One step, {MOST:,} replicates of {N_PATHS} paths, fewer in many dimensions. "
        "The best constant and the mean reward are exact numbers, taken off the "
        "reward; the mean of the other paths is the leave-one-out baseline, whose "
        f"formula has a term in 1/n. Linear reward: every θ_i = {MEAN}, σ = {SIGMA}, "
        "b = (1, …, 1)."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows = []
        for problem, theta, name, case, formula in _cells():
            point = np.full(problem.dim, theta)
            found = measured_variance(problem, point, case.estimator, seed)
            sigma, quadratic = problem.sigma, problem.curvature > 0.0
            setting = f"x², θ = {theta:g}, σ = {sigma:g}"
            if not quadratic:
                setting = f"linear, d = {problem.dim}"
            rows.append(
                compared(f"{setting}: {name}", f"{formula:.6g}", found)
                | {"case": name, "theta": theta, "sigma": sigma, "dim": problem.dim}
                | {"quadratic": quadratic}
            )
            progress(len(rows), N_INTERVALS)
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        worst = ((evidence["high"] - evidence["low"]) / evidence["value"]).max()
        return (
            f"{count_agreeing(evidence)} of {len(evidence)} formulae agree with the "
            f"measured variances, whose intervals reach at most {50 * worst:.0f} % to "
            "either side."
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.6)
            left, right = figure.subplots(1, 2)
            _draw_quadratic(left, evidence[evidence["quadratic"]])
            _draw_linear(right, evidence[~evidence["quadratic"]])
            for axes in (left, right):
                axes.legend(loc="upper left")
                finish_axes(axes)
            settle(figure)
        return figure


def _draw_quadratic(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw variance by sigma^2 against theta by sigma: one curve for all settings."""
    ratios = np.geomspace(0.2, 12.0, 100)
    for (name, case), color in zip(CASES.items(), _colors(), strict=False):
        if "others" not in name:  # as good as the mean reward
            curve = [case.variance(ratio, 1.0) for ratio in ratios]
            axes.loglog(ratios, curve, color=color, lw=1.2, label=name)
    for row in records(evidence):
        color = _colors()[list(CASES).index(row.case)]
        if "others" not in row.case:
            _dot(axes, row, row.theta / row.sigma, row.sigma**-2, color)
    axes.set_ylim(top=1e6)
    axes.set_xlabel("θ / σ")
    axes.set_title("R = x²: variance / σ²", loc="left", pad=3)


def _draw_linear(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw traces against the dimension; that of pathwise is zero."""
    for name, case in TRACES.items():
        if name == "pathwise":
            continue
        color = _colors()[list(CASES).index(name)]
        dims = np.geomspace(1.0, 64.0, 50)
        curve = [case.variance(d, SIGMA) for d in dims]
        axes.loglog(dims, curve, color=color, lw=1.2, label=name)
        for row in records(evidence[evidence["case"] == name]):
            _dot(axes, row, row.dim, 1.0, color)
    axes.set_xticks(list(DIMENSIONS), [str(d) for d in DIMENSIONS])
    axes.set_xlabel("dimension d")
    axes.set_title("linear reward: trace; pathwise is 0", loc="left", pad=3)


def _dot(axes: Axes, row: object, x: float, scale: float, color: object) -> None:
    value, low, high = (scale * getattr(row, k) for k in ("value", "low", "high"))
    ends = [[value - low], [high - value]]
    axes.errorbar(x, value, yerr=ends, fmt="o", ms=3.5, color=color)


def _colors() -> list[tuple[float, float, float]]:
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    return [palette[i] for i in (0, 1, 3, 2, 4)]
