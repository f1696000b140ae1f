"""Geometric Brownian motion tilted by a power.

Base      dX_i = growth X_i dt + sigma X_i (u_i dt + dW_i),  X_0 = start,  t in [0, T]
Reward    r(x) = power sum_i log |x_i|

h(x, t) = prod x_i^power times a function of time, so that u* = sigma power is constant:
Merton's problem in the risk-sensitive form.  The noise depends on the state, and the
Euler-Maruyama chain has an exact objective and gradient all the same: see
`sdebench.closed_form.geometric`.  The control family is u_i = theta_0 + theta_1 s,
s = 2 t / T - 1.

Source: Merton 1969, 10.2307/1926560 (log-normal model, power utility); a Pearson
diffusion of Forman and Sorensen 2008, 10.1111/j.1467-9469.2007.00592.x.  The form as a
control problem with quadratic cost is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from sdebench.closed_form.geometric import Geometric
from sdebench.pearson_problem import PearsonProblem
from sdebench.problem import Array, as_states
from sdebench.separable_problem import temporal_profiles


@dataclass(frozen=True, kw_only=True)
class GeometricBrownianPower(PearsonProblem):
    """Geometric Brownian motion, logarithm of a power as reward.

    Parameters
    ----------
    dim : >= 1.
    growth : of the mean without control.
    volatility : > 0, the noise per unit of the state.
    power : > 0, exponent of the tilt.
    start : > 0, X_0.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = (
        "after Merton 1969, 10.2307/1926560; the form with quadratic control cost is "
        "ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_{t,i} &= \text{growth}\,X_{t,i}\,dt
  + \text{volatility}\,X_{t,i} \left( u_i\,dt + dW_{t,i} \right), \quad
  X_0 = \text{start} \\
r(x) &= \text{power} \sum_i \log |x_i|, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "The noise grows with the state: the derivative of a step holds that of the "
        "noise, and an adjoint without it is wrong."
    )
    family_holds_optimum: ClassVar[bool] = True
    control_power: ClassVar[int] = 0

    dim: int = 1
    growth: float = 0.1
    volatility: float = 0.4
    power: float = 3.0
    start: float = 1.0
    horizon: float = 1.0

    @property
    def positive(self) -> tuple[str, ...]:
        return "volatility", "power", "start"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "control", "control_slope"

    @property
    def sigma(self) -> float:
        return self.volatility

    @property
    def theta_star(self) -> Array:
        return np.array([self.volatility * self.power, 0.0])

    @property
    def drift_coefficients(self) -> tuple[float, float]:
        return 0.0, self.growth

    @property
    def variance(self) -> tuple[float, float, float]:
        return 0.0, 0.0, 1.0

    def features(self, t: Array) -> Array:
        return temporal_profiles(t, self.horizon).T[:, :, None]

    def reward(self, x: Array) -> Array:
        states = as_states(x, self.dim)
        return np.asarray(self.power * np.log(np.abs(states)).sum(axis=-1))

    def reward_tables(self) -> dict[str, Array]:
        return {
            "reward_factor": np.array([[0.0, 0.0, 1.0]]),
            "reward_power": np.array([0.5 * self.power]),
        }

    @cached_property
    def line(self) -> Geometric:
        """One coordinate."""
        return Geometric(
            growth=self.growth,
            noise=self.volatility,
            power=self.power,
            start=self.start,
            horizon=self.horizon,
            profiles=lambda t: temporal_profiles(t, self.horizon),
            gram=self.horizon * np.diag([1.0, 1.0 / 3.0]),
            total=self.horizon * np.array([1.0, 0.0]),
        )
