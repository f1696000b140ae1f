r"""log E e^{p(Y)} for a Gaussian Y and a polynomial p that falls to minus infinity.

With Y ~ N(m, s^2) the integrand e^{L(y)}, L = p - (y - m)^2 / (2 s^2), is an entire
function with at most as many modes as p, whatever s: a trapezoidal sum over the hull of
its modes converges faster than any power of the spacing (Trefethen and Weideman 2014).
All terms are positive, so that every digit of the sum is right.  By parts

    d/dm log E e^{p(Y)} = E[p'(Y) e^{p(Y)}] / E e^{p(Y)},

without the difference quotient (Y - m) / s^2, which loses digits where s is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray

from sdebench.errors import ParameterError

Array = NDArray[np.float64]

DEPTH = 42.0
"""How far the exponent falls at the ends of a sum; exp(-42) is 6e-19."""
FINE, COARSE = 0.42, 0.55
"""Spacing in widths of the narrowest mode, of an answer and of its check."""
BLOCK = 2048


@dataclass(frozen=True)
class PolynomialExpectation:
    """E e^{p(Y)}; coefficients of p lowest first, even degree, leading one negative."""

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        degree = len(self.coefficients) - 1
        if degree < 2 or degree % 2 or not self.coefficients[-1] < 0.0:
            raise ParameterError(
                f"the exponent {self.coefficients} does not fall on both sides; give "
                "an even degree with a negative leading coefficient"
            )

    @cached_property
    def _slopes(self) -> tuple[Array, Array]:
        """Coefficients of p' and p''."""
        p = np.array(self.coefficients)
        return polynomial.polyder(p), polynomial.polyder(p, 2)

    def __call__(
        self, mean: Array, variance: float, spacing: float = FINE
    ) -> tuple[Array, Array]:
        """Return log E e^{p(Y)} and its derivative in the mean (n,), Y ~ N(mean, v)."""
        mean = np.asarray(mean, dtype=np.float64)
        first, _ = self._slopes
        if variance == 0.0:
            value = polynomial.polyval(mean, np.array(self.coefficients))
            return np.asarray(value), np.asarray(polynomial.polyval(mean, first))
        parts = [
            self._block(mean[i : i + BLOCK], variance, spacing)
            for i in range(0, len(mean), BLOCK)
        ]
        value, slope = np.concatenate(parts, axis=1)
        return value, slope

    def _exponent(self, y: Array, mean: Array, variance: float) -> Array:
        p = np.array(self.coefficients)
        return np.asarray(polynomial.polyval(y, p) - 0.5 * (y - mean) ** 2 / variance)

    def _modes(self, mean: Array, variance: float) -> tuple[Array, Array]:
        """Return the least and the largest stationary point of L (n,)."""
        slope = np.zeros((len(mean), max(len(self.coefficients) - 1, 2)))
        slope[:, : len(self._slopes[0])] = self._slopes[0]
        slope[:, 0] += mean / variance
        slope[:, 1] -= 1.0 / variance
        size = slope.shape[1] - 1
        companion = np.zeros((len(mean), size, size))
        companion[:, np.arange(1, size), np.arange(size - 1)] = 1.0
        companion[:, :, -1] = -slope[:, :-1] / slope[:, -1:]
        roots = np.linalg.eigvals(companion)
        real = np.abs(roots.imag) <= 1e-6 * (1.0 + np.abs(roots))
        low = np.where(real, roots.real, np.inf).min(axis=1)
        high = np.where(real, roots.real, -np.inf).max(axis=1)
        return low, high

    def _block(self, mean: Array, variance: float, spacing: float) -> Array:
        low, high = self._modes(mean, variance)
        ends = np.stack([low, high])
        top = self._exponent(ends, mean, variance).max(axis=0)
        # both ends go outwards until the exponent has fallen
        sign = np.array([[-1.0], [1.0]])
        width = np.full_like(ends, np.sqrt(variance))
        for _ in range(60):
            short = self._exponent(ends + sign * width, mean, variance) > top - DEPTH
            if not np.any(short):
                break
            width = np.where(short, 1.25 * width, width)
        left, right = ends + sign * width
        curved = polynomial.polyval(
            np.stack([left, right, 0.0 * left]), self._slopes[1]
        )
        narrow = 1.0 / np.sqrt(1.0 / variance + np.abs(curved).max(axis=0))
        count = int(np.ceil(np.max((right - left) / (spacing * narrow)))) + 1
        y = left + (right - left) * np.linspace(0.0, 1.0, count)[:, None]
        weight = np.exp(self._exponent(y, mean, variance) - top)
        total = weight.sum(axis=0)
        scale = (right - left) / (count - 1) / np.sqrt(2.0 * np.pi * variance)
        slope = (weight * polynomial.polyval(y, self._slopes[0])).sum(axis=0) / total
        return np.stack([top + np.log(total * scale), slope])
