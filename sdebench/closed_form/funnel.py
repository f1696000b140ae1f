r"""Exact answers for Brownian motion with a funnel as its target.

    nu(x) = N(x_0; 0, S^2) prod_{i=1}^n N(x_i; 0, e^{x_0}),   dX = u dt + dW,   X_0 = 0,

r = log(nu / N(0, T I)).  With s^2 = T - t, D(y) = s^2 + (t / T) e^y and
Q = sum_i x_i^2, the coordinates x_i integrated out in closed form,

    h(x, t) = c int exp(-a y^2 / 2 - (y - x_0)^2 / (2 s^2) - n/2 log D
                        - Q/2 (1 - e^y / T) / D) dy,   a = 1 / S^2 - 1 / T,

one trapezoidal sum over y, the place of x_0 at T.  By parts the gradient of log h is
E[-a y - n/2 (1 - s^2 / D) + Q/2 e^y / D^2] in x_0, and -x_i E[(1 - e^y / T) / D]: no
difference quotient.  At t = 0 the integral is finite at x_1 = ... = x_n = 0 only.

Under the affine control x_0 ~ N(m, c) and x_i ~ N(0, b), and -E r(X_T) is

    G = a (c + m^2) / 2 + n m / 2 + n b (e^{c/2 - m} - 1 / T) / 2 + const:

two problems of one dimension (`polynomial_tilt`) that meet in G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sdebench.closed_form.grid_chain import PolicyAnswers
from sdebench.closed_form.polynomial_tilt import PolynomialTilt
from sdebench.errors import ParameterError

Array = NDArray[np.float64]

DEPTH = 44.0
"""How far the exponent falls at the ends of a sum; exp(-44) is 8e-20."""
SCAN = 200
"""Points of the search for where the integrand lives."""
FINE, COARSE = 260, 190
"""Points of the sum there, of an answer and of its check."""
BLOCK = 256


@dataclass(frozen=True)
class Funnel:
    """n : coordinates beside x_0;  spread : S;  horizon : T;  profiles : of controls.

    The parameters are those of k (2) and q (2) in u_0 = -k x_0 + q, then of kappa (2)
    in u_i = -kappa x_i.
    """

    n: int
    spread: float
    horizon: float
    profiles: Callable[[Array], Array]

    # ---- h --------------------------------------------------------------------------
    def log_reward(self, x: Array) -> Array:
        """Return r (...), for x (..., n + 1)."""
        first, squares = x[..., 0], np.sum(x[..., 1:] ** 2, axis=-1)
        value = -0.5 * first**2 / self.spread**2 - np.log(self.spread)
        value = value - 0.5 * self.n * first - 0.5 * np.exp(-first) * squares
        value = value + 0.5 * (first**2 + squares) / self.horizon
        return np.asarray(value + 0.5 * (self.n + 1) * np.log(self.horizon))

    def reward_gradient(self, x: Array) -> Array:
        """Return grad r, shape of x."""
        pull = np.exp(-x[..., :1])
        squares = np.sum(x[..., 1:] ** 2, axis=-1, keepdims=True)
        slope = x / self.horizon
        slope[..., :1] += 0.5 * (pull * squares - self.n) - x[..., :1] / self.spread**2
        slope[..., 1:] -= pull * x[..., 1:]
        return np.asarray(slope)

    def log_h(self, x: Array, t: float, count: int = FINE) -> tuple[Array, Array]:
        """Return log h (m,) and its gradient (m, n + 1), for x (m, n + 1)."""
        if t == self.horizon:
            return self.log_reward(x), self.reward_gradient(x)
        if t == 0.0 and np.any(x[:, 1:]):
            raise ParameterError(
                "h(x, 0) is infinite unless x_1 = ... = x_n = 0, where the process "
                "starts; ask at a later time"
            )
        value, slope = np.empty(len(x)), np.empty_like(x)
        for i in range(0, len(x), BLOCK):
            part = slice(i, i + BLOCK)
            value[part], slope[part] = self._block(x[part], t, count)
        return value, slope

    def _block(self, x: Array, t: float, count: int) -> tuple[Array, Array]:
        share, left, n = t / self.horizon, self.horizon - t, self.n
        first, squares = x[:, 0], np.sum(x[:, 1:] ** 2, axis=1)
        narrow = 1.0 / self.spread**2 - 1.0 / self.horizon

        def exponent(y: Array) -> Array:
            grown = np.exp(y)
            spread = left + share * grown
            value = -0.5 * narrow * y**2 - 0.5 * (y - first) ** 2 / left
            value -= 0.5 * n * np.log(spread)
            value -= 0.5 * squares * (1.0 - grown / self.horizon) / spread
            return np.asarray(value)

        low, high = self._range(first, squares, t)
        y = low + (high - low) * np.linspace(0.0, 1.0, SCAN)[:, None]
        values = exponent(y)
        inside = values > values.max(axis=0) - DEPTH
        begin = np.maximum(np.argmax(inside, axis=0) - 1, 0)
        end = np.minimum(SCAN - np.argmax(inside[::-1], axis=0), SCAN - 1)
        every = np.arange(len(x))
        low, high = y[begin, every], y[end, every]
        y = low + (high - low) * np.linspace(0.0, 1.0, count)[:, None]
        values = exponent(y)
        top = values.max(axis=0)
        weight = np.exp(values - top)
        total = weight.sum(axis=0)
        weight /= total
        grown = np.exp(y)
        spread = left + share * grown
        pull = -narrow * y - 0.5 * n * share * grown / spread
        pull += 0.5 * squares * grown / spread**2
        shrink = (weight * (1.0 - grown / self.horizon) / spread).sum(axis=0)
        slope = -shrink[:, None] * x
        slope[:, 0] = (weight * pull).sum(axis=0)
        constant = 0.5 * (n + 1) * np.log(self.horizon) - np.log(self.spread)
        constant -= 0.5 * np.log(2.0 * np.pi * left)
        return top + np.log(total * (high - low) / (count - 1)) + constant, slope

    def _range(self, first: Array, squares: Array, t: float) -> tuple[Array, Array]:
        """Return an interval that holds the integrand."""
        share, left = t / self.horizon, self.horizon - t
        precision = 1.0 / self.spread**2 - 1.0 / self.horizon + 1.0 / left
        mean, width = first / (left * precision), 9.4 / np.sqrt(precision)
        low = mean - 0.5 * self.n / precision - width
        high = mean + 0.5 / precision
        if share > 0.0:
            # the pull to the right is squares / 2 e^y / D^2: below 1/2 beyond the
            # first place, and nowhere above squares / (8 left share)
            drawn = np.log(np.maximum(squares, 1e-300) / share**2) + 0.5 / precision
            most = high + squares / (8.0 * left * share * precision)
            high = np.minimum(np.maximum(high, drawn), most)
        return low, high + width

    # ---- answers for a control ----------------------------------------------------
    @cached_property
    def _line(self) -> PolynomialTilt:
        return PolynomialTilt(0.0, np.ones(1), self.horizon, (0.0, 0.0), self.profiles)

    def _end(self, m: float, c: float, b: float) -> tuple[Array, float]:
        """Return G and its derivatives in m and c, and that in b."""
        n, gap = self.n, 1.0 / self.spread**2 - 1.0 / self.horizon
        mean = np.exp(0.5 * c - m)  # of exp(-x_0)
        rest = 0.5 * n * b * mean
        value = 0.5 * gap * (c + m**2) + 0.5 * n * (m - b / self.horizon) + rest
        value += np.log(self.spread) - 0.5 * (n + 1) * np.log(self.horizon)
        first = np.array([value, gap * m + 0.5 * n - rest, 0.5 * (gap + rest)])
        return first, float(0.5 * n * (mean - 1.0 / self.horizon))

    def answers(
        self, theta: Array, times: Array | None, n_panels: int
    ) -> PolicyAnswers:
        """Return the answers in continuous time, or of the chain."""

        def solve(
            parameters: Array, final: Callable[[float, float], Array]
        ) -> PolicyAnswers:
            if times is None:
                return self._line.policy(parameters, n_panels, 0.0, final)
            return self._line.chain(parameters, times, 0.0, final)

        ends: list[tuple[float, float]] = []

        def note(mean: float, variance: float) -> Array:
            ends.append((mean, variance))
            return np.zeros(3)

        first, others = theta[:4], np.append(theta[4:], [0.0, 0.0])
        solve(first, note)
        solve(others, note)
        (m, c), (_, b) = ends
        mine, slope = self._end(m, c, b)
        value = float(mine[0])
        one = solve(first, lambda mean, variance: mine)
        # n coordinates alike: each has the share 1 / n of the derivative in b
        share = np.array([0.0, 0.0, slope / self.n])
        each = solve(others, lambda mean, variance: share)

        def joined(mine: Array, theirs: Array) -> Array:
            return np.append(mine, self.n * theirs[:2])

        return PolicyAnswers(
            objective=one.objective + self.n * each.objective,
            reward_only_objective=value,
            gradient=joined(one.gradient, each.gradient),
            reward_only_gradient=joined(
                one.reward_only_gradient, each.reward_only_gradient
            ),
            matching_gradient=joined(one.matching_gradient, each.matching_gradient),
        )
