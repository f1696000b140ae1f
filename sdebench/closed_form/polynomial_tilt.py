r"""Ornstein-Uhlenbeck coordinates tilted by a positive polynomial (class P).

    dX = -a X dt + u dt + dW,   e^{r(x)} = p(x) > 0,   u = -k(t) X + b(t)

in every coordinate.  The generator L = -a x d + 1/2 d^2 maps polynomials of a degree to
themselves, so that h(., t) = exp((T - t) L) p is a polynomial: a matrix exponential
times coefficients.  Under the affine control X_t ~ N(m, c), and with
G(m, c) = -E log p(X_T) the objective of a coordinate is

    J = 1/2 int (k^2 (c + m^2) - 2 k b m + b^2) dt + G(m_T, c_T).

Its derivatives in m and c obey

    l' = (a + k) l - k^2 m + k b,   n' = 2 (a + k) n - 1/2 k^2,

and dJ = int (k (c + m^2) - b m - m l - 2 c n) dk + (b - k m + l) db dt.  The lean
adjoint e^{-a (T - t)} g'(X_T) takes the place of l and n in the matching gradient, with
E X_t a_t = e^{-a (T - t)} (m G_m + 2 C G_c), C the covariance of X_t and X_T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray
from scipy.linalg import expm

from sdebench.closed_form.collocation import N_NODES, gauss_rule
from sdebench.closed_form.grid_chain import PolicyAnswers

Array = NDArray[np.float64]
Final = Callable[[float, float], Array]

HALF_WIDTH = 9.0
"""Standard deviations of a normal law in a sum; exp(-9^2 / 2) is 3e-18."""


def normal_rule(spacing: float) -> tuple[Array, Array]:
    """Return the nodes and weights of the trapezoidal rule for a normal law."""
    z = np.arange(-HALF_WIDTH, HALF_WIDTH + spacing / 2, spacing)
    weights = np.exp(-0.5 * z * z)
    return z, weights / weights.sum()


def generator(rate: float, size: int) -> Array:
    """Return the matrix of -rate x d + 1/2 d^2 on coefficients, lowest power first."""
    powers = np.arange(size)
    matrix = np.diag(-rate * powers.astype(float))
    matrix[powers[:-2], powers[2:]] = 0.5 * powers[2:] * (powers[2:] - 1)
    return matrix


def step_matrix(factor: float, variance: float, size: int) -> Array:
    """Return the matrix of p -> E p(factor x + root(variance) z) on coefficients."""
    spread = expm(0.5 * variance * 2.0 * generator(0.0, size))
    return np.asarray(factor ** np.arange(size)[:, None] * spread)


@dataclass(frozen=True)
class PolynomialTilt:
    """One coordinate.

    rate : a;  coefficients : (J,) of p;  horizon : T;  start : mean and variance of
    X_0;  profiles : rho(t) (..., 2) of k and of b.
    """

    rate: float
    coefficients: Array
    horizon: float
    start: tuple[float, float]
    profiles: Callable[[Array], Array]

    def h(self, t: float) -> Array:
        """Return the coefficients of h(., t)."""
        size = len(self.coefficients)
        moved = expm((self.horizon - t) * generator(self.rate, size))
        return np.asarray(moved @ self.coefficients)

    def chain_h(self, times: Array) -> Array:
        """Return the coefficients of E p(X_N) given X_0, Euler-Maruyama steps."""
        level = self.coefficients
        for h in np.diff(times)[::-1]:
            level = step_matrix(1.0 - h * self.rate, h, len(level)) @ level
        return level

    def over_start(self, function: Callable[[Array], Array], spacing: float) -> float:
        """Return E of a function of X_0."""
        z, weights = normal_rule(spacing)
        mean, variance = self.start
        return float(weights @ function(mean + np.sqrt(variance) * z))

    def _final(self, mean: float, variance: float, spacing: float) -> Array:
        """Return G(m, c) and its derivatives in m and c."""
        z, weights = normal_rule(spacing)
        root = np.sqrt(variance)
        x = mean + root * z
        p = polynomial.polyval(x, self.coefficients)
        first = polynomial.polyval(x, polynomial.polyder(self.coefficients)) / p
        second = polynomial.polyval(x, polynomial.polyder(self.coefficients, 2)) / p
        bend = second - first**2
        return -np.array([weights @ np.log(p), weights @ first, 0.5 * weights @ bend])

    def policy(
        self, theta: Array, n_panels: int, spacing: float, final: Final | None = None
    ) -> PolicyAnswers:
        """Return the answers in continuous time; theta (4,) of k, then of b.

        ``final`` takes the place of G and its derivatives, as functions of m and c.
        """
        nodes, weights, matrix = gauss_rule(N_NODES)
        width = self.horizon / n_panels
        t = width * (np.arange(n_panels)[:, None] + nodes)
        rho = self.profiles(t)
        k, b = rho @ theta[:2], rho @ theta[2:]

        def integral(values: Array) -> tuple[Array, float]:
            """Return int_0^t at the nodes, and the whole."""
            whole = width * values @ weights
            before = np.concatenate([[0.0], np.cumsum(whole)])
            inside = before[:-1, None] + width * values @ matrix.T
            return inside, float(before[-1])

        growth, last = integral(self.rate + k)  # exponent of the closed loop
        push, total_push = integral(np.exp(growth) * b)
        noise, total_noise = integral(np.exp(2.0 * growth))
        m0, c0 = self.start
        m = np.exp(-growth) * (m0 + push)
        c = np.exp(-2.0 * growth) * (c0 + noise)
        mean = float(np.exp(-last) * (m0 + total_push))
        variance = float(np.exp(-2.0 * last) * (c0 + total_noise))
        value, along, across = (
            self._final(mean, variance, spacing)
            if final is None
            else final(mean, variance)
        )
        # l and n, each the costs still to come and the end
        gained, whole = integral(np.exp(-growth) * (k**2 * m - k * b))
        carried = np.exp(growth - last)
        full = carried * along + np.exp(growth) * (whole - gained)
        gained, whole = integral(np.exp(-2.0 * growth) * 0.5 * k**2)
        full_spread = carried**2 * across + np.exp(2.0 * growth) * (whole - gained)
        left = np.exp(-self.rate * (self.horizon - t))
        lean_product = left * (m * along + 2.0 * carried * c * across)
        at = width * weights

        def total(first: Array, second: Array) -> Array:
            parts = [np.einsum("ns,s,nsp->p", v, at, rho) for v in (first, second)]
            return np.concatenate(parts)

        own, shift = k * (c + m**2) - b * m, b - k * m
        energy = 0.5 * (k**2 * (c + m**2) - 2.0 * k * b * m + b**2)
        alone, alone_spread = carried * along, carried**2 * across
        return PolicyAnswers(
            objective=float(value + np.sum(energy @ at)),
            reward_only_objective=float(value),
            gradient=total(own - m * full - 2.0 * c * full_spread, shift + full),
            reward_only_gradient=total(-m * alone - 2.0 * c * alone_spread, alone),
            matching_gradient=total(own - lean_product, shift + left * along),
        )

    def chain(
        self, theta: Array, times: Array, spacing: float, final: Final | None = None
    ) -> PolicyAnswers:
        """Return the answers of the Euler-Maruyama chain; ``final`` as in `policy`."""
        h, rho = np.diff(times), self.profiles(times[:-1])
        k, b = rho @ theta[:2], rho @ theta[2:]
        factor, base = 1.0 - h * (self.rate + k), 1.0 - h * self.rate
        count = len(h)
        m, c = np.empty(count + 1), np.empty(count + 1)
        m[0], c[0] = self.start
        for n in range(count):
            m[n + 1] = factor[n] * m[n] + h[n] * b[n]
            c[n + 1] = factor[n] ** 2 * c[n] + h[n]
        mean, variance = float(m[-1]), float(c[-1])
        value, along, across = (
            self._final(mean, variance, spacing)
            if final is None
            else final(mean, variance)
        )
        m, c = m[:-1], c[:-1]
        full, spread, alone, alone_spread, lean, cross = np.empty((6, count))
        ahead = np.array([along, across, along, across, along, across])
        for n in reversed(range(count)):
            full[n], spread[n], alone[n], alone_spread[n], lean[n], cross[n] = ahead
            f, g = factor[n], base[n]
            # E X_n a_n = m_n lean + 2 c_n cross: one closed-loop factor less
            ahead = ahead * np.array([f, f * f, f, f * f, g, f * g])
            ahead[0] += h[n] * (k[n] ** 2 * m[n] - k[n] * b[n])
            ahead[1] += 0.5 * h[n] * k[n] ** 2
        own, shift = k * (c + m**2) - b * m, b - k * m
        energy = 0.5 * (k**2 * (c + m**2) - 2.0 * k * b * m + b**2)
        weighted = h[:, None] * rho

        def total(line: Array, slope: Array, costs: float) -> Array:
            """Return the gradient, from what dJ/dm and dJ/dc are one step later."""
            product = m * line + 2.0 * factor * c * slope
            parts = costs * own - product, costs * shift + line
            return np.concatenate([part @ weighted for part in parts])

        return PolicyAnswers(
            objective=float(value + h @ energy),
            reward_only_objective=float(value),
            gradient=total(full, spread, 1.0),
            reward_only_gradient=total(alone, alone_spread, 0.0),
            matching_gradient=total(lean, cross, 1.0),
        )
