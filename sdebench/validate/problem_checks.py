"""Checks of a problem's exact answers against each other, by differentiation.

Each check reads only the problem's functions, its truth and its tables, returns the
comparison that came closest to its limit, and raises `CheckFailedError` where one is
beyond it.  The other checks are in `problem_second_route`, `problem_simulation`,
`problem_tables` and `problem_interface`; `check_problem` runs them all.

Stochastic checks take ``alarm``, their false-alarm rate, and divide it by the number
of their comparisons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdebench.errors import ValidationError
from sdebench.measure.intervals import t_quantile
from sdebench.problem import Problem
from sdebench.simulate.paths import simulate

Array = NDArray[np.float64]
Theta = Any
"""Parameters (P,), or the name of an evaluation point."""
P = TypeVar("P", bound=Problem)

AMPLIFICATION = 1000.0
"""How much larger than V's error that of its derivatives by differences may be."""
# Central difference of order ten.
TENTH = np.array([5 / 6, -5 / 21, 5 / 84, -5 / 504, 1 / 1260])


class Comparison(NamedTuple):
    """A number that must not exceed its limit, and what it is."""

    value: float
    limit: float
    what: str

    def __str__(self) -> str:
        """Return what was compared, with both numbers."""
        sign = "≤" if self.value <= self.limit else ">"
        return f"{self.what} {self.value:.2g} {sign} {self.limit:.2g}"


class CheckFailedError(ValidationError):
    """A comparison beyond its limit."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(str(comparison))
        self.comparison = comparison


def require(error: ArrayLike, tolerance: float, what: str) -> Comparison:
    """Return the largest relative error; raise if it exceeds the tolerance or is NaN.

    Raises
    ------
    CheckFailedError
    """
    comparison = Comparison(float(np.max(error)), tolerance, what)
    if not comparison.value <= tolerance:
        raise CheckFailedError(comparison)
    return comparison


def require_zero(
    estimate: ArrayLike,
    std_error: ArrayLike,
    what: str,
    *,
    alarm: float,
    floor: float = 1e-11,
) -> Comparison:
    """Test that every component has expectation zero, at the false-alarm rate alarm.

    A standard error below ``floor`` counts as ``floor``.
    """
    estimate, std_error = np.atleast_1d(estimate), np.atleast_1d(std_error)
    z = np.abs(estimate) / np.maximum(std_error, floor)
    limit = t_quantile(1.0 - alarm, np.inf, z.size)
    return require(z, limit, f"{what}: |z|")


def closest(comparisons: Iterable[Comparison]) -> Comparison:
    """Return the comparison that came closest to its limit."""
    return max(comparisons, key=lambda c: c.value / c.limit)


def derivative(function: Callable[[float], Any], step: float) -> Any:
    """Return the derivative of ``function`` at 0."""
    terms = (
        c * (function(k * step) - function(-k * step)) for k, c in enumerate(TENTH, 1)
    )
    return sum(terms) / step


def reduced(problem: P, dim: int = 2) -> P:
    """Return the problem in few dimensions, where it has a ``dim`` parameter."""
    fields = {f.name for f in dataclasses.fields(problem)}
    if problem.dim > 3 and "dim" in fields:
        return dataclasses.replace(problem, dim=dim)  # type: ignore[call-arg]
    return problem


def fineness(problem: Problem) -> int:
    """Return how many times more steps than usual a problem asks for, 1 to 8."""
    return min(-(-problem.default_steps // 100), 8)


def thetas(problem: Problem, seed: int = 5) -> dict[str, Array]:
    """Return the named points and one random theta near the line through them."""
    star = problem.theta_star
    rng = np.random.default_rng(seed)
    size = parameter_scale(problem)
    random = star * rng.uniform(0.4, 1.3, len(star))
    random += rng.uniform(0, 0.1, len(star)) * size
    return {**problem.points, "random": random}


def parameter_scale(problem: Problem) -> float:
    """Return a length in theta that no control outgrows: at most 1."""
    return min(float(np.max(np.abs(problem.theta_star))), 1.0) or 1.0


def visited(
    problem: Problem,
    n_times: int = 5,
    n_each: int = 6,
    n_steps: int = 25,
    seed: int = 3,
) -> list[tuple[float, Array]]:
    """Return [(t, x (n, d))] where base paths and optimal paths live, ends excluded."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(np.arange(1, n_steps), n_times, replace=False))
    runs = [
        simulate(problem, point=p, n_steps=n_steps, n_paths=64, keep_states=True)
        for p in (None, "optimum")
    ]
    states = [run.states for run in runs if run.states is not None]
    bad = [1.0 - np.isfinite(s).mean() for s in states]
    require(bad, 0.0, "share of simulated states that are NaN or infinite")
    picks = rng.choice(64, n_each // 2, replace=False)
    return [
        (runs[0].times[n], np.concatenate([s[n][:, picks].T for s in states]))
        for n in steps
    ]


# ---- the Hamilton-Jacobi-Bellman equation ------------------------------------------


def check_hjb(
    problem: Problem, tolerance: float = 1e-8, step: float = 0.01
) -> Comparison:
    """d_t V + b . grad V + 1/2 tr(sigma sigma^T Hess V) - 1/2 |u*|^2 + f = 0.

    First derivatives of V along t, along b and along the columns of sigma, and of u*
    along the columns of sigma, by differences of order ten: sigma may be singular.
    Where sigma depends on x, of sigma(x) grad V in its place, sigma held fixed.
    """
    tolerance += AMPLIFICATION * problem.truth.error_bound("value")
    places, share = visited(problem), min(step / 0.01, 1.0)
    spread = np.max([x.std(axis=0).max() for _, x in places])
    step *= min(float(spread), 1.0) or 1.0
    return closest(
        comparison
        for t, x in places
        for comparison in _hjb_residual(problem, t, x, (step, share), tolerance)
    )


def _hjb_residual(
    problem: Problem, t: float, x: Array, steps: tuple[float, float], tolerance: float
) -> list[Comparison]:
    """``steps`` : in space, and in time as a share of the usual one."""
    truth, (start, end) = problem.truth, problem.time_span
    step_x, share = steps
    step_t = share * min(min(t - start, end - t) / 6, 0.003 * (end - start))
    b, sigma = problem.drift(x, t), problem.diffusion_at(x, t)
    u = truth.control(x, t)
    in_time = derivative(lambda s: truth.value(x, t + s), step_t)

    def slope_along(v: Array) -> Array:
        return derivative(lambda s: truth.value(x + s * v, t), step_x)

    def frozen_control(y: Array, j: int) -> Array:
        u = truth.control(y, t)[:, j]
        if problem.noise_depends_on_state:
            u = u * sigma[:, j, j] / problem.diffusion_at(y, t)[:, j, j]
        return u

    def divergence_along(v: Array, j: int) -> Array:
        return derivative(lambda s: frozen_control(x + s * v, j), step_x)

    speed = np.linalg.norm(b, axis=-1, keepdims=True)
    drift = speed[:, 0] * slope_along(b / np.where(speed > 0, speed, 1.0))
    trace = np.zeros(len(x))
    found = []
    for j, column in enumerate(np.moveaxis(sigma, -1, 0)):
        size = np.linalg.norm(column, axis=-1)
        if np.all(size == 0):
            continue
        direction = column / np.where(size > 0, size, 1.0)[:, None]
        slope = size * slope_along(direction)
        scale = np.max(np.abs(u)) + np.max(np.abs(slope)) + 1e-3
        error = np.abs(u[:, j] + slope) / scale
        found.append(require(error, tolerance, "u* + sigma^T grad V"))
        trace -= size * divergence_along(direction, j)
    control = 0.5 * np.sum(u**2, axis=-1)
    terms = [in_time, drift, 0.5 * trace, -control, problem.running_cost(x, t)]
    # The floor: where V hardly changes, differences of it are rounding errors.
    total = np.sum(np.abs(terms), axis=0) + 1e-3 / (end - start)
    residual = np.abs(np.sum(terms, axis=0)) / total
    return [*found, require(residual, tolerance, "HJB residual")]


def check_terminal_condition(problem: Problem, tolerance: float = 1e-10) -> Comparison:
    """V(x, T) = -r(x)."""
    x = np.concatenate([x for _, x in visited(problem)])
    reward = problem.reward(x)
    gap = np.abs(problem.truth.value(x, problem.time_span[1]) + reward)
    return require(gap / (1.0 + np.abs(reward)), tolerance, "V(x, T) + r(x)")


# ---- gradients ---------------------------------------------------------------------


def check_gradient(
    problem: Problem,
    theta: Theta,
    n_steps: int | None = None,
    tolerance: float = 1e-9,
    step: float = 0.01,
    directions: int | None = None,
) -> Comparison:
    """The gradient of J, or of J_N, against differences of order ten of J.

    ``directions`` random directions, or every component.
    """
    truth, theta = problem.truth, problem.theta(theta)
    gradient = truth.gradient(theta, n_steps)
    axes = np.eye(len(theta))
    if directions:
        axes = np.random.default_rng(8).normal(size=(directions, len(theta)))
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    step *= parameter_scale(problem)
    numeric = [
        derivative(lambda s, e=e: truth.objective(theta + s * e, n_steps), step)  # type: ignore[misc]
        for e in axes
    ]
    scale = 1.0 + abs(truth.objective(theta, n_steps)) + np.linalg.norm(gradient)
    error = np.abs(axes @ gradient - numeric) / scale
    return require(error, tolerance, "gradient against differences")


def check_stationary(problem: Problem, tolerance: float = 1e-10) -> Comparison:
    """All gradients vanish at theta*, and J(theta*) = J(u*).

    Where the family does not hold u*: the gradient alone, and J(theta*) > J(u*).
    """
    truth = problem.truth
    scale = 1.0 + np.linalg.norm(truth.gradient("zero")) + abs(truth.optimal_cost())
    excess = truth.objective("optimum") - truth.optimal_cost()
    errors = [np.max(np.abs(truth.gradient("optimum")))]
    if problem.family_holds_optimum:
        errors += [np.max(np.abs(truth.matching_gradient("optimum"))), abs(excess)]
        cross = truth.answer("cross_entropy_gradient", "optimum")
        if cross is not None:
            errors.append(np.max(np.abs(cross)))
    else:
        errors.append(max(-excess, 0.0))
        tolerance += truth.error_bound("gradient", "optimum")
    return require(np.array(errors) / scale, tolerance, "gradients at theta*")


def check_discrete_order(
    problem: Problem, theta: Theta, quantity: str = "gradient"
) -> Comparison:
    """The N-step answer tends to the continuous one at order one.

    The defect D(h) = c h + O(h^2); D(h)/D(h/2) - 2 is O(h), below 0.1 at N = 256.
    """
    method = getattr(problem.truth, quantity)
    exact = method(theta)
    defects = [float(np.linalg.norm(method(theta, n) - exact)) for n in (256, 512)]
    scale = 1.0 + float(np.linalg.norm(exact))
    if defects[0] < 1e-11 * scale:
        return Comparison(defects[0] / scale, 1e-11, f"{quantity}_N - {quantity}")
    order = np.log2(defects[0] / defects[1])
    what = f"order of {quantity}_N {order:.3f}, expected 1: off by"
    return require(abs(order - 1.0), 0.07, what)


def check_discrete_limit(
    problem: Problem,
    theta: Theta,
    quantity: str = "gradient",
    n_steps: int = 1024,
    tolerance: float = 0.05,
) -> Comparison:
    """The N-step answer tends to the continuous one in whole powers of the step.

    For c_1 h + c_2 h^2, whichever is larger: (8 D(h/4) - 6 D(h/2) + D(h))/3 is O(h^3).
    Relative to D(h) it is 1 for a defect that stays and 0.25 for one of order 1/2.
    """
    method = getattr(problem.truth, quantity)
    exact = method(theta)
    coarse, middle, fine = (method(theta, k * n_steps) - exact for k in (1, 2, 4))
    rest = np.linalg.norm(8.0 * fine - 6.0 * middle + coarse) / 3.0
    size = float(np.linalg.norm(coarse)) + 1e-11 * (1.0 + float(np.linalg.norm(exact)))
    return require(rest / size, tolerance, f"limit of {quantity}_N, relative rest")
