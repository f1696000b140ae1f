r"""Geometric Brownian motion with a power as tilt (class P).

    dX = a X dt + sigma X (u dt + dW),   X_0 = x_0 > 0,   r(x) = p log |x|,
    u = k(t) = theta . f(t).

h = x^p exp((p (a - sigma^2/2) + p^2 sigma^2/2) (T - t)) and u* = sigma p, a constant;
X_t is log-normal and

    J = 1/2 int k^2 dt - p (log x_0 + (a - sigma^2/2) T + sigma int k dt).

The lean adjoint of the reward is -p / X_t on every path, so that the matching gradient
is that of J.

The Euler-Maruyama chain X_{n+1} = X_n (1 + a h) + g |X_n| (w_n + z_n), g = sigma
root(h), changes its sign with a tiny probability.  With s the sign of X_n and
c = (1 + a h) / g + s w_n,

    log |X_{n+1}| = log |X_n| + log g + log |c + z|,   z ~ N(0, 1),

and the sign stays with probability Phi(c): a recursion over two signs is exact for
any number of steps.  L(c) = E log |c + z| is a Poisson mixture of digamma functions,
(c + z)^2 being chi-squared with a Poisson number of degrees of freedom, and its
derivative is root(2) times Dawson's function of c / root(2), the principal value of
E 1 / (c + z): estimators that differentiate log |c + z| have this mean up to an event
of probability Phi(-c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import dawsn, digamma, gammaln, hyp1f1, ndtr, pbdv

from sdebench.closed_form.grid_chain import PolicyAnswers

Array = NDArray[np.float64]

FAR = 9.0
"""From this c on an asymptotic series of L is exact to rounding."""
ROOT_2 = np.sqrt(2.0)
NEWTON_STEPS = 30


def log_mean(c: float) -> float:
    """Return L(c) = E log |c + z|."""
    if abs(c) > FAR:
        # log c - sum_k (2k - 1)!! / (2k c^{2k}): the moments of a normal number
        total, term = np.log(abs(c)), 1.0
        for k in range(1, 20):
            term *= (2 * k - 1) / c**2
            total -= term / (2 * k)
        return float(total)
    half = 0.5 * c * c
    j = np.arange(200.0)
    weights = np.exp(j * np.log(half) - half - gammaln(j + 1.0)) if half else j == 0.0
    return float(0.5 * (np.log(2.0) + weights @ digamma(j + 0.5)))


def log_mean_slope(c: float) -> float:
    """Return L'(c), a principal value."""
    return float(ROOT_2 * dawsn(c / ROOT_2))


def log_mean_bend(c: float) -> float:
    """Return L''(c)."""
    return float(1.0 - c * log_mean_slope(c))


def log_power_mean(c: float, power: float) -> tuple[float, float]:
    """Return log E |c + z|^p and its derivative in c > 0."""
    if c <= FAR:
        half, start = -0.5 * c * c, -0.5 * power
        level = hyp1f1(start, 0.5, half)
        slope = power * c * hyp1f1(start + 1.0, 1.5, half) / level
        constant = 0.5 * power * np.log(2.0) + gammaln(0.5 + 0.5 * power)
        return float(constant - gammaln(0.5) + np.log(level)), float(slope)
    # c^p sum_k (p choose 2k) (2k - 1)!! / c^{2k}
    total, bend, term = 1.0, 0.0, 1.0
    for k in range(1, 20):
        term *= (power - 2 * k + 2) * (power - 2 * k + 1) / (2 * k * c * c)
        total, bend = total + term, bend - 2 * k * term
    return power * np.log(c) + np.log(total), (power + bend / total) / c


def tilted_flip(c: float, power: float) -> float:
    """Return the probability of c + z < 0, c > 0, under the tilt by |c + z|^p."""
    cylinder = pbdv(-power - 1.0, c)[0]
    below = np.log(max(cylinder, 1e-300)) + gammaln(power + 1.0) - 0.25 * c * c
    below -= 0.5 * np.log(2.0 * np.pi)
    return float(np.exp(below - log_power_mean(c, power)[0]))


@dataclass(frozen=True)
class Geometric:
    """One coordinate.

    growth : a;  noise : sigma;  power : p;  start : x_0;  horizon : T;
    profiles : f(t) (..., P);  gram : int f f^T dt (P, P);  total : int f dt (P,).
    """

    growth: float
    noise: float
    power: float
    start: float
    horizon: float
    profiles: Callable[[Array], Array]
    gram: Array
    total: Array

    levels: ClassVar[tuple[None, None]] = (None, None)

    @property
    def best(self) -> float:
        """u*."""
        return self.noise * self.power

    # ---- continuous time ------------------------------------------------------------
    def value(self, x: Array, t: float) -> Array:
        """Return -log h."""
        p, variance = self.power, self.noise**2
        rate = p * (self.growth - 0.5 * variance) + 0.5 * p**2 * variance
        return np.asarray(-p * np.log(np.abs(x)) - rate * (self.horizon - t))

    def control(self, x: Array, t: float) -> Array:
        """Return u*."""
        return np.full_like(x, self.best)

    def policy(self, theta: Array, level: None = None) -> PolicyAnswers:
        """Return the answers for a control."""
        drift = (self.growth - 0.5 * self.noise**2) * self.horizon
        reward = np.log(self.start) + drift + self.noise * self.total @ theta
        pull = -self.best * self.total
        return PolicyAnswers(
            objective=float(0.5 * theta @ self.gram @ theta - self.power * reward),
            reward_only_objective=float(-self.power * reward),
            gradient=self.gram @ theta + pull,
            reward_only_gradient=pull,
            matching_gradient=self.gram @ theta + pull,
        )

    def cross_entropy_gradient(self, theta: Array, level: None = None) -> Array:
        """Return E* int (du/dtheta) (u - u*) dt."""
        return np.asarray(self.gram @ theta - self.best * self.total)

    def tilted_moments(self, t: float) -> tuple[float, float]:
        """Return mean and variance of X_t under u*."""
        mean = self.start * np.exp((self.growth + self.noise * self.best) * t)
        return float(mean), float(mean**2 * np.expm1(self.noise**2 * t))

    # ---- the chain ------------------------------------------------------------------
    def _steps(self, times: Array) -> tuple[Array, Array]:
        """Return g and (1 + a h) / g of every step."""
        h = np.diff(times)
        noise = self.noise * np.sqrt(h)
        return noise, (1.0 + self.growth * h) / noise

    def chain(self, theta: Array, times: Array) -> PolicyAnswers:
        """Return the answers of the Euler-Maruyama chain."""
        roots = np.sqrt(np.diff(times))
        f = roots[:, None] * self.profiles(times[:-1])
        w, (noise, centre) = f @ theta, self._steps(times)
        p, count = self.power, len(w)
        signs = np.array([1.0, -1.0])
        c = centre[:, None] + w[:, None] * signs  # (N, 2): sign + and sign -
        gain = np.log(noise)[:, None] + np.vectorize(log_mean)(c)
        slope = np.vectorize(log_mean_slope)(c)
        flip, hill = ndtr(-c), np.exp(-0.5 * c**2) / np.sqrt(2.0 * np.pi)
        # costs to come by sign, with and without the control's; dJ/dw given the sign
        full, only = np.zeros(2), np.zeros(2)
        push, push_only = np.empty((2, count, 2))
        for n in reversed(range(count)):
            for ahead, into in ((full, push), (only, push_only)):
                into[n] = signs * (hill[n] * (ahead - ahead[::-1]) - p * slope[n])
            full, only = (
                (1.0 - flip[n]) * ahead + flip[n] * ahead[::-1] - p * gain[n]
                for ahead in (full, only)
            )
            full = full + 0.5 * w[n] ** 2
        law = self._signs(flip)
        start = -p * np.log(self.start)
        direct = w[:, None]
        matching = direct - p * signs * slope
        return PolicyAnswers(
            objective=float(start + full[0]),
            reward_only_objective=float(start + only[0]),
            gradient=np.sum(law * (direct + push), axis=1) @ f,
            reward_only_gradient=np.sum(law * push_only, axis=1) @ f,
            matching_gradient=np.sum(law * matching, axis=1) @ f,
        )

    @staticmethod
    def _signs(flip: Array) -> Array:
        """Return the probabilities (N, 2) of the signs before every step."""
        law = np.empty_like(flip)
        now = np.array([1.0, 0.0])
        for n, change in enumerate(flip):
            law[n] = now
            now = now * (1.0 - change) + (now * change)[::-1]
        return law

    def chain_log_normalizer(self, times: Array) -> float:
        """Return log E |X_N|^p without control."""
        noise, centre = self._steps(times)
        logs = np.log(noise) * self.power
        means = np.vectorize(log_power_mean)(centre, self.power)[0]
        return float(self.power * np.log(self.start) + np.sum(logs + means))

    def _chain_controls(self, times: Array) -> Array:
        """Return w*_n (N,) of positive states: least 1/2 w^2 - p L(c + w)."""
        _, centre = self._steps(times)
        w = self.power / centre
        for _ in range(NEWTON_STEPS):
            slope = w - self.power * np.vectorize(log_mean_slope)(centre + w)
            bend = 1.0 - self.power * np.vectorize(log_mean_bend)(centre + w)
            w = w - slope / np.maximum(bend, 0.5)
        return np.asarray(w)

    def chain_optimum(self, theta: Array, times: Array) -> tuple[float, float]:
        """Return J_N(u*_N), and E sum |w_n - w*_n|^2 under theta."""
        noise, centre = self._steps(times)
        best = self._chain_controls(times)
        gain = np.log(noise) + np.vectorize(log_mean)(centre + best)
        cost = np.sum(0.5 * best**2 - self.power * gain)
        w = np.sqrt(np.diff(times)) * (self.profiles(times[:-1]) @ theta)
        signs = np.array([1.0, -1.0])
        flip = ndtr(-(centre[:, None] + w[:, None] * signs))
        gaps = (w[:, None] - signs * best[:, None]) ** 2
        distance = np.sum(self._signs(flip) * gaps)
        return float(cost - self.power * np.log(self.start)), float(distance)

    def chain_cross_entropy_gradient(self, theta: Array, times: Array) -> Array:
        """Return E*_N sum_n (dw_n/dtheta) (w_n - E*[z_n | X_n]), z_n of the base.

        E*[z_n | X_n] is the sign of X_n times the slope of log E |c + z|^p, and both
        signs change with the same probability q: the mean of the sign is a product of
        1 - 2 q.
        """
        f = np.sqrt(np.diff(times))[:, None] * self.profiles(times[:-1])
        _, centre = self._steps(times)
        slope = np.vectorize(log_power_mean)(centre, self.power)[1]
        flip = np.vectorize(tilted_flip)(centre, self.power)
        sign = np.cumprod(np.append(1.0, 1.0 - 2.0 * flip[:-1]))
        return np.asarray((f @ theta - slope * sign) @ f)

    def chain_error(self, theta: Array, times: Array) -> float:
        """Return 0: the chain's answers are exact."""
        return 0.0

    def chain_control(self, x: Array, step: int, times: Array) -> Array:
        """Return u*_N at step."""
        best = self._chain_controls(times)[step]
        return np.asarray(np.sign(x) * best / np.sqrt(times[step + 1] - times[step]))
