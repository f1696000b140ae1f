r"""Where training on a matching loss stops: fixed points in the tilting family.

The gradient that a method follows in mean is known exactly on an affine N-step chain.
Its zero theta_N is found by a root finder, and taken to continuous time from three
numbers of steps.  Methods whose target's conditional mean is u* under their own law
stop at the tilt, theta* = (1, 1):

- with paths of the optimal control, every score label;
- with the model's own samples, target and novel score matching, adjoint matching and
  the gradient of J.

Conditional score matching on the model's own samples stops everywhere: a model denoises
its own samples; with the weights of their paths it stops at the tilt again.  Reinforce
adjoint matching stops at an implicit Euler step of the tilt, here its projection on the
family.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from scipy.optimize import root

from sdebench import registry
from sdebench.estimator import Estimator
from sdebench.experiments.comparisons import relative_bias
from sdebench.experiments.experiment import Progress, columns, interval_of, records
from sdebench.experiments.measuring import Array, sample
from sdebench.problem import Problem
from sdebench.report.format import interval, plain
from sdebench.studies._study import Study, level_of_each

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = {
    "gradient of J": ("pathwise", "own"),
    "adjoint matching": ("adjoint_matching", "own"),
    "CSM": ("score_matching:labels=conditional", "optimal"),
    "TSM": ("score_matching:labels=target", "optimal"),
    "NSM": ("score_matching", "optimal"),
    "CSM, own samples": ("score_matching:labels=conditional,data=theta", "own"),
    "CSM, weighted samples": (
        "score_matching:labels=conditional,data=weighted",
        "own, weighted",
    ),
    "TSM, own samples": ("score_matching:labels=target,data=theta", "own"),
    "NSM, own samples": ("score_matching:data=theta", "own"),
    "reinforce adjoint matching": ("reinforce_adjoint_matching", "own"),
}
"""The estimator of each method, and the samples that it learns from."""
EVERYWHERE = "CSM, own samples"
LADDER = (100, 200, 400)
START = (0.8, 0.8)
PLACES = ("zero", "halfway", "overshoot")
N_REPLICATES = 256
N_INTERVALS = len(METHODS) - 1 + len(PLACES)
BASE_VARIANCE = 0.5


def build() -> Problem:
    """Return the problem: N(0, 0.5) under VP, reward x - x^2/2, theta* = (1, 1)."""
    return registry.problem("gaussian_tilt", rate=8.0, variance=BASE_VARIANCE)


def mean_gradient(
    problem: Problem, estimator: Estimator, theta: Array | str, n_steps: int
) -> Array:
    """Return what a method follows in mean on the N-step chain, exactly."""
    truth = problem.truth
    if estimator.has_target:
        found = estimator.target(truth.policy_chain(theta, n_steps))
    else:
        found = truth.answer(estimator.estimand, problem.theta(theta), n_steps)
    assert found is not None
    return found


def stop(problem: Problem, estimator: Estimator, n_steps: int) -> Array:
    """Return theta at which the mean gradient vanishes."""
    found = root(
        lambda theta: mean_gradient(problem, estimator, theta, n_steps),
        START,
        options={"xtol": 1e-10},
    )
    return np.asarray(found.x)


def extrapolated(values: Array) -> Array:
    """Return the limit of values at N, 2 N and 4 N, with errors in 1/N and 1/N^2."""
    once = [2.0 * fine - coarse for coarse, fine in pairwise(values)]
    return np.asarray((4.0 * once[1] - once[0]) / 3.0)


@dataclass(frozen=True)
class MatchingFixedPoints(Study):
    """Fixed points of matching losses on a Gaussian tilt."""

    subject: ClassVar[str] = (
        "Where training on each matching loss stops on a Gaussian tilt, by labels and "
        "by the samples that they are taken from: at the tilt, beside it, or anywhere."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229, and arXiv:2605.10759 "
        "for the methods; the fixed points are ours"
    )
    procedure: ClassVar[str] = (
        "Data N(0, 0.5) under VP with rate 8, reward x − x²/2, the control family of "
        "tilts by θ₁ x − θ₂ x²/2, θ* = (1, 1). The mean of each method's gradient is "
        f"exact on chains of {', '.join(map(str, LADDER))} steps; its zero is "
        "extrapolated to continuous time. Simulated: the mean of the estimator at the "
        f"zero of the chain of {LADDER[0]} steps against the exact one, "
        f"{N_REPLICATES * 256:,} paths, relative to the mean at θ = 0. Samples: of the "
        "optimal control, of the model itself, or these with their paths' weights."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        problem = build()
        rows: list[dict[str, Any]] = []
        for done, (method, (name, samples)) in enumerate(METHODS.items(), start=1):
            keys: dict[str, Any] = {"method": method, "samples": samples}
            if method == EVERYWHERE:
                rows += [keys | row for row in _everywhere(problem, name, seed)]
            else:
                rows.append(keys | _stop(problem, name, seed))
            progress(done, len(METHODS))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        stops = evidence[evidence["kind"] == "stop"]
        away = np.hypot(stops["theta_1"] - 1.0, stops["theta_2"] - 1.0)
        there = stops[away < 0.02]["method"]
        other = records(stops[away >= 0.02])
        largest = evidence[evidence["kind"] == "place"]["limit"].max()
        return (
            f"{len(there)} of {len(stops)} methods stop at the tilt, θ = (1, 1); "
            + "; ".join(
                f"{row.method} at ({row.theta_1:.3f}, {row.theta_2:.3f})"
                for row in other
            )
            + f". {EVERYWHERE}: the mean gradient at every θ tried is at most "
            f"{plain(100.0 * largest, 2)} % of that with samples of the tilt, in "
            "continuous time."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = []
        for row in records(evidence):
            texts = {"method": row.method, "samples": row.samples}
            if row.kind == "place":
                texts |= {
                    "stops at θ": f"everywhere; at θ = ({row.at})",
                    "mean": "–",
                    "variance": "–",
                    "gradient there": f"{plain(100.0 * row.limit, 2)} %",
                }
            else:
                texts |= {
                    "stops at θ": f"({row.theta_1:.3f}, {row.theta_2:.3f})",
                    "mean": f"{row.mean:.4f}",
                    "variance": f"{row.variance:.4f}",
                    "gradient there": "0 %",
                }
            found = interval_of(row).scaled(100.0)
            texts[f"simulated less exact, N = {LADDER[0]}"] = interval(*found, "%")
            rows.append(texts)
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import COLUMN, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(COLUMN, 3.2)
            axes = figure.subplots()
            _draw(axes, evidence[evidence["kind"] == "stop"])
            figure.legend(ncols=2, loc="outside upper center")
            finish_axes(axes)
            settle(figure)
        return figure


def _simulated(
    problem: Problem, name: str, theta: Array, expected: Array, scale: float, seed: int
) -> dict[str, float]:
    """Return |mean - expected| / scale of the simulated estimator."""
    point = [float(v) for v in theta]
    ((moments, _),) = sample(problem, [name], point, LADDER[0], N_REPLICATES, seed)
    level = level_of_each(N_INTERVALS)
    return columns(relative_bias(moments, expected, level, scale))


def _stop(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    """Return where a method stops, and the law of X_T there."""
    estimator = registry.estimator(name)
    stops = np.array([stop(problem, estimator, n) for n in LADDER])
    laws = []
    for theta, n_steps in zip(stops, LADDER, strict=True):
        policy = problem.truth.policy_chain(theta, n_steps)
        means, covariances = policy.chain.moments(policy.gain, policy.bias)
        laws.append([means[-1, 0], covariances[-1, 0, 0]])
    first, second = extrapolated(stops)
    mean, variance = extrapolated(np.array(laws))
    at_zero = mean_gradient(problem, estimator, "zero", LADDER[0])
    scale = float(np.linalg.norm(at_zero))
    found = _simulated(problem, name, stops[0], np.zeros(2), scale, seed)
    row: dict[str, Any] = {"kind": "stop", "theta_1": first, "theta_2": second}
    row |= {"mean": mean, "variance": variance}
    for number, n_steps in enumerate(LADDER):
        row |= {f"theta_1_at_{n_steps}": stops[number, 0]}
        row |= {f"theta_2_at_{n_steps}": stops[number, 1]}
    return row | found


def _everywhere(problem: Problem, name: str, seed: int) -> list[dict[str, Any]]:
    """Return the exact and the simulated mean gradient of CSM at several theta."""
    estimator = registry.estimator(name)
    other = registry.estimator(METHODS["CSM"][0])
    scale = float(np.linalg.norm(mean_gradient(problem, other, "zero", LADDER[0])))
    rows = []
    for place in PLACES:
        theta = problem.theta(place)
        values = [mean_gradient(problem, estimator, place, n) for n in LADDER]
        limit = float(np.linalg.norm(extrapolated(np.array(values)))) / scale
        row: dict[str, Any] = {"kind": "place", "limit": limit}
        row["at"] = ", ".join(f"{v:g}" for v in theta)
        found = _simulated(problem, name, theta, values[0], scale, seed)
        rows.append(row | found)
    return rows


def _draw(axes: Axes, stops: pd.DataFrame) -> None:
    """Draw the zeros on the chains, from few steps to many, and their limits."""
    from sdebench.experiments.drawing import problem_looks

    looks = problem_looks(list(stops["method"]))
    for row in records(stops):
        first = [getattr(row, f"theta_1_at_{n}") for n in LADDER] + [row.theta_1]
        second = [getattr(row, f"theta_2_at_{n}") for n in LADDER] + [row.theta_2]
        look = looks[row.method]
        axes.plot(first, second, color=look["color"], lw=0.8, ls=look["ls"])
        axes.plot(first[:-1], second[:-1], look["marker"], ms=3, color=look["color"])
        axes.plot(
            first[-1:],
            second[-1:],
            look["marker"],
            ms=6,
            mfc="none",
            color=look["color"],
            label=row.method,
        )
    axes.plot([1.0], [1.0], "+", ms=12, color="0.2", label="tilt, θ*")
    axes.set_xlabel("θ₁, linear part of the tilt")
    axes.set_ylabel("θ₂, quadratic part")
