r"""Sticking the landing: no variance at the optimum, in continuous time.

The pathwise derivative of J is that of the log-ratio of the path's density to the
tilted one without its martingale sum w_n . z_n.  With the martingale, and without the
score (dw_n)^T z_n, which has mean zero, the costate at the optimal control is the
gradient of the value function on every path, so that (w_n + G_n^T lambda_{n+1}) and
with it the estimate are zero: "sticking the landing".

On a chain this holds up to the time step.  At the feedback that is optimal for an
affine chain of N steps, with the Hessian P_n of its value function,

    g = sum_n (dw_n)^T G_n^T P_{n+1} G_n z_n,
    tr Cov g = sum_n E |G_n^T P_{n+1} G_n dw_n|^2 = O(1/N^2),

a sum of orthogonal terms, known exactly.  At theta*, the optimum of continuous time,
there is an error of the same order more.  Where the value function is no quadratic the
costate lags behind its gradient by h V''' (z^2 - 1) in every step, which adds up to
O(sqrt h): a variance of O(1/N).  Where the control does not depend on the state the
martingale has no derivative, and the two estimators are the same.

Sources: Roeder, Wu and Duvenaud 2017, arXiv:1703.09194; Xu et al. 2022,
arXiv:2102.06559 (on path space); the chain's closed form is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.claims.lean_adjoint import is_open_loop
from sdebench.experiments.chain_optimum import ChainOptimum
from sdebench.experiments.comparisons import power, relative_bias, replicate_values
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    interval_of,
    records,
    signed,
)
from sdebench.experiments.measuring import gradient_scale, sample
from sdebench.measure.intervals import Interval, variance_interval
from sdebench.measure.moments import sample_moments
from sdebench.problem import Problem
from sdebench.problems.ddpm_chain import DDPMChain
from sdebench.problems.ou_quadratic_easy import OUQuadraticEasy
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PATHWISE, LANDING = ESTIMATORS = "pathwise", "pathwise:sticking_the_landing=true"
AFFINE = (
    "brownian_linear",
    "damped_oscillator",
    "ddpm_chain",
    "gaussian_tilt",
    "lq_oscillator",
    "ou_linear",
    "ou_quadratic_easy",
    "ou_quadratic_hard",
)
MIXTURES = ("four_modes", "nine_modes")
LADDER = (32, 64, 128, 256, 512, 1024)
RANGE = (256, 1024)
"""Numbers of steps between which the order is judged."""
FALLS = {True: 1.5, False: 0.3}
"""Least order in 1/N of a variance that vanishes: on affine chains, and elsewhere."""
STAYS = 0.5
"""Order in 1/N, up or down, of a variance that does not vanish."""
N_REPLICATES = {True: 1 << 7, False: 1 << 8}
"""Of the variances; mixtures have heavier tails."""
N_PAIRED = 1 << 11
MARGIN = 2.0
"""Percent of the gradient by which the means may differ."""
CLOSED_MARGIN = 10.0
"""Percent by which a measured variance may differ from its closed form."""
CHAIN_STEPS = (8, 64)
ROUNDING = 1e-20
"""Relative variance that counts as none."""


def chain_variance(problem: ChainOptimum) -> float:
    """Return the exact variance of sticking the landing at the chain's optimum."""
    policy = problem.truth.policy_chain("optimum", problem.n_steps)
    chain, gain, bias = policy.chain, policy.gain, policy.bias
    means, covariances = (part[:-1] for part in chain.moments(gain, bias))
    hessian = chain.value_coefficients()[0][1:]
    curvature = np.swapaxes(chain.noise, 1, 2) @ hessian @ chain.noise
    slope = curvature @ gain  # dw_n / dtheta = gain x + bias
    mean = np.einsum("nij,nj->ni", slope, means)
    mean += np.einsum("nij,nj->ni", curvature, bias)
    spread = np.einsum("nij,njk,nik->", slope, covariances, slope)
    return float(np.sum(mean**2) + spread)


def chain_problems() -> list[ChainOptimum]:
    """Return the problems of the exact check."""
    bases = OUQuadraticEasy(dim=2), DDPMChain()
    return [ChainOptimum(base=b, n_steps=n) for b in bases for n in CHAIN_STEPS]


@dataclass(frozen=True)
class StickingTheLanding(Claim):
    """Sticking the landing has no variance at the optimum in continuous time."""

    statement: ClassVar[str] = (
        "Pathwise gradients with sticking the landing have the mean of those without, "
        "and at the optimal control no variance in continuous time: on chains their "
        "variance vanishes with the time step, while that of plain pathwise gradients "
        "stays, unless the optimal control does not depend on the state."
    )
    source: ClassVar[str] = (
        "Roeder et al. 2017, arXiv:1703.09194; Xu et al. 2022, arXiv:2102.06559; the "
        "chain's closed form is ours"
    )
    procedure: ClassVar[str] = (
        "Variance of one path (trace of the covariance over |∇J(0)|²) of both "
        f"estimators at the optimum θ*, for N = {LADDER[0]} to {LADDER[-1]} steps, on "
        f"problems whose control family holds the optimal control; "
        f"{N_REPLICATES[True] * 256:,} paths, twice as many on mixtures. Means: the "
        f"difference on the same noise, halfway, in {N_PAIRED:,} replicates of 256 "
        "paths. Closed form: the variance "
        "at the optimum of the N-step chain, for a control that is a multiple of its "
        "optimal feedback."
    )
    decision_rule: ClassVar[str] = (
        f"The order in 1/N is that from N = {RANGE[0]} to {RANGE[1]}. Supported if "
        "sticking the landing has an order above "
        f"{FALLS[True]} on affine chains and above {FALLS[False]} on mixtures (or no "
        f"variance at all), plain pathwise within ±{STAYS} wherever the optimal "
        "control depends on the state, if the means differ by less than "
        f"{MARGIN:.0f} % of the gradient, and if the variance at the chain's optimum "
        f"is within {CLOSED_MARGIN:.0f} % of its closed form; refuted if one of these "
        f"is excluded; undecided otherwise. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        names = AFFINE + MIXTURES
        for done, name in enumerate(names, start=1):
            rows += _variances(registry.problem(name), name in AFFINE, seed)
            rows += _means(registry.problem(name), seed)
            progress(done, len(names) + 1)
        rows += [_closed(problem, seed) for problem in chain_problems()]
        progress(len(names) + 1, len(names) + 1)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        found = []
        for name, mine in _variance_rows(evidence).groupby("problem"):
            first = records(mine)[0]
            for estimator, order in _orders(mine).items():
                quantity = f"{name}, {label(estimator)}: order of the variance in 1/N"
                if estimator == LANDING:
                    least = FALLS[bool(first.affine)]
                    found.append(Check(quantity=quantity, interval=order, least=least))
                elif not first.open_loop:
                    found.append(
                        Check(
                            quantity=quantity, interval=order, least=-STAYS, most=STAYS
                        )
                    )
        for row in records(evidence[evidence["kind"] == "mean"]):
            found.append(
                Check(
                    quantity=f"{row.problem}, {row.point}: difference of the means",
                    interval=interval_of(row),
                    most=MARGIN,
                    unit="%",
                )
            )
        for row in records(evidence[evidence["kind"] == "closed form"]):
            found.append(
                Check(
                    quantity=f"{row.problem}, optimum of {row.n_steps} steps: measured "
                    "by closed-form variance",
                    interval=interval_of(row).scaled(100.0 / row.exact),
                    least=100.0 - CLOSED_MARGIN,
                    most=100.0 + CLOSED_MARGIN,
                    unit="%",
                )
            )
        return found

    def summary(self, evidence: pd.DataFrame) -> str:
        rows = _variance_rows(evidence)
        feedback = rows[~rows["open_loop"].astype(bool)]
        orders = pd.DataFrame(
            [
                {"affine": affine}
                | {name: order.estimate for name, order in _orders(mine).items()}
                for (affine, _), mine in feedback.groupby(["affine", "problem"])
            ]
        )
        parts = [
            f"{_span(mine[LANDING])} on {'affine chains' if affine else 'mixtures'}"
            for affine, mine in orders.groupby("affine", sort=False)
        ]
        last = feedback[feedback["n_steps"] == LADDER[-1]]
        last = last.pivot(index="problem", columns="estimator", values="value")
        shares = 100.0 * last[LANDING] / last[PATHWISE]
        closed = evidence[evidence["kind"] == "closed form"]
        return (
            "At the optimum the variance with sticking the landing falls with the "
            f"order {' and '.join(parts)} in 1/N, that of plain pathwise gradients "
            f"with {_span(orders[PATHWISE])}; with {LADDER[-1]} steps the one is "
            f"{plain(float(shares.min()), 2)} to {plain(float(shares.max()), 2)} % of "
            "the other. Where the optimal control does not depend on the state they "
            "are the same. At the optimum of the chain itself the measured variance is "
            f"{_span(closed['value'] / closed['exact'])} times its closed form."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        means = evidence[evidence["kind"] == "mean"].set_index("problem")
        rows = []
        for name, mine in _variance_rows(evidence).groupby("problem", sort=False):
            first = records(mine)[0]
            row = {
                "problem": str(name),
                "optimal control": "open-loop" if first.open_loop else "feedback",
            }
            for estimator, order in _orders(mine).items():
                last = mine[mine["estimator"].eq(estimator)].set_index("n_steps")
                text = interval(*interval_of(last.loc[LADDER[-1]]))
                row[f"{label(estimator)}, N = {LADDER[-1]}"] = text
                vanishes = np.isinf(order.estimate)
                row[f"order, {label(estimator)}"] = "–" if vanishes else signed(order)
            difference = interval_of(means.loc[str(name)])
            row["difference of the means"] = interval(*difference, "%")
            rows.append(row)
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, problem_looks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        rows = _variance_rows(evidence)
        looks = problem_looks(list(dict.fromkeys(rows["problem"])))
        with style():
            figure = new_figure(PAGE, 3.2)
            panels = figure.subplots(1, 2, sharey=True)
            for axes, estimator in zip(panels, ESTIMATORS, strict=True):
                _draw(axes, rows[rows["estimator"] == estimator], looks)
                axes.set_title(label(estimator), loc="left", pad=3)
            panels[0].set_ylabel("relative variance of one path at θ*")
            _draw_slopes(panels[1])
            add_legend(figure, panels[0], 5)
            for axes in panels:
                finish_axes(axes)
            settle(figure)
        return figure


def _span(numbers: pd.Series) -> str:
    return f"{numbers.min():.2f} to {numbers.max():.2f}"


def label(estimator: str) -> str:
    """Return an estimator's name in tables."""
    return {PATHWISE: "pathwise", LANDING: "sticking the landing"}[estimator]


def _variance_rows(evidence: pd.DataFrame) -> pd.DataFrame:
    return evidence[evidence["kind"] == "variance"]


def _level() -> float:
    """Return the level of each interval."""
    names = len(AFFINE + MIXTURES)
    count = names * (2 * len(LADDER) + 1) + 2 * len(CHAIN_STEPS)
    return 1.0 - (1.0 - LEVEL) / count


def _variances(problem: Problem, affine: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the variances at the optimum along the ladder."""
    open_loop = is_open_loop(problem, problem.theta("optimum"))
    scale = gradient_scale(problem, "optimum") ** -2
    replicates = N_REPLICATES[affine]
    for n_steps in LADDER:
        found = sample(problem, ESTIMATORS, "optimum", n_steps, replicates, seed)
        for estimator, (moments, n_paths) in zip(ESTIMATORS, found, strict=True):
            yield {
                "kind": "variance",
                "problem": problem.name,
                "n_steps": n_steps,
                "estimator": estimator,
                "affine": affine,
                "open_loop": open_loop,
                **columns(variance_interval(moments, _level(), scale * n_paths)),
            }


def _means(problem: Problem, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the difference of the means, on the same noise."""
    point, n_steps = "halfway", problem.default_steps
    plain_values, landing = replicate_values(
        problem, ESTIMATORS, point, n_steps, N_PAIRED, seed
    )
    moments = sample_moments(landing - plain_values)
    scale = gradient_scale(problem, point)
    gap = relative_bias(moments, np.zeros(problem.n_params), _level(), scale)
    keys = {"problem": problem.name, "point": point, "n_steps": n_steps}
    yield {"kind": "mean"} | keys | columns(gap.scaled(100.0))


def _closed(problem: ChainOptimum, seed: int) -> dict[str, Any]:
    """Return the measured variance at the optimum of a chain, and the exact one."""
    n_steps = problem.n_steps
    ((moments, _),) = sample(problem, [LANDING], "optimum", n_steps, N_PAIRED, seed)
    return {
        "kind": "closed form",
        "problem": problem.base.name,
        "n_steps": n_steps,
        "estimator": LANDING,
        "exact": chain_variance(problem),
        **columns(variance_interval(moments, _level())),
    }


def _orders(rows: pd.DataFrame) -> dict[str, Interval]:
    """Return the order of both variances in 1/N; infinite where there is none."""
    found = {}
    for estimator in ESTIMATORS:
        mine = rows[rows["estimator"] == estimator].set_index("n_steps")
        first, last = (interval_of(mine.loc[n_steps]) for n_steps in RANGE)
        none = first.estimate <= ROUNDING
        always = Interval(np.inf, np.inf, np.inf)
        found[estimator] = always if none else power(last, first, RANGE[1] / RANGE[0])
    return found


def _draw(axes: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]) -> None:
    """Draw variances against the number of steps; those of zero are named."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    zero = []
    for name, look in looks.items():
        mine = rows[rows["problem"] == name]
        value = mine["value"]
        if (value <= ROUNDING).all():
            zero.append(name)
            continue
        reach = [value - mine["low"], mine["high"] - value]
        axes.errorbar(
            mine["n_steps"], value, yerr=reach, ms=3.5, lw=1.1, label=name, **look
        )
    text = f"0: {', '.join(zero)}" if zero else ""
    axes.text(0.03, 0.03, text, transform=axes.transAxes)
    axes.set_xticks(LADDER, [str(n) for n in LADDER])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of time steps N")


def _draw_slopes(axes: Axes) -> None:
    """Draw the slopes 1/N and 1/N^2 below the curves."""
    steps, start = np.array([LADDER[0], LADDER[-1]]), axes.get_ylim()[0]
    axes.set_ylim(bottom=1e-4 * start)
    for order, text in ((1, "1/N"), (2, "1/N²")):
        height = 0.5 * start * (steps[0] / steps) ** float(order)
        axes.plot(steps, height, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
        axes.text(0.8 * steps[1], 3.0 * height[1], text, color="0.35", va="bottom")
