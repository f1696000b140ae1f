r"""The square-root (Cox-Ingersoll-Ross) diffusion with an exponential tilt (class P).

    dX = a (m - X) dt + xi root(X) (u dt + dW),   X_0 = x_0,   r(x) = -lambda x,
    u = xi root(X) k(t),   k = theta . f(t).

h = exp(phi - psi x) with psi' = a psi + xi^2/2 psi^2, psi(T) = lambda, so that
u* = -xi root(X) psi: in the family where f holds psi.  The controlled drift stays
affine, and answers need the mean mu of X_t and the slope c of the cost-to-go only,

    mu' = a m - (a - xi^2 k) mu,      c' = (a - xi^2 k) c - xi^2/2 k^2,   c(T) = lambda,
    J = lambda mu_T + xi^2/2 int k^2 mu dt,      dJ = int xi^2 mu (k + c) dk dt.

In the lean adjoint the noise is held fixed, its factor is not: the slope of the step
is -a + xi^2/2 k, and with b' = (a - xi^2/2 k) b, b(T) = lambda, the matching gradient
is int xi^2 mu (k + b) dk dt.

The Euler-Maruyama chain has the noise xi root(h max(X, 0)) and the same answers with
sums for integrals, **as long as no X_n is negative**; its optimum too is in the family,
k*_n = -a_{n+1} with a_n = a_{n+1} (1 - h a) - xi^2/2 h a_{n+1}^2 the chain's psi.  A
negative X_n has probability at most sum_n min_s E exp(-s X_n), the expectation by the
recursion of a_n, and changes J_N by at most sum_n h xi^2 |k_n^2/2 + c_{n+1} k_n| times
E max(-X_n, 0), which is at most the root of this probability times the root mean square
of X_n (and its derivatives by as little: J_N is analytic in theta).  Chains for which
that root is above `LARGEST_ROOT` are refused; `SquareRoot.chain_error` is the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sdebench.closed_form.collocation import N_NODES, gauss_rule
from sdebench.closed_form.grid_chain import PolicyAnswers
from sdebench.errors import NotExactError

Array = NDArray[np.float64]

PANELS = 12, 8
"""In time, of an answer and of its check."""
LARGEST_ROOT = 1e-10
"""Of the root of the probability that a chain becomes negative."""
EXPONENTS = np.geomspace(0.05, 4.0, 24)
"""The s of the Chernoff bound, in units of 1 / (xi^2 h)."""


@dataclass(frozen=True)
class SquareRoot:
    """One coordinate.

    rate : a;  level : m;  noise : xi;  tilt : lambda;  start : x_0;  horizon : T;
    profiles : f(t) (..., P), of theta.
    """

    rate: float
    level: float
    noise: float
    tilt: float
    start: float
    horizon: float
    profiles: Callable[[Array], Array]

    levels: ClassVar[tuple[int, int]] = PANELS

    # ---- h --------------------------------------------------------------------------
    def exponents(self, t: Array | float) -> tuple[Array, Array]:
        """Return phi and psi at times t."""
        left = self.horizon - np.asarray(t)
        square = self.noise**2
        growth = self.tilt * square * -np.expm1(-self.rate * left) / (2.0 * self.rate)
        phi = -2.0 * self.rate * self.level / square * np.log1p(growth)
        return phi, self.tilt * np.exp(-self.rate * left) / (1.0 + growth)

    def value(self, x: Array, t: float) -> Array:
        """Return -log h."""
        phi, psi = self.exponents(np.asarray(t))
        return psi * x - phi

    def control(self, x: Array, t: float) -> Array:
        """Return u*."""
        psi = self.exponents(t)[1]
        return np.asarray(-self.noise * psi * np.sqrt(np.maximum(x, 0.0)))

    # ---- continuous time ------------------------------------------------------------
    def _panels(self, end: float, n_panels: int) -> tuple[Array, Array, float]:
        nodes, weights, _ = gauss_rule(N_NODES)
        width = end / n_panels
        return width * (np.arange(n_panels)[:, None] + nodes), width * weights, width

    def _integral(self, values: Array, width: float) -> tuple[Array, float]:
        """Return int_0^t at the nodes, and the whole."""
        _, weights, matrix = gauss_rule(N_NODES)
        whole = width * values @ weights
        before = np.concatenate([[0.0], np.cumsum(whole)])
        return before[:-1, None] + width * values @ matrix.T, float(before[-1])

    def _mean(self, k: Array, width: float) -> tuple[Array, float, Array, float]:
        """Return E X_t and int (a - xi^2 k), each at the nodes and at the end."""
        growth, last = self._integral(self.rate - self.noise**2 * k, width)
        pull = self.rate * self.level
        push, total = self._integral(pull * np.exp(growth), width)
        mean = np.exp(-growth) * (self.start + push)
        return mean, float(np.exp(-last) * (self.start + total)), growth, last

    def policy(self, theta: Array, n_panels: int) -> PolicyAnswers:
        """Return the answers for a control."""
        t, weights, width = self._panels(self.horizon, n_panels)
        f, square = self.profiles(t), self.noise**2
        k = f @ theta
        mean, mean_end, growth, last = self._mean(k, width)
        alone = self.tilt * np.exp(growth - last)
        energy = 0.5 * square * k**2
        spent, whole = self._integral(np.exp(-growth) * energy, width)
        slope = alone + np.exp(growth) * (whole - spent)
        decay, decay_end = self._integral(self.rate - 0.5 * square * k, width)
        lean = self.tilt * np.exp(decay - decay_end)

        def gradient(direction: Array) -> Array:
            return np.einsum("ns,s,nsp->p", square * mean * direction, weights, f)

        reward = self.tilt * mean_end
        return PolicyAnswers(
            objective=float(reward + np.sum(energy * mean @ weights)),
            reward_only_objective=float(reward),
            gradient=gradient(k + slope),
            reward_only_gradient=gradient(alone),
            matching_gradient=gradient(k + lean),
        )

    def cross_entropy_gradient(self, theta: Array, n_panels: int) -> Array:
        """Return E* int (du/dtheta) (u - u*) dt."""
        t, weights, width = self._panels(self.horizon, n_panels)
        f, best = self.profiles(t), -self.exponents(t)[1]
        mean = self._mean(best, width)[0]
        gap = self.noise**2 * mean * (f @ theta - best)
        return np.einsum("ns,s,nsp->p", gap, weights, f)

    def tilted_moments(self, t: float) -> tuple[float, float]:
        """Return mean and variance of X_t under u*."""
        if t == 0.0:
            return self.start, 0.0
        nodes, _, width = self._panels(t, PANELS[0])
        k = -self.exponents(nodes)[1]
        mean, mean_end, growth, last = self._mean(k, width)
        _, spread = self._integral(np.exp(2.0 * growth) * self.noise**2 * mean, width)
        return mean_end, float(np.exp(-2.0 * last) * spread)

    # ---- the chain ------------------------------------------------------------------
    def _chain_psi(self, times: Array) -> Array:
        """Return a_0, ..., a_N."""
        h = np.diff(times)
        found = np.empty(len(times))
        found[-1] = self.tilt
        for n in reversed(range(len(h))):
            a = found[n + 1]
            found[n] = a * (1.0 - h[n] * self.rate) - 0.5 * self.noise**2 * h[n] * a**2
        return found

    def _chain_mean(self, k: Array, h: Array) -> Array:
        """Return E X_n, n = 0, ..., N."""
        mean = np.empty(len(h) + 1)
        mean[0] = self.start
        pull = self.rate * self.level
        for n, step in enumerate(h):
            factor = 1.0 - step * (self.rate - self.noise**2 * k[n])
            mean[n + 1] = factor * mean[n] + step * pull
        return mean

    def _root(self, k: Array, h: Array) -> float:
        """Return the root of the probability that the chain becomes negative."""
        return float(np.sqrt(_negative_probability(self, k.tobytes(), h.tobytes())))

    def chain_error(self, theta: Array, times: Array) -> float:
        """Return the bound of what negative states change in J_N."""
        h, square = np.diff(times), self.noise**2
        k = self.profiles(times[:-1]) @ theta
        slope = np.empty(len(h))
        ahead = self.tilt
        for n in reversed(range(len(h))):
            slope[n] = ahead
            ahead *= 1.0 - h[n] * (self.rate - square * k[n])
            ahead += 0.5 * h[n] * square * k[n] ** 2
        size, total = self.start, 0.0  # of X_n, root mean square
        for n, step in enumerate(h):
            total += step * square * abs(0.5 * k[n] ** 2 + slope[n] * k[n]) * size
            steep = 1.0 + step * (self.rate + square * abs(k[n]))
            moved = steep * size + step * self.rate * self.level
            size = float(np.sqrt(moved**2 + step * square * size))
        return total * self._root(k, h)

    def _checked(self, k: Array, times: Array) -> None:
        """Raise where the chain becomes negative too easily."""
        h = np.diff(times)
        root = self._root(k, h)
        if not root <= LARGEST_ROOT:
            raise NotExactError(
                f"{len(h)} steps of the square-root process become negative with a "
                f"probability of up to {min(root**2, 1.0):.2g}, where its chain has no "
                f"closed form; allowed is {LARGEST_ROOT**2:.0e}: take more steps"
            )

    def chain(self, theta: Array, times: Array) -> PolicyAnswers:
        """Return the answers of the Euler-Maruyama chain."""
        h, square = np.diff(times), self.noise**2
        f = self.profiles(times[:-1])
        k = f @ theta
        self._checked(k, times)
        mean = self._chain_mean(k, h)
        full, alone, lean = np.empty((3, len(h)))
        ahead = np.full(3, self.tilt)
        for n in reversed(range(len(h))):
            full[n], alone[n], lean[n] = ahead
            closed = 1.0 - h[n] * (self.rate - square * k[n])
            half = 1.0 - h[n] * (self.rate - 0.5 * square * k[n])
            ahead = ahead * np.array([closed, closed, half])
            ahead[0] += 0.5 * h[n] * square * k[n] ** 2
        weighted = (h * square * mean[:-1])[:, None] * f
        reward = self.tilt * mean[-1]
        return PolicyAnswers(
            objective=float(reward + 0.5 * square * (h * k**2) @ mean[:-1]),
            reward_only_objective=float(reward),
            gradient=(k + full) @ weighted,
            reward_only_gradient=alone @ weighted,
            matching_gradient=(k + lean) @ weighted,
        )

    def chain_log_normalizer(self, times: Array) -> float:
        """Return log E exp(-lambda X_N) without control."""
        h, a = np.diff(times), self._chain_psi(times)
        self._checked(np.zeros(len(h)), times)
        return float(-a[0] * self.start - self.rate * self.level * (h @ a[1:]))

    def chain_optimum(self, theta: Array, times: Array) -> tuple[float, float]:
        """Return J_N(u*_N), and E sum |w_n - w*_n|^2 under theta."""
        h = np.diff(times)
        k = self.profiles(times[:-1]) @ theta
        self._checked(k, times)
        gap = k + self._chain_psi(times)[1:]
        distance = self.noise**2 * (h * gap**2) @ self._chain_mean(k, h)[:-1]
        return -self.chain_log_normalizer(times), float(distance)

    def chain_cross_entropy_gradient(self, theta: Array, times: Array) -> Array:
        """Return E*_N sum_n (dw_n/dtheta) (w_n - w*_n)."""
        h, f = np.diff(times), self.profiles(times[:-1])
        best = -self._chain_psi(times)[1:]
        self._checked(best, times)
        weighted = h * self.noise**2 * self._chain_mean(best, h)[:-1]
        return np.asarray((weighted * (f @ theta - best)) @ f)

    def chain_control(self, x: Array, step: int, times: Array) -> Array:
        """Return u*_N at step."""
        h = np.diff(times)
        self._checked(np.zeros(len(h)), times)
        a = self._chain_psi(times)[step + 1]
        return np.asarray(-self.noise * np.sqrt(np.maximum(x, 0.0)) * a)


@lru_cache(maxsize=256)
def _negative_probability(line: SquareRoot, k: bytes, h: bytes) -> float:
    """Return a bound of the probability that some X_n is negative, n <= N.

    Of the first n at which it is: X_0, ..., X_{n-1} >= 0, and there
    E exp(-s X_{j+1}) = E exp(-s' X_j - s h a m), s' = s (1 - h a + h xi^2 k) - s^2 xi^2
    h / 2.
    """
    steps, control = np.frombuffer(h), np.frombuffer(k)
    square, pull = line.noise**2, line.rate * line.level
    s = EXPONENTS / (square * steps[:, None])  # (first n - 1, s)
    exponent = np.zeros_like(s)
    with np.errstate(over="ignore", invalid="ignore"):
        for n in reversed(range(len(steps))):
            old = s[n:]
            exponent[n:] -= old * steps[n] * pull
            factor = 1.0 - steps[n] * (line.rate - square * control[n])
            s[n:] = old * factor - 0.5 * square * steps[n] * old**2
        bounds = np.nan_to_num(exponent - s * line.start, nan=np.inf)
        return float(np.exp(np.min(bounds, axis=1)).sum())
