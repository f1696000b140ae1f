"""Ornstein-Uhlenbeck process tilted by a positive polynomial in every coordinate.

Base      dX = -rate X dt + u dt + dW,  X_0 ~ N(start_mean, start_scale^2 I)
Reward    r(x) = sum_i log p(x_i),  p(x) = floor + x^2 (x - shift)^2

The generator maps polynomials of degree four to themselves, so that h(x, t) is a
product of polynomials of degree four and u* = sum of their logarithmic derivatives:
see `sdebench.closed_form.polynomial_tilt`.  Where ``floor`` is small the reward has
deep valleys at 0 and at ``shift``.  The control family is affine,

    u_i = -(theta_0 + theta_1 s) x_i + theta_2 + theta_3 s,   s = 2 t / T - 1,

so that X_t is Gaussian and objectives and gradients are quadratures of one dimension;
theta* is its best member.

Source: Pearson diffusions, Forman and Sorensen 2008, 10.1111/j.1467-9469.2007.00592.x;
polynomial h after Filipovic and Larsson 2016, 10.1007/s00780-016-0304-4.  Tilt and
control family are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.errors import ParameterError
from sdebench.polynomial_problem import PolynomialProblem
from sdebench.problem import Array


@dataclass(frozen=True, kw_only=True)
class OUPolynomial(PolynomialProblem):
    """Ornstein-Uhlenbeck process, logarithm of a polynomial as reward.

    Parameters
    ----------
    dim : >= 1.
    rate : of the mean reversion.
    floor : > 0, least value of the polynomial.
    shift : distance of its two minima.
    start_mean, start_scale : of X_0; scale 0 is a point.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = (
        "after Filipovic and Larsson 2016, 10.1007/s00780-016-0304-4; tilt and control "
        "family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= -\text{rate}\,X_t\,dt + u\,dt + dW_t, \quad
  X_0 \sim \mathcal{N}(\text{start mean}, \text{start scale}^2 I) \\
r(x) &= \sum_i \log \left( \text{floor} + x_i^2 (x_i - \text{shift})^2 \right),
  \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "The reward has logarithmic valleys, and its gradient is large beside them: a "
        "tilt towards several modes in every coordinate."
    )

    dim: int = 2
    rate: float = 0.5
    floor: float = 0.3
    shift: float = 1.0
    start_mean: float = 0.3
    start_scale: float = 0.5
    horizon: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.floor > 0:
            raise ParameterError(
                f"floor {self.floor} must be positive: the polynomial has zeros at 0 "
                "and at shift without it"
            )

    @property
    def coefficients(self) -> Array:
        a = self.shift
        return np.array([self.floor, 0.0, a * a, -2.0 * a, 1.0])
