r"""Exact answers for isotropic Gaussian processes with costs of |x|^2.

    dX = sigma (u dt + dW),   X_0 = 0,   u = -k(t) X

keeps X_t ~ N(0, c_t I), so that every expected cost is one of S = c chi^2_d:

    J = int (1/2 k^2 d c + E f(S_t, t)) dt - E r(S_T).

With e_f = d/dc E f(c chi^2) and e_g that of -r, the derivative of J in the variance and
the same for the lean adjoint (transported without the control) obey

    l' = 2 sigma k l - 1/2 k^2 d - e_f,    l(T) = e_g,
    m' =   sigma k m - e_f,                m(T) = e_g,

and the gradient of J is int rho_p (k d c - 2 sigma c l) dt for k = sum theta_p rho_p;
that of the matching loss has m for l.  The Euler-Maruyama chain obeys the same with
c' = (1 - h sigma k)^2 c + h sigma^2.

Expectations of S are trapezoidal sums over log chi^2, whose integrand is analytic and
decays exponentially on both sides (Trefethen and Weideman 2014).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from sdebench.closed_form.collocation import N_NODES, gauss_rule
from sdebench.closed_form.grid_chain import PolicyAnswers

Array = NDArray[np.float64]
Function = Callable[[Array, Array], Array]

FAR = 42.0
"""How far logarithms of integrands fall below their maximum: exp(-42) = 6e-19."""


@lru_cache(maxsize=16)
def chi_square(dim: int, density: float = 1.0) -> tuple[Array, Array]:
    """Return nodes and weights of the law of chi^2 with ``dim`` degrees of freedom.

    Parameters
    ----------
    density : of the nodes, 1 for answers and less for the bound of their error.
    """
    half = 0.5 * dim

    def log_density(y: Array) -> Array:
        return np.asarray(half * y - 0.5 * np.exp(y))

    top = np.log(dim)
    right = top + np.geomspace(1e-3, 12.0, 4000)
    drop = log_density(np.array([top])) - log_density(right)
    high = right[np.argmax(drop > FAR)]
    left = top - np.geomspace(1e-3, 2.0 * FAR / half + 12.0, 4000)
    drop = log_density(np.array([top])) - log_density(left)
    low = left[np.argmax(drop > FAR)]
    spacing = min(0.15, 0.45 * np.sqrt(2.0 / dim)) / density
    y = np.linspace(low, high, int(np.ceil((high - low) / spacing)) + 1)
    logs = log_density(y) - half * np.log(2.0) - gammaln(half)
    return np.exp(y), (y[1] - y[0]) * np.exp(logs)


@dataclass(frozen=True)
class RadialProcess:
    """The process and its costs.

    dim : d;  noise_level : sigma;  horizon : T.
    profiles : rho(t) (..., P) for t (...).
    running : (f, df/ds) of (s, t), or None;  cost : (g, dg/ds) of s, g = -r.
    """

    dim: int
    noise_level: float
    horizon: float
    profiles: Callable[[Array], Array]
    running: tuple[Function, Function] | None
    cost: tuple[Callable[[Array], Array], Callable[[Array], Array]]

    def _means(
        self, functions: tuple[Function, Function] | None, c: Array, t: Array, d: float
    ) -> tuple[Array, Array]:
        """Return E f(c chi^2, t) and its derivative in c, for c and t (n,)."""
        if functions is None:
            return np.zeros_like(c), np.zeros_like(c)
        nodes, weights = chi_square(self.dim, d)
        s, time = c[:, None] * nodes, t[:, None]
        return functions[0](s, time) @ weights, functions[1](s, time) @ (
            nodes * weights
        )

    def _final(self, c: float, density: float) -> tuple[float, float]:
        g, slope = self.cost
        pair = lambda s, t: g(s), lambda s, t: slope(s)
        value, derivative = self._means(pair, np.array([c]), np.zeros(1), density)
        return float(value[0]), float(derivative[0])

    def policy(self, theta: Array, n_panels: int, density: float) -> PolicyAnswers:
        """Return the answers in continuous time, by Gauss rules on panels."""
        nodes, weights, matrix = gauss_rule(N_NODES)
        width = self.horizon / n_panels
        t = width * (np.arange(n_panels)[:, None] + nodes)  # (panels, nodes)
        rho = self.profiles(t)
        k, sigma = rho @ theta, self.noise_level
        inner = width * k @ matrix.T  # int of k from the left end of the panel
        whole = width * k @ weights
        before = np.concatenate([[0.0], np.cumsum(whole)])
        growth = before[:-1, None] + inner  # int_0^t k
        # c = e^{-2 sigma K} sigma^2 int_0^t e^{2 sigma K}
        force = np.exp(2.0 * sigma * growth)
        c = sigma**2 / force * self._forward(force, width)
        total = sigma**2 * width * float(np.sum(force @ weights))
        last = float(np.exp(-2.0 * sigma * before[-1]) * total)
        final, pull = self._final(last, density)
        shape = t.shape
        f, slope = self._means(self.running, c.ravel(), t.ravel(), density)
        f, slope = f.reshape(shape), slope.reshape(shape)
        energy = 0.5 * k**2 * self.dim
        left = np.exp(sigma * (before[-1] - growth))  # e^{sigma (K_T - K_t)}
        lean = pull / left + self._backward(slope / np.exp(sigma * growth), width) * (
            np.exp(sigma * growth)
        )
        alone = pull / left**2
        full = alone + self._backward((slope + energy) / force, width) * force
        at = width * weights

        def total_of(values: Array) -> Array:
            return np.einsum("ns,s,nsp->p", values, at, rho)

        direct = k * self.dim * c
        objective = final + float(np.sum((energy * c + f) @ at))
        return PolicyAnswers(
            objective=objective,
            reward_only_objective=final,
            gradient=total_of(direct - 2.0 * sigma * c * full),
            reward_only_gradient=total_of(-2.0 * sigma * c * alone),
            matching_gradient=total_of(direct - 2.0 * sigma * c * lean),
        )

    @staticmethod
    def _forward(values: Array, width: float) -> Array:
        """Return int_0^t of values at the nodes, at the nodes."""
        _, weights, matrix = gauss_rule(N_NODES)
        whole = width * values @ weights
        before = np.concatenate([[0.0], np.cumsum(whole)[:-1]])
        return np.asarray(before[:, None] + width * values @ matrix.T)

    @classmethod
    def _backward(cls, values: Array, width: float) -> Array:
        """Return int_t^T of values at the nodes, at the nodes."""
        _, weights, _ = gauss_rule(N_NODES)
        total = width * float(np.sum(values @ weights))
        return np.asarray(total - cls._forward(values, width))

    def chain(self, theta: Array, times: Array, density: float) -> PolicyAnswers:
        """Return the answers of the Euler-Maruyama chain."""
        h, sigma = np.diff(times), self.noise_level
        rho = self.profiles(times[:-1])  # (N, P)
        k = rho @ theta
        factor = 1.0 - h * sigma * k
        c = np.zeros(len(times))
        for n in range(len(h)):
            c[n + 1] = factor[n] ** 2 * c[n] + h[n] * sigma**2
        final, pull = self._final(float(c[-1]), density)
        f, slope = self._means(self.running, c[:-1], times[:-1], density)
        full, alone, lean = np.zeros((3, len(h)))
        ahead = np.full(3, pull)
        for n in reversed(range(len(h))):
            # what multiplies c_n comes from one step later
            full[n], alone[n], lean[n] = ahead
            energy = 0.5 * h[n] * k[n] ** 2 * self.dim
            ahead = factor[n] * ahead * np.array([factor[n], factor[n], 1.0])
            ahead += h[n] * slope[n] * np.array([1.0, 0.0, 1.0])
            ahead[0] += energy
        moved = 2.0 * sigma * factor * c[:-1]
        direct = k * self.dim * c[:-1]
        objective = final + float(h @ (0.5 * k**2 * self.dim * c[:-1] + f))
        weighted = h[:, None] * rho
        return PolicyAnswers(
            objective=objective,
            reward_only_objective=final,
            gradient=(direct - moved * full) @ weighted,
            reward_only_gradient=(-moved * alone) @ weighted,
            matching_gradient=(direct - moved * lean) @ weighted,
        )


@lru_cache(maxsize=4)
def _logarithmic_nodes(density: float) -> tuple[Array, Array]:
    """Return v = e^y and the weights of int_0^inf exp(-v) F(v) dv."""
    y = np.arange(-40.0, 3.8, 0.11 / density)
    v = np.exp(y)
    return v, (y[1] - y[0]) * v * np.exp(-v)


def log_mean_reciprocal(
    s: Array, variance: float, dim: int, density: float = 1.0
) -> tuple[Array, Array]:
    """Return log E 1/(1 + |x + root(variance) z|^2), |x|^2 = s, and its slope in s.

    With 1/(1 + a) = int_0^inf exp(-v (1 + a)) dv and the Laplace transform of a
    noncentral chi^2 law the mean is

        int exp(-v) (1 + 2 variance v)^{-d/2} exp(-v s / (1 + 2 variance v)) dv.
    """
    v, weights = _logarithmic_nodes(density)
    spread = 1.0 + 2.0 * variance * v
    rate = v / spread
    flat = np.ravel(s)
    found = np.empty((2, len(flat)))
    level = weights * spread ** (-0.5 * dim)
    for first in range(0, len(flat), 4096):
        part = slice(first, first + 4096)
        decay = np.exp(-flat[part, None] * rate)
        mean = decay @ level
        found[:, part] = np.log(mean), -(decay @ (level * rate)) / mean
    return found[0].reshape(np.shape(s)), found[1].reshape(np.shape(s))
