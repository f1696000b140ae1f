r"""The Jacobi (Wright-Fisher) diffusion tilted by a positive polynomial (class P).

    dX = a (m - X) dt + sigma root(X (1 - X)) (u dt + dW),   X_0 = x_0 in (0, 1),
    r(x) = log p(x),   u = sigma root(X (1 - X)) q(X),   q = sum_p theta_p q_p

with polynomials q_p.

The generator maps polynomials of a degree to themselves, so that h is a polynomial, a
matrix exponential times coefficients.  Under the control the generator

    L = (a (m - x) + sigma^2 x (1 - x) q) d + 1/2 sigma^2 x (1 - x) d^2

raises the degree.  In the Jacobi polynomials that are orthonormal for the stationary
beta law of the base process, its first part is a diagonal matrix; the cost-to-go C, its
derivatives C_p in theta and the mean b of the lean adjoint satisfy

    C'   + L C   + 1/2 sigma^2 x (1 - x) q^2 = 0,                      C(T) = -r,
    C_p' + L C_p + sigma^2 x (1 - x) q_p (q + dC/dx) = 0,              C_p(T) = 0,
    b'   + L b + (-a + s q) b + s db/dx = 0,  s = 1/2 sigma^2 (1 - 2x),  b(T) = -r',
    matching gradient = E int sigma^2 x (1 - x) q_p (q + b) dt,

with constant coefficients: each is one exponential of a block matrix.  The expansions
converge faster than any power of the number of modes; answers from fewer modes bound
their error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.special import eval_jacobi, gammaln, roots_jacobi

from sdebench.closed_form.grid_chain import PolicyAnswers
from sdebench.errors import NotExactError

Array = NDArray[np.float64]

LEVELS = FINE, COARSE = 44, 36
"""Modes of an answer and of its check."""


class Modes:
    """Orthonormal polynomials of the beta law on [0, 1] and matrices of operators.

    Parameters
    ----------
    left, right : a m and a (1 - m), times 2 / sigma^2: the beta law's parameters.
    count : number of polynomials.

    Attributes
    ----------
    x, weights : quadrature of the law, exact to degree 4 count - 1.
    values, slopes, bends : (n, count) of the polynomials at x, and derivatives.
    """

    def __init__(self, left: float, right: float, count: int) -> None:
        self.left, self.right, self.count = left, right, count
        x, weights = roots_jacobi(2 * count, right - 1.0, left - 1.0)
        self.x, self.weights = 0.5 * (x + 1.0), weights / weights.sum()
        self.values, self.slopes, self.bends = self.at(self.x)

    def at(self, x: Array) -> tuple[Array, Array, Array]:
        """Return the polynomials at x in [0, 1] and two derivatives, (n, count)."""
        k = np.arange(self.count)
        alpha, beta = self.right - 1.0, self.left - 1.0
        total = alpha + beta
        logs = gammaln(k + alpha + 1.0) + gammaln(k + beta + 1.0)
        logs -= gammaln(k + 1.0) + gammaln(k + total + 1.0)
        first = gammaln(alpha + 1.0) + gammaln(beta + 1.0) - gammaln(total + 2.0)
        norm = np.exp(-0.5 * (logs - np.log(2.0 * k + total + 1.0) - first))
        y = 2.0 * np.asarray(x)[:, None] - 1.0

        def derivative(order: int) -> Array:
            lower = np.maximum(k - order, 0)
            found = eval_jacobi(lower, alpha + order, beta + order, y)
            for j in range(order):  # d/dx, of y = 2 x - 1
                found = found * (k + total + 1.0 + j)
            return norm * np.where(k >= order, found, 0.0)

        return derivative(0), derivative(1), derivative(2)

    def project(self, values: Array) -> Array:
        """Return the coefficients of functions given at x, (n, ...)."""
        weights = self.weights.reshape(-1, *[1] * (values.ndim - 1))
        return np.asarray(self.values.T @ (weights * values))

    def matrix(self, function: Array, of: Array) -> Array:
        """Return the matrix of f -> function times the polynomials or derivatives."""
        return self.project(function[:, None] * of)


def integrated(matrix: Array, source: Array, start: Array, time: float) -> Array:
    """Return e^{time M} start + int_0^time e^{s M} source ds."""
    size = len(matrix)
    block = np.zeros((size + 1, size + 1))
    block[:size, :size], block[:size, size] = matrix, source
    return np.asarray((expm(time * block) @ np.append(start, 1.0))[:size])


@dataclass(frozen=True)
class Jacobi:
    """One coordinate.

    rate : a;  level : m;  noise : sigma;  coefficients : (J,) of p;  start : x_0;
    horizon : T;  features : (P, J) of q_p.
    """

    rate: float
    level: float
    noise: float
    coefficients: Array
    start: float
    horizon: float
    features: Array

    levels: ClassVar[tuple[int, int]] = LEVELS

    # ---- h --------------------------------------------------------------------------
    @cached_property
    def _generator(self) -> Array:
        """The base generator on coefficients, lowest power first."""
        size = len(self.coefficients)
        k = np.arange(size, dtype=float)
        down = self.rate * self.level * k + 0.5 * self.noise**2 * k * (k - 1.0)
        stay = -self.rate * k - 0.5 * self.noise**2 * k * (k - 1.0)
        return np.diag(stay) + np.diag(down[1:], 1)

    def h(self, t: float) -> Array:
        """Return the coefficients of h(., t)."""
        moved = expm((self.horizon - t) * self._generator)
        return np.asarray(moved @ self.coefficients)

    def log_h(self, x: Array, t: float) -> tuple[Array, Array]:
        """Return log h and its slope in x; states outside count as the ends."""
        h, y = self.h(t), np.clip(x, 0.0, 1.0)
        level = polynomial.polyval(y, h)
        return np.log(level), polynomial.polyval(y, polynomial.polyder(h)) / level

    def value(self, x: Array, t: float) -> Array:
        """Return -log h."""
        return -self.log_h(x, t)[0]

    def control(self, x: Array, t: float) -> Array:
        """Return u*."""
        factor = np.sqrt(np.maximum(x * (1.0 - x), 0.0))
        return np.asarray(self.noise * factor * self.log_h(x, t)[1])

    # ---- answers for a control ------------------------------------------------------
    @cached_property
    def _modes(self) -> dict[int, Modes]:
        scale = 2.0 * self.rate / self.noise**2
        left, right = scale * self.level, scale * (1.0 - self.level)
        return {count: Modes(left, right, count) for count in LEVELS}

    def policy(self, theta: Array, count: int) -> PolicyAnswers:
        """Return the answers for a control, from ``count`` modes."""
        modes = self._modes[count]
        x, size, square = modes.x, modes.count, self.noise**2
        features = polynomial.polyval(x, self.features.T).T  # (n, P)
        q = features @ theta
        variance = square * x * (1.0 - x)
        pushes = variance[:, None] * features
        k = np.arange(size, dtype=float)
        base = np.diag(-self.rate * k - 0.5 * square * k * (k - 1.0))
        generator = base + modes.matrix(variance * q, modes.slopes)
        tilt = polynomial.polyval(x, self.coefficients)
        slope = polynomial.polyval(x, polynomial.polyder(self.coefficients)) / tilt
        final = modes.project(-np.log(tilt))
        energy = modes.project(0.5 * variance * q**2)
        direct = modes.project(pushes * q[:, None])  # (size, P)
        half = 0.5 * square * (1.0 - 2.0 * x)
        lean = generator + modes.matrix(half * q - self.rate, modes.values)
        lean += modes.matrix(half, modes.slopes)
        start = modes.at(np.array([self.start]))[0][0]
        zero, time = np.zeros(size), self.horizon
        gradient, only_gradient, matching = np.empty((3, len(theta)))
        for p in range(len(theta)):
            push = modes.matrix(pushes[:, p], modes.slopes)
            pair = np.block([[generator, push], [np.zeros_like(push), generator]])
            cost = np.append(zero, final)
            source = np.append(direct[:, p], energy)
            gradient[p] = start @ integrated(pair, source, cost, time)[:size]
            only_gradient[p] = start @ (expm(time * pair) @ cost)[:size]
            weigh = modes.matrix(pushes[:, p], modes.values)
            pair = np.block([[generator, weigh], [np.zeros_like(weigh), lean]])
            cost = np.append(zero, modes.project(-slope))
            source = np.append(direct[:, p], zero)
            matching[p] = start @ integrated(pair, source, cost, time)[:size]
        return PolicyAnswers(
            objective=float(start @ integrated(generator, energy, final, time)),
            reward_only_objective=float(start @ (expm(time * generator) @ final)),
            gradient=gradient,
            reward_only_gradient=only_gradient,
            matching_gradient=matching,
        )

    def cross_entropy_gradient(self, theta: Array, count: int) -> Array:
        """Not known."""
        raise NotExactError("the tilted path law has no closed gradient here")

    def _no_chain(self, *_: Any) -> Any:
        raise NotExactError(
            "the Euler-Maruyama chain of the Jacobi diffusion has no closed law: its "
            "noise ends where the state leaves [0, 1]"
        )

    chain = chain_log_normalizer = chain_optimum = _no_chain
    chain_cross_entropy_gradient = chain_control = chain_error = _no_chain

    def tilted_moments(self, t: float) -> tuple[float, float]:
        """Return mean and variance of X_t under u*: E[X^k h(X, t)] / h."""
        h, found = self.h(t), []
        for power in np.eye(3):
            product = np.asarray(polynomial.polymul(power, h), np.float64)
            moved = replace(self, coefficients=product, horizon=t)
            found.append(polynomial.polyval(self.start, moved.h(0.0)))
        mean = found[1] / found[0]
        return float(mean), float(found[2] / found[0] - mean**2)
