"""Jacobi (Wright-Fisher) diffusion on the unit interval, tilted by a polynomial.

Base      dX_i = rate (level - X_i) dt + sigma root(X_i (1 - X_i)) (u_i dt + dW_i),
          X_0 = start in (0, 1),  t in [0, T]
Reward    r(x) = sum_i log p(x_i),  p(x) = floor + (x - valley)^2

The generator maps polynomials of degree two to themselves, so that h(., t) is a product
of quadratic polynomials and u* = sigma root(x (1 - x)) h' / h.  The control family is
u_i = 2 root(x_i (1 - x_i)) (theta_0 + theta_1 (2 x_i - 1)): the noise times the
gradient of a potential; it does not hold u*.  J and its gradients are expansions in
Jacobi polynomials with an error bound, see `sdebench.closed_form.jacobi`.  The
Euler-Maruyama chain, whose noise ends where the state leaves [0, 1], has no exact
answers.

Source: Pearson diffusions, Forman and Sorensen 2008, 10.1111/j.1467-9469.2007.00592.x;
polynomial h after Filipovic and Larsson 2016, 10.1007/s00780-016-0304-4.  Tilt and
control family are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.polynomial import polynomial

from sdebench.certified_truth import best_in_family
from sdebench.closed_form.jacobi import Jacobi
from sdebench.errors import ParameterError
from sdebench.pearson_problem import PearsonProblem
from sdebench.problem import Array, as_states

FEATURES = np.array([[2.0, 0.0], [-2.0, 4.0]])
"""Coefficients of du/dtheta, without root(x (1 - x))."""
OPTIMUM = (0.8273050382712389, 0.5214519243291873)
"""theta* of the default parameters, of any dim."""


@dataclass(frozen=True, kw_only=True)
class JacobiPolynomial(PearsonProblem):
    """Jacobi diffusion, logarithm of a quadratic polynomial as reward.

    Parameters
    ----------
    dim : >= 1.
    rate : > 0, of the mean reversion.
    level : in (0, 1), mean of the stationary law.
    noise_level : > 0, sigma.
    floor : > 0, least value of the polynomial.
    valley : where the polynomial is least.
    start : in (0, 1), X_0.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 100
    source: ClassVar[str] = (
        "after Filipovic and Larsson 2016, 10.1007/s00780-016-0304-4; tilt and control "
        "family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_{t,i} &= \text{rate} \left( \text{level} - X_{t,i} \right) dt
  + \sigma \sqrt{X_{t,i} (1 - X_{t,i})} \left( u_i\,dt + dW_{t,i} \right), \quad
  X_0 = \text{start} \\
r(x) &= \sum_i \log \left( \text{floor} + (x_i - \text{valley})^2 \right), \quad
  f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "The state lives in an interval, at whose ends the noise vanishes and its "
        "derivative is singular; it starts in a valley of the reward."
    )

    dim: int = 1
    rate: float = 2.0
    level: float = 0.5
    noise_level: float = 0.6
    floor: float = 0.01
    valley: float = 0.3
    start: float = 0.3
    horizon: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("level", "start"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ParameterError(f"{name} {getattr(self, name)} must be in (0, 1)")

    @property
    def positive(self) -> tuple[str, ...]:
        return "rate", "noise_level", "floor"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "push", "push_slope"

    @property
    def sigma(self) -> float:
        return self.noise_level

    @cached_property
    def theta_star(self) -> Array:
        """The minimizer of J in the family, one for all coordinates."""
        if replace(self, dim=JacobiPolynomial.dim) == JacobiPolynomial():
            return np.array(OPTIMUM)
        return best_in_family(replace(self, dim=1))

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Of the polynomial p, lowest power first."""
        return self.floor + self.valley**2, -2.0 * self.valley, 1.0

    @property
    def drift_coefficients(self) -> tuple[float, float]:
        return self.rate * self.level, -self.rate

    @property
    def variance(self) -> tuple[float, float, float]:
        return 0.0, 1.0, -1.0

    def features(self, t: Array) -> Array:
        return np.repeat(FEATURES[:, None, :], len(t), axis=1)

    def reward(self, x: Array) -> Array:
        values = polynomial.polyval(as_states(x, self.dim), self.coefficients)
        return np.asarray(np.log(values).sum(axis=-1))

    def reward_tables(self) -> dict[str, Array]:
        return {"reward_factor": np.array([self.coefficients])}

    @cached_property
    def line(self) -> Jacobi:
        """One coordinate."""
        return Jacobi(
            rate=self.rate,
            level=self.level,
            noise=self.noise_level,
            coefficients=np.array(self.coefficients),
            start=self.start,
            horizon=self.horizon,
            features=FEATURES / self.noise_level,
        )
