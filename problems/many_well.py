"""Many-Well: products of two-dimensional double wells, from a pinned start.

Base      dX = -rate X dt + u dt + dW,  X_0 = 0,  so p_T = N(0, v I)
Target    rho(x) = prod over pairs of exp(-a^4 + 6 a^2 + a / 2 - b^2 / 2),
          the wells a in the first half of the coordinates, the b in the second; of
          an odd dimension the last pair has no b
Reward    r = log(rho / p_T)

so that X_T has the density rho / Z under u*, and log Z is that of rho: 164.695675 at
d = 32.  With m and s^2 the mean and the variance of a coordinate of X_T given X_t

    h(x, t) = prod_i E exp(r_i(m_i + s z)),   u* = grad log h,

integrals of one dimension, see `sdebench.closed_form.polynomial_expectation`.  The
answers for a control are those of independent diffusions on the line.  Control

    u_a = theta_1 + theta_2 y - theta_3 y^3,  y = a / 3^(1/2);   u_b = -theta_4 b,

which holds the Langevin drift of rho; no u* that depends on time.  theta* is its best
member, and its excess cost, a relative entropy, is per pair 1.3, beside 10.3 of log Z.

Beyond 8.5 standard deviations of X_T under the base, force, control and cost are
constant: see `sdebench.product_problem`.

Source: Noe et al. 2019, 10.1126/science.aaw1147 (the double well); Midgley et al. 2023,
arXiv:2208.01893 (Many-Well, d = 32); Zhang and Chen 2021, arXiv:2111.15141 (the pinned
start); the control family is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np

from sdebench.certified_truth import CertifiedTruth, best_in_family
from sdebench.closed_form.polynomial_expectation import (
    COARSE,
    FINE,
    PolynomialExpectation,
)
from sdebench.errors import ParameterError
from sdebench.problem import EULER, Array, Steps, check_scheme
from sdebench.product_problem import Kind, ProductProblem, ProductTruth

OPTIMUM = (
    0.3696078824988483,
    5.002907722002376,
    4.495899813390689,
    0.03994295125848381,
)
"""theta* of the default parameters, of any dim."""
GUESS = (0.3, 4.0, 3.5, 0.2)
"""Where the search for theta* starts: near the Langevin drift of the target."""
REACH = 8.5
"""Where forces become constant, in standard deviations of p_T."""
WELL = (0.0, 0.5, 6.0, 0.0, -1.0)
"""Coefficients of log rho in a coordinate with two wells, lowest power first."""
BELL = (0.0, 0.0, -0.5)
"""The same in one without."""


@dataclass(frozen=True, kw_only=True)
class ManyWell(ProductProblem):
    """Two wells in half of the coordinates, a Gaussian in the other half.

    Parameters
    ----------
    dim : >= 2; 32 in the literature.
    rate : >= 0.05, of the mean reversion of the base.
    horizon : T > 0; v = (1 - exp(-2 rate T)) / (2 rate) must exceed 1/2, or the weights
        e^r have infinite variance under the base.
    """

    default_steps: ClassVar[int] = 100
    source: ClassVar[str] = (
        "Midgley et al. 2023, arXiv:2208.01893 (Many-Well); pinned start after Zhang "
        "and Chen 2021, arXiv:2111.15141; control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= -\text{rate}\,X_t\,dt + u\,dt + dW_t, \quad X_0 = 0 \\
\log \rho(x) &= \sum_{i \le \lceil d/2 \rceil}
    \left( -x_i^4 + 6 x_i^2 + \tfrac{1}{2} x_i \right)
  - \tfrac{1}{2} \sum_{i > \lceil d/2 \rceil} x_i^2 \\
r(x) &= \log \frac{\rho(x)}{p_T(x)}, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "2^(d/2) modes of unequal weight: every pair must find both wells and their "
        "odds, 5.4 to 1."
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"dim": 32})

    dim: int = 8
    rate: float = 0.25
    horizon: float = 1.5

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ParameterError(f"dim {self.dim} must be at least 2")
        if not self.horizon > 0:
            raise ParameterError(f"horizon {self.horizon} must be positive")
        if not self.rate >= 0.05:
            raise ParameterError(f"rate {self.rate} must be at least 0.05")
        if not self.variance_left(0.0) > 0.5:
            raise ParameterError(
                f"the variance of p_T is {self.variance_left(0.0):.4g}; it must exceed "
                "1/2, or the weights have infinite variance: give a rate below 1 and a "
                "longer horizon"
            )

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "well_offset", "well_linear", "well_cubic", "bell_linear"

    def variance_left(self, t: float) -> float:
        """Return the variance of a coordinate of X_T given X_t, under the base."""
        return -math.expm1(-2.0 * self.rate * (self.horizon - t)) / (2.0 * self.rate)

    @property
    def theta_star(self) -> Array:
        if replace(self, dim=ManyWell.dim) == ManyWell():
            return np.array(OPTIMUM)
        return _best(replace(self, dim=2))

    @cached_property
    def truth(self) -> ManyWellTruth:
        return _truth(self)

    @property
    def end_time(self) -> float:
        return self.horizon

    @property
    def reach(self) -> float:
        return REACH * math.sqrt(self.variance_left(0.0))

    @property
    def trusted(self) -> float:
        return math.inf

    @property
    def exponents(self) -> tuple[Array, Array]:
        """Coefficients of r in a coordinate of either kind, lowest power first."""
        variance = self.variance_left(0.0)
        found = []
        for log_target in (WELL, BELL):
            row = np.array(log_target)
            row[0] += 0.5 * math.log(2.0 * math.pi * variance)
            row[2] += 0.5 / variance
            found.append(row)
        return found[0], found[1]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        wells, bells = self.exponents
        unit = math.sqrt(3.0)
        force = np.array([0.0, -self.rate])
        features = np.zeros((4, 4))
        features[0, 0], features[1, 1], features[2, 3] = 1.0, 1.0 / unit, -1.0 / unit**3
        plain = np.zeros((4, 2))
        plain[3, 1] = -1.0
        n_bells = self.dim // 2
        return (
            Kind(force, features, -wells, self.dim - n_bells),
            Kind(force, plain, -bells, n_bells),
        )


@lru_cache(maxsize=16)
def _truth(problem: ManyWell) -> ManyWellTruth:
    """Return the truth of all problems that are equal, with what it remembers."""
    return ManyWellTruth(problem)


@lru_cache(maxsize=16)
def _best(problem: ManyWell) -> Array:
    """Return the minimizer of J in the family, the same for every dim."""
    return best_in_family(problem, start=np.array(GUESS))


class ManyWellTruth(ProductTruth):
    """Certified answers: h by sums of one dimension, the others as its parent's."""

    # From the scatter of J between neighbouring theta: the exponents are hundreds.
    rounding: ClassVar[float] = 2e-12
    _problem: ManyWell

    @cached_property
    def _integrals(self) -> list[PolynomialExpectation]:
        return [PolynomialExpectation(tuple(row)) for row in self._problem.exponents]

    def _sides(self, x: Array, t: float, spacing: float = FINE) -> tuple[Array, Array]:
        """Return log h and u* coordinate by coordinate, shape of x."""
        problem = self._problem
        growth = math.exp(-problem.rate * (problem.horizon - t))
        variance, half = problem.variance_left(t), self._counts[0]
        found = [np.empty_like(x), np.empty_like(x)]
        parts = np.s_[..., :half], np.s_[..., half:]
        for integral, part in zip(self._integrals, parts, strict=True):
            mean = growth * x[part]
            value, slope = integral(mean.ravel(), variance, spacing)
            found[0][part] = value.reshape(mean.shape)
            found[1][part] = growth * slope.reshape(mean.shape)
        return found[0], found[1]

    def value(self, x: Array, t: float) -> Array:
        return np.asarray(-self._sides(*self._at(x, t))[0].sum(axis=-1))

    def control(self, x: Array, t: float) -> Array:
        return self._sides(*self._at(x, t))[1]

    def _log_z(self, n_steps: Steps, spacing: float) -> float:
        """Return log E e^r of Gaussian X_T, or of the chain's X_N."""
        problem = self._problem
        variance = problem.variance_left(0.0)
        if n_steps is not None:
            variance = 0.0
            for h in np.diff(problem.time_grid(n_steps)):
                variance = (1.0 - h * problem.rate) ** 2 * variance + h
        origin = np.zeros(1)
        return sum(
            count * float(integral(origin, variance, spacing)[0][0])
            for count, integral in zip(self._counts, self._integrals, strict=True)
        )

    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        check_scheme(scheme)
        return self._log_z(n_steps, FINE)

    # The N-step optimum has no recursion that is smooth enough for the grid.
    optimal_cost = CertifiedTruth.optimal_cost
    control_error = CertifiedTruth.control_error
    discrete_control = CertifiedTruth.discrete_control

    def error_bound(
        self, quantity: str, theta: Any = None, n_steps: Steps = None
    ) -> float:
        """Return an absolute error bound: of a vector, of its norm.

        Parameters
        ----------
        quantity : "objective", "gradient", "log_normalizer", ..., or "value" for V
            wherever base paths go.
        n_steps : bound the answer of the N-step chain instead.
        """
        if quantity in ("log_normalizer", "optimal_cost"):
            gap = self._log_z(n_steps, FINE) - self._log_z(n_steps, COARSE)
            return abs(gap) + CertifiedTruth.error_bound(self, quantity)
        return super().error_bound(quantity, theta, n_steps)

    @cached_property
    def _value_bound(self) -> float:
        """How much a coarser sum changes V, and rounding."""
        problem = self._problem
        line = np.linspace(-5.0, 5.0, 61) * math.sqrt(problem.variance_left(0.0))
        x = np.repeat(line[:, None], problem.dim, axis=1)
        bound = 0.0
        for t in np.linspace(0.0, 0.98, 8) * problem.horizon:
            fine, coarse = (self._sides(x, t, s)[0] for s in (FINE, COARSE))
            bound = max(bound, float(np.abs(fine - coarse).sum(axis=1).max()))
        return bound + 1e-14 * problem.dim
