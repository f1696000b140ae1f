"""A second route to V, log Z, the laws and J: ODE solvers and quadrature.

Linear-quadratic problems: Riccati, moment and adjoint equations by an ODE solver, with
coefficients read off the problem's functions.  Tilting problems in one or two
dimensions: trapezoidal rules.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.polynomial.legendre import leggauss
from scipy.integrate import solve_ivp

from sdebench.closed_form import log_quadratics as lq
from sdebench.linear_problem import LinearProblem
from sdebench.problem import Problem
from sdebench.tilting_problem import TiltingProblem
from sdebench.validate.problem_checks import (
    Array,
    Comparison,
    Theta,
    closest,
    derivative,
    require,
    visited,
)

# What DOP853 keeps is about 1e-10.
SOLVER: dict[str, Any] = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}


def grid_dim(problem: Problem) -> int:
    """Return d of a tilting problem that quadrature on a grid can do, else 0."""
    small = isinstance(problem, TiltingProblem) and problem.dim <= 2
    small = small and problem.has_derivatives  # the law of X_T has a density
    return problem.dim if small else 0


class Grid:
    """Trapezoidal rules (spectrally accurate) for a tilting problem with d <= 2.

    It uses the density of X_T and the Gaussian kernel of X_s given X_t of the base,
    problem.reward, and the start law of the tables; no algebra of tilts.
    """

    def __init__(self, problem: TiltingProblem, theta: Theta = None) -> None:
        self.problem = problem
        self.base: Any = problem.family.base
        self.start, self.end = problem.time_span
        self.theta = problem.theta_star if theta is None else problem.theta(theta)
        tables = problem.tables(self.theta, problem.time_grid(1))
        self.weights = np.diff(tables.start_cumulative, prepend=0.0)
        self.means, self.scales = tables.start_mean, tables.start_scale
        self.is_point = not np.any(self.scales)
        # X_0 given X_T has a density, although X_0 is a point
        self.has_kernel = bool(self.base.backward(self.start, self.end)[2] > 0.0)
        laws = [lq.gaussian_parameters(self.base.terminal)[1:]]
        laws.append(problem.family.ideal_law(self.theta)[1:])
        laws.append((self.means, self.scales**2))
        self.low = min(np.min(m - 9.5 * np.sqrt(v)) for m, v in laws)
        self.high = max(np.max(m + 9.5 * np.sqrt(v)) for m, v in laws)
        self.width = min(np.sqrt(v[v > 0].min()) for _, v in laws if np.any(v > 0))

    def axis(
        self, width: float, low: float | None = None, high: float | None = None
    ) -> Array:
        """Return equidistant nodes that resolve a Gaussian of this width."""
        low, high = (
            self.low if low is None else low,
            self.high if high is None else high,
        )
        return np.linspace(low, high, int(np.ceil((high - low) / (0.62 * width))))

    def points(self, axis: Array) -> Array:
        """Return the grid (..., d) with this axis in every dimension."""
        mesh = np.meshgrid(*[axis] * self.problem.dim, indexing="ij")
        return np.stack(mesh, axis=-1)

    def kernels(self, x: Array, s: float, t: float, axis: Array) -> Array:
        """Return, per coordinate, the density at x (n, d) of X_s given X_t = axis."""
        scale, offset, variance = self.base.backward(s, t)
        centre = scale * axis[:, None] + offset
        z = (x[:, None, :] - centre) / np.sqrt(variance)
        values = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi * variance)
        return np.moveaxis(values, -1, 0)

    def apply(self, kernels: Array, values: Array) -> Array:
        """Integrate values (n, ...) on the grid against the rows of the kernels."""
        if self.problem.dim == 1:
            return kernels[0] @ values
        return np.einsum("na,ab,nb->n", kernels[0], values, kernels[1], optimize=True)

    def spread(self, kernels: Any, values: Array) -> Array:
        """Return the integral at every grid point: kernels on the grid itself."""
        if self.problem.dim == 1:
            return kernels[0] @ values
        return kernels[0] @ values @ kernels[1].T

    def _terminal(self, t: float) -> tuple[Array, Array, Array]:
        scale, _, variance = self.base.backward(t, self.end)
        narrow = 1.0 / np.sqrt(1.0 / self.width**2 + scale**2 / variance)
        axis = self.axis(narrow)
        y = self.points(axis)
        log_p = lq.log_value(self.base.terminal, y)
        log_r = self.problem.reward(y)
        if self.theta is not self.problem.theta_star:
            family = self.problem.family
            log_r = lq.log_value(family.reward_rows(self.theta), y)
        return axis, np.exp(log_p + log_r), np.exp(log_p)

    def h(self, x: Array, t: float) -> Array:
        """Return h_theta(x, t) (n,) for x (n, d)."""
        if self.is_point and t == self.start and not self.has_kernel:
            return self._h_at_point()
        axis, tilted, plain = self._terminal(t)
        kernels = self.kernels(x, t, self.end, axis)
        return self.apply(kernels, tilted) / self.apply(kernels, plain)

    def _h_at_point(self) -> Array:
        """Return h at the start point, where X_0 given X_T has no density."""
        if not self.base.gaussian:  # the law of X_T given the point is a mixture
            axis = self.axis(self.width)
            y = self.points(axis)
            logs = lq.log_value(self.base.terminal, y) + self.problem.reward(y)
            cell = (axis[1] - axis[0]) ** self.problem.dim
            return np.array([cell * np.exp(logs).sum()])
        scale, offset, variance = self.base.forward(self.start, self.end)
        axis = self.axis(1.0 / np.sqrt(1.0 / self.width**2 + 1.0 / variance))
        z = (axis[:, None] - scale * self.means[0] - offset) / np.sqrt(variance)
        density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi * variance)
        rewards = self.problem.reward(self.points(axis))
        cell = (axis[1] - axis[0]) ** self.problem.dim
        return cell * self.apply(density.T[:, None], np.exp(rewards))

    def h_grid(self, axis: Array, t: float) -> Array:
        """Return h at every point of a grid."""
        if t == self.end:
            return np.exp(self.problem.reward(self.points(axis)))
        inner, tilted, plain = self._terminal(t)
        kernels = self.kernels(
            np.repeat(axis[:, None], self.problem.dim, 1), t, self.end, inner
        )
        return self.spread(kernels, tilted) / self.spread(kernels, plain)

    def start_density(self, axis: Array) -> Array:
        """Return the density of X_0 at every point of a grid."""
        x = self.points(axis)[..., None, :]
        z = (x - self.means) / self.scales
        log_p = -0.5 * z**2 - np.log(np.sqrt(2.0 * np.pi) * self.scales)
        return np.exp(log_p.sum(-1)) @ self.weights

    def over_start(self, function: Callable[[Array], Array]) -> float:
        """Return E of function of h(X_0, t_0)."""
        if self.is_point:
            return float(function(self.h(self.means, self.start))[0])
        axis = self.axis(self.width)
        cell = (axis[1] - axis[0]) ** self.problem.dim
        values = function(self.h_grid(axis, self.start))
        return float(cell * np.sum(self.start_density(axis) * values))

    def law(
        self,
        t: float,
        log_h: Callable[[Array, float], Array] | None = None,
        refine: float = 1.0,
    ) -> tuple[Array, Array]:
        """Return an axis and the density of X_t under the control of theta.

        p_t(y) h(y, t) int k(x | y) p_start(x) / (p_{t_0}(x) h(x, t_0)) dx, the base
        being a Markov process with X_{t_0} | X_t = y distributed as k.
        ``log_h(x, t)`` replaces quadrature by a function (used for other theta);
        ``refine`` divides the spacing, for integrands rougher than the density.
        """
        dim = self.problem.dim

        def h(axis: Array, s: float) -> Array:
            if log_h is None:
                return self.h_grid(axis, s)
            return np.exp(log_h(self.points(axis), s))

        if self.is_point:
            mean, law = self.means, self.problem.truth.policy_marginal(t, self.theta)
            spread = np.sqrt(law.covariances)
            low = np.min(law.means - 9.5 * spread)
            axis = self.axis(
                spread.min() / refine, low, np.max(law.means + 9.5 * spread)
            )
            if self.base.gaussian:
                scale, offset, variance = self.base.forward(self.start, t)
                gap = self.points(axis) - (scale * mean[0] + offset)
                density = np.exp(-0.5 * np.sum(gap**2, -1) / variance)
                density /= (2.0 * np.pi * variance) ** (dim / 2)
            else:
                density = np.exp(lq.log_value(self.base.marginal(t), self.points(axis)))
                if self.has_kernel:
                    density = density * self._start_ratio(axis, t)
            at_start = (
                self.h(mean, self.start)
                if log_h is None
                else np.exp(log_h(mean, self.start))
            )
            return axis, density * h(axis, t) / at_start[0]
        scale, _, variance = self.base.backward(self.start, t)
        sources = [self.width, np.sqrt(variance)]
        x_axis = self.axis(1.0 / np.sqrt(1 / sources[0] ** 2 + 1 / sources[1] ** 2))
        y_axis = self.axis(self.width / refine)
        prior = np.exp(
            lq.log_value(self.base.marginal(self.start), self.points(x_axis))
        )
        ratio = self.start_density(x_axis) / prior / h(x_axis, self.start)
        tensor = np.repeat(x_axis[:, None], dim, 1)
        kernels = [k.T for k in self.kernels(tensor, self.start, t, y_axis)]
        cell = (x_axis[1] - x_axis[0]) ** dim
        inner = cell * self.spread(kernels, ratio)
        outer = np.exp(lq.log_value(self.base.marginal(t), self.points(y_axis)))
        return y_axis, outer * h(y_axis, t) * inner

    def _start_ratio(self, axis: Array, t: float) -> Array:
        """Return the density of X_0 given X_t, over that of X_0, at the start point."""
        kernels = self.kernels(self.means, self.start, t, axis)
        ratio = kernels[0][0]
        if self.problem.dim == 2:
            ratio = np.multiply.outer(ratio, kernels[1][0])
        return np.asarray(
            ratio / np.exp(lq.log_value(self.base.marginal(self.start), self.means)[0])
        )

    def moments(self, t: float) -> tuple[float, Array, Array]:
        """Return mass, mean (d,) and covariance (d, d) of X_t under the control."""
        axis, density = self.law(t)
        y, weights = self.points(axis).reshape(-1, self.problem.dim), density.ravel()
        weights = weights * (axis[1] - axis[0]) ** self.problem.dim
        mean = weights @ y
        return weights.sum(), mean, (weights * (y - mean).T) @ (y - mean)


def check_tilting_quadrature(
    problem: TiltingProblem, tolerance: float = 1e-12, moments: float = 1e-11
) -> Comparison:
    """h, log Z, J(u*) and the laws of X_t against quadrature (d <= 2)."""
    grid, truth = Grid(problem), problem.truth
    found = []
    for t, x in visited(problem, n_times=3):
        ratio = grid.h(x, t) / truth.h(x, t)
        found.append(require(np.abs(ratio - 1.0), tolerance, "h by quadrature"))
    gap = grid.over_start(lambda h: h) / np.exp(truth.log_normalizer()) - 1.0
    found.append(require(abs(gap), tolerance, "log Z by quadrature"))
    gap = grid.over_start(lambda h: -np.log(h)) - truth.optimal_cost()
    found.append(require(abs(gap), tolerance, "J(u*) by quadrature"))
    start, end = problem.time_span
    for share in (0.35, 1.0):
        t = start + share * (end - start)
        mass, mean, covariance = grid.moments(t)
        law = truth.tilted_marginal(t)
        scale = np.trace(law.covariance()) + law.mean() @ law.mean()
        error = [
            abs(mass - 1.0),
            np.max(np.abs(mean - law.mean())) / np.sqrt(scale),
            np.max(np.abs(covariance - law.covariance())) / scale,
        ]
        found.append(require(error, moments, f"law of X_t by quadrature, t = {t:.3g}"))
    return closest(found)


def control_gap(
    problem: TiltingProblem,
    theta: Array,
    nodes: int = 20,
    panels: int = 2,
    refine: float = 8.0,
) -> float:
    """E_theta int |u_theta - u*|^2 dt: Gauss-Legendre in time, a grid in space."""
    truth, family = problem.truth, problem.family
    start, end = problem.time_span
    points, weights = leggauss(nodes)
    edges = np.linspace(start, end, panels + 1)
    total = 0.0
    for left, right in pairwise(edges):
        half = 0.5 * (right - left)
        for point, weight in zip(points, weights, strict=True):
            t = left + half * (point + 1.0)
            grid = Grid(problem, theta)
            axis, density = grid.law(
                t, lambda x, s: family.log_h(x, s, theta), refine=refine
            )
            y = grid.points(axis)
            gap = truth.policy(y, t, theta) - truth.control(y, t)
            cell = (axis[1] - axis[0]) ** problem.dim
            total += half * weight * cell * np.sum(density * np.sum(gap**2, axis=-1))
    return total


# ---- linear-quadratic problems -----------------------------------------------------


def linear_coefficients(
    problem: Problem,
) -> tuple[Array, Array, Array, Array, Array, float]:
    """Return A, a, F, Q, q, c of a linear-quadratic problem from its functions."""
    d, t = problem.dim, problem.time_span[0]
    eye, origin = np.eye(d), np.zeros((1, d))
    offset = problem.drift(origin, t)[0]
    matrix = (problem.drift(eye, t) - offset).T

    def hessian(function: Callable[[Array], Array]) -> Array:
        pairs = eye[:, None] + eye[None]
        single = function(eye)
        value = function(pairs) - single[:, None] - single[None]
        return value + function(origin)[0]

    running = hessian(lambda x: problem.running_cost(x, t))
    quadratic = -hessian(problem.reward)
    linear = 0.5 * (problem.reward(eye) - problem.reward(-eye))
    return matrix, offset, running, quadratic, linear, problem.reward(origin)[0]


def check_linear_by_ode(problem: LinearProblem, tolerance: float = 1e-9) -> Comparison:
    """V, u*, log Z, J(u*) and the moments of class L by an ODE solver."""
    A, a, F, Q, q, c = linear_coefficients(problem)
    d, truth, (start, end) = problem.dim, problem.truth, problem.time_span
    noise = problem.diffusion(start)
    S = noise @ noise.T
    tables = problem.tables(None, problem.time_grid(1))
    m0, root = tables.start_mean, tables.start_factor

    def split(y: Array) -> tuple[Array, Array, Array]:
        return y[: d * d].reshape(d, d), y[d * d : d * d + d], y[d * d + d :]

    def riccati(t: float, y: Array) -> Array:
        P, p, _ = split(y)
        dP = -(A.T @ P + P @ A - P @ S @ P + F)
        dp = -((A - S @ P).T @ p + P @ a)
        drho = -(a @ p + 0.5 * np.sum(S * P) - 0.5 * p @ S @ p)
        return np.concatenate([dP.ravel(), dp, [drho]])

    final = np.concatenate([Q.ravel(), -q, [-c]])
    value = solve_ivp(riccati, (end, start), final, dense_output=True, **SOLVER).sol
    x = np.random.default_rng(1).normal(size=(4, d))
    found = []

    def compare(got: Any, expected: Any, what: str) -> None:
        error = np.abs(got - expected) / (1 + np.abs(expected))
        found.append(require(error, tolerance, what))

    for t in (start, 0.4 * end, 0.8 * end):
        P, p, rho = split(value(t))
        expected = 0.5 * np.einsum("ni,ij,nj->n", x, P, x) + x @ p + rho[0]
        compare(truth.value(x, t), expected, "V by the Riccati equation")
        expected = -(x @ P + p) @ noise
        compare(truth.control(x, t), expected, "u* by the Riccati equation")
    # log Z: the Gaussian integral over the start, in the eigenbasis of its factor.
    P, p, rho = split(value(start))
    inner = np.eye(d) + root.T @ P @ root
    slope = root.T @ (P @ m0 + p)
    log_z = -(0.5 * m0 @ P @ m0 + p @ m0 + rho[0])
    log_z += 0.5 * slope @ np.linalg.solve(inner, slope)
    log_z -= 0.5 * np.linalg.slogdet(inner)[1]
    compare(truth.log_normalizer(), log_z, "log Z by the Riccati equation")
    cost = 0.5 * m0 @ P @ m0 + p @ m0 + rho[0] + 0.5 * np.sum(P * (root @ root.T))
    if problem.has_start_parameters:
        cost = -log_z
    compare(truth.optimal_cost(), cost, "J(u*) by the Riccati equation")

    def moments(t: float, y: Array, control: Callable[..., Any]) -> Array:
        C, m, _ = split(y)
        K, k = control(t)
        closed, drift = A + noise @ K, a + noise @ k
        dC = closed @ C + C @ closed.T + S
        return np.concatenate([dC.ravel(), closed @ m + drift, [0.0]])

    def optimal(t: float) -> tuple[Array, Array]:
        P, p, _ = split(value(t))
        return -noise.T @ P, -noise.T @ p

    def nothing(t: float) -> tuple[Array, Array]:
        return np.zeros((d, d)), np.zeros(d)

    tilted = m0, root @ root.T
    if problem.has_start_parameters:  # p_0 exp(-V) / Z
        precision = np.linalg.inv(tilted[1])
        covariance = np.linalg.inv(precision + P)
        tilted = covariance @ (precision @ m0 - p), covariance
    for control, law, (mean, covariance) in (
        (optimal, truth.tilted_marginal, tilted),
        (nothing, truth.base_marginal, (m0, root @ root.T)),
    ):
        first = np.concatenate([covariance.ravel(), mean, [0.0]])
        flow = solve_ivp(
            moments, (start, end), first, args=(control,), dense_output=True, **SOLVER
        ).sol
        for t in (0.5 * end, end):
            C, m, _ = split(flow(t))
            scale = 1 + np.max(np.abs(C)) + np.max(np.abs(m))
            gap = max(
                np.max(np.abs(law(t).mean() - m)),
                np.max(np.abs(law(t).covariance() - C)),
            )
            found.append(require(gap / scale, tolerance, "moments of X_t by an ODE"))
    return closest(found)


def _start_law(problem: LinearProblem, theta: Array) -> tuple[Array, Array]:
    """Return mean (d,) of X_0 and a factor (d, d) of its covariance."""
    tables = problem.tables(theta, problem.time_grid(1))
    return tables.start_mean, tables.start_factor


def start_entropy(problem: LinearProblem, theta: Array) -> float:
    """Return the relative entropy of X_0 to the base's start law, by determinants."""
    (mean, root), (m0, root0) = (_start_law(problem, t) for t in (theta, 0.0 * theta))
    precision = np.linalg.inv(root0 @ root0.T)
    ratio = precision @ root @ root.T
    gap = mean - m0
    value = np.trace(ratio) + gap @ precision @ gap - len(gap)
    return float(0.5 * (value - np.linalg.slogdet(ratio)[1]))


def start_slopes(problem: LinearProblem, theta: Array, S: Array, s: Array) -> Array:
    """Return E (dX_0/dtheta)^T (S X_0 + s) plus the entropy's slopes, (P,).

    By differences of order ten in theta.
    """
    mean, root = _start_law(problem, theta)

    def value(parameters: Array) -> float:
        moved, factor = _start_law(problem, parameters)
        pull = (moved - mean) @ (S @ mean + s) + np.sum((factor - root) * (S @ root))
        return float(pull) + start_entropy(problem, parameters)

    return np.array(
        [
            derivative(lambda h, e=e: value(theta + h * e), 0.01)  # type: ignore[misc]
            for e in np.eye(len(theta))
        ]
    )


def check_matching_by_ode(
    problem: LinearProblem, theta: Theta, tolerance: float = 1e-8
) -> Comparison:
    """J and the matching gradient of class L from moment and adjoint equations.

    E[a_t | X_t = x] = S x + s with -S' = A^T S + S (A + sigma K) + F, lean adjoint.
    """
    A, a, F, Q, q, c = linear_coefficients(problem)
    theta = problem.theta(theta)
    d, (start, end) = problem.dim, problem.time_span
    noise = problem.diffusion(start)
    tables = problem.tables(theta, problem.time_grid(1))
    root = tables.start_factor

    def split(y: Array) -> tuple[Array, Array, Array]:
        return y[: d * d].reshape(d, d), y[d * d : d * d + d], y[d * d + d :]

    def law(t: float) -> tuple[Array, Array, Array, Array]:
        gains, biases = problem.feedback(np.array([t]))
        K = np.einsum("p,pij->ij", theta, gains[:, 0])
        return K, theta @ biases[:, 0], gains[:, 0], biases[:, 0]

    def adjoint(t: float, y: Array) -> Array:
        S, s, _ = split(y)
        K, k, _, _ = law(t)
        dS = -(A.T @ S + S @ (A + noise @ K) + F)
        ds = -(A.T @ s + S @ (a + noise @ k))
        return np.concatenate([dS.ravel(), ds])

    final = np.concatenate([Q.ravel(), -q])
    back = solve_ivp(adjoint, (end, start), final, dense_output=True, **SOLVER).sol

    def forward(t: float, y: Array) -> Array:
        C, m, _ = split(y)
        K, k, dK, dk = law(t)
        S, s, _ = split(back(t))
        closed = A + noise @ K
        second = C + np.outer(m, m)
        R, e = K + noise.T @ S, k + noise.T @ s
        slope = np.einsum("pij,ij->p", dK, R @ second + np.outer(e, m))
        slope += dk @ (R @ m + e)
        cost = np.sum((K @ second + 2 * np.outer(k, m)) * K) + k @ k
        rate = 0.5 * (cost + np.sum(F * second))
        dC = closed @ C + C @ closed.T + noise @ noise.T
        return np.concatenate([dC.ravel(), closed @ m + a + noise @ k, [rate], slope])

    first = np.concatenate(
        [(root @ root.T).ravel(), tables.start_mean, np.zeros(1 + len(theta))]
    )
    C, m, sums = split(solve_ivp(forward, (start, end), first, **SOLVER).y[:, -1])
    objective = sums[0] + 0.5 * np.sum(Q * (C + np.outer(m, m))) - q @ m - c
    if problem.has_start_parameters:
        S, s, _ = split(back(start))
        objective += start_entropy(problem, theta)
        sums[1:] += start_slopes(problem, theta, S, s)
    truth = problem.truth
    scale = 1.0 + abs(objective) + np.linalg.norm(sums[1:])
    errors = [abs(truth.objective(theta) - objective)]
    errors += list(np.abs(truth.matching_gradient(theta) - sums[1:]))
    return require(np.array(errors) / scale, tolerance, "J, matching gradient by ODE")
