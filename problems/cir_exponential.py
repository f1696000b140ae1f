"""Square-root (Cox-Ingersoll-Ross) process tilted by an exponential.

Base      dX_i = rate (level - X_i) dt + xi root(X_i) (u_i dt + dW_i),  X_0 = start
Reward    r(x) = -tilt sum_i x_i

h(x, t) = exp(phi - psi sum_i x_i) with a scalar Riccati equation for psi, and
u* = -xi root(x) psi(t).  The control family is u_i = -xi root(x_i) psi(t) (theta_0 +
theta_1 s), s = 2 t / T - 1, theta* = (1, 0): the drift stays affine, and J and its
gradient are integrals over the mean of X_t, see `sdebench.closed_form.square_root`.
The defaults keep the process away from 0, where the derivative of the noise is
singular; the Euler-Maruyama chain has exact answers as long as it does not get there
(with the defaults from 3 steps on).

Source: Cox, Ingersoll and Ross 1985, 10.2307/1911242, bond price; Euler steps with
the noise truncated, Lord, Koekkoek and van Dijk 2010, 10.1080/14697680802392496.  The
control family is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from sdebench.closed_form.square_root import SquareRoot
from sdebench.pearson_problem import PearsonProblem
from sdebench.problem import Array, as_states
from sdebench.separable_problem import temporal_profiles


@dataclass(frozen=True, kw_only=True)
class CIRExponential(PearsonProblem):
    """Square-root process, linear reward: an affine model.

    Parameters
    ----------
    dim : >= 1.
    rate : > 0, of the mean reversion.
    level : > 0, mean of the stationary law.
    xi : > 0, noise at x = 1.
    tilt : > 0, slope of the cost.
    start : > 0, X_0.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = (
        "Cox, Ingersoll and Ross 1985, 10.2307/1911242; tilt and control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_{t,i} &= \text{rate} \left( \text{level} - X_{t,i} \right) dt
  + \xi \sqrt{X_{t,i}} \left( u_i\,dt + dW_{t,i} \right), \quad
  X_0 = \text{start} \\
r(x) &= -\text{tilt} \sum_i x_i, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "The noise is a square root of the state, with a derivative that is singular "
        "at zero, and the reward pushes towards it."
    )
    family_holds_optimum: ClassVar[bool] = True

    dim: int = 1
    rate: float = 1.0
    level: float = 2.0
    xi: float = 0.2
    tilt: float = 4.0
    start: float = 2.0
    horizon: float = 1.0

    @property
    def positive(self) -> tuple[str, ...]:
        return "rate", "level", "xi", "tilt", "start"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "control", "control_slope"

    @property
    def sigma(self) -> float:
        return self.xi

    @property
    def theta_star(self) -> Array:
        return np.array([1.0, 0.0])

    @property
    def drift_coefficients(self) -> tuple[float, float]:
        return self.rate * self.level, -self.rate

    @property
    def variance(self) -> tuple[float, float, float]:
        return 0.0, 1.0, 0.0

    def profiles(self, t: Array) -> Array:
        """Return -psi (1, s) at times t (...), (..., 2)."""
        psi = self.line.exponents(t)[1]
        return -psi[..., None] * temporal_profiles(t, self.horizon)

    def features(self, t: Array) -> Array:
        return self.xi * self.profiles(t).T[:, :, None]

    def reward(self, x: Array) -> Array:
        return np.asarray(-self.tilt * as_states(x, self.dim).sum(axis=-1))

    def reward_tables(self) -> dict[str, Array]:
        return {"reward": np.array([[0.0, -self.tilt]])}

    @cached_property
    def line(self) -> SquareRoot:
        """One coordinate."""
        return SquareRoot(
            rate=self.rate,
            level=self.level,
            noise=self.xi,
            tilt=self.tilt,
            start=self.start,
            horizon=self.horizon,
            profiles=self.profiles,
        )
