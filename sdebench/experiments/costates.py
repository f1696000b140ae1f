"""Costates: exact ones, labels for their regression, and how far labels are off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, sqrt
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sdebench.closed_form.affine_chain import PolicyChain
from sdebench.experiments.measuring import Array
from sdebench.measure.intervals import Interval, t_quantile
from sdebench.problem import Problem
from sdebench.simulate.noise import split_seed

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

Labels = Mapping[int, tuple["Tensor", "Tensor"]]
"""States and labels (n, d) of the costate, by step."""


class Costate(Protocol):
    """A costate phi(x) with its derivatives, as estimators fit them."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return phi(x) (n, d)."""

    def along(self, x: Tensor, v: Tensor) -> Tensor:
        """Return phi'(x) v."""

    def trace(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return tr(matrix phi''(x))."""


@dataclass(frozen=True)
class AffineCostate:
    """phi(x) = S x + s."""

    slope: Array
    offset: Array

    def __call__(self, x: Tensor) -> Tensor:
        return self.along(x, x) + x.new_tensor(self.offset)

    def along(self, x: Tensor, v: Tensor) -> Tensor:
        return v @ x.new_tensor(self.slope.T)

    def trace(self, x: Tensor, matrix: Tensor) -> Tensor:
        return x.new_zeros(x.shape)


@dataclass(frozen=True)
class CubicCostate:
    """phi(x) = E[growth c X_T^3 | x], with X_T ~ N(growth x, variance) given x."""

    growth: float
    variance: float
    curvature: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        mean = self.growth * x
        return self.curvature * self.growth * (mean**3 + 3.0 * self.variance * mean)

    def along(self, x: Tensor, v: Tensor) -> Tensor:
        slope = 3.0 * ((self.growth * x) ** 2 + self.variance)
        return self.curvature * self.growth**2 * slope * v

    def trace(self, x: Tensor, matrix: Tensor) -> Tensor:
        return 6.0 * self.curvature * self.growth**4 * x * matrix[0, 0]


def chain_costates(policy: PolicyChain) -> list[Costate]:
    """Return E[lean adjoint | X_n = x] for n = 0 to N, exact on the chain.

    With a quartic reward only without control, and without an offset of the drift.
    """
    chain = policy.chain
    quartic = np.asarray(chain.reward_quartic)
    if not np.any(quartic):
        S, s = chain.adjoint(policy.gain, policy.bias, lean=True)
        return [AffineCostate(*pair) for pair in zip(S, s, strict=True)]
    assert not np.any(policy.theta)
    assert not np.any(chain.offset)
    growth, variance = 1.0, 0.0
    found: list[Costate] = [CubicCostate(growth, variance, float(quartic[0]))]
    for n in reversed(range(chain.n_steps)):
        variance += (growth * float(chain.noise[n, 0, 0])) ** 2
        growth *= float(chain.transition[n, 0, 0])
        found.append(CubicCostate(growth, variance, float(quartic[0])))
    return found[::-1]


def make_view(
    problem: Problem, point: str, n_steps: int, n_paths: int, seed: int, replicate: int
) -> View:
    """Return a view of one replicate, simulated with torch."""
    from sdebench.view import View

    times, theta = problem.time_grid(n_steps), problem.theta(point)
    return View(
        problem.tables(theta, times),
        times,
        theta,
        key=split_seed(seed),
        replicate=replicate,
        first_path=0,
        n_paths=n_paths,
    )


def lean_labels(view: View) -> Labels:
    """Return the states and lean adjoints of the forward paths."""
    states = view.rollout().states
    adjoint = -view.reward_gradient(states[-1])
    found = {view.n_steps: (states[-1], adjoint)}
    for n in reversed(range(view.n_steps)):
        x = states[n]
        adjoint = view.base_vjp(n, x, adjoint) + view.running_cost_gradient(n, x)
        found[n] = x, adjoint
    return found


def squared_error(labels: Labels, costates: list[Costate]) -> float:
    """Return the mean of |label - costate|^2 over steps and paths."""
    errors = [
        float((y - costates[n](x)).square().sum(1).mean())
        for n, (x, y) in labels.items()
    ]
    return float(np.mean(errors))


def squared_size(labels: Labels, costates: list[Costate]) -> float:
    """Return the mean of |costate|^2 over steps and paths."""
    return float(
        np.mean([costates[n](x).square().sum(1).mean() for n, (x, _) in labels.items()])
    )


def replicated(
    draw: Callable[[int], Mapping[str, float]], n_replicates: int
) -> dict[str, Array]:
    """Return the numbers that ``draw`` makes of each replicate, by name."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: more threads only wait
    try:
        rows = [draw(replicate) for replicate in range(n_replicates)]
    finally:
        torch.set_num_threads(threads)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def positive_mean(values: Array, level: float) -> Interval:
    """Return the mean of independent positive values with its interval.

    A Student interval of the logarithm of the mean, by the delta method.
    """
    mean = float(values.mean())
    reach = t_quantile(level, len(values) - 1) * float(values.std(ddof=1)) / mean
    factor = exp(reach / sqrt(len(values)))
    return Interval(mean, mean / factor, mean * factor)


def ratio_of_means(top: Array, bottom: Array, level: float) -> Interval:
    """Return the ratio of two means of positive values of the same replicates.

    A Student interval of its logarithm, by the delta method, as in `positive_mean`.
    """
    ratio = float(top.mean() / bottom.mean())
    influence = top / top.mean() - bottom / bottom.mean()
    reach = t_quantile(level, len(top) - 1) * float(influence.std(ddof=1))
    factor = exp(reach / sqrt(len(top)))
    return Interval(ratio, ratio / factor, ratio * factor)


def root(square: Interval) -> Interval:
    """Return the square root of a positive number with its interval."""
    return Interval(*map(sqrt, square))
