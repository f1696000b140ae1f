"""A value function chosen in advance, in 100 dimensions: a sine of |x|^2 and time.

Base      dX = u dt + dW,  X_0 = 0,  t in [0, T],  d = 100
Value     V(x, t) = amplitude psi(T - t + |x|^2),  psi(q) = sin(q^power)
Costs     r = -V(., T), and f from the Hamilton-Jacobi-Bellman equation,
          f = -V_t - 1/2 Laplacian V + 1/2 |grad V|^2

With q = T - t + |x|^2 and a = amplitude,

    f = a (1 - d) psi' - 2 a |x|^2 psi'' + 2 a^2 |x|^2 psi'^2,   u* = -2 a psi' x.

With a = -2 this is the equation with quadratically growing derivatives of the
literature, y_t + |grad y|^2 + 1/2 Laplacian y = the same of psi, for y = -V / 2.  The
control family is u_theta = -(theta_0 + theta_1 s) x, s = 2 t / T - 1.

Source: E, Han and Jentzen 2017, arXiv:1706.04702, section 4.4, after Gobet and
Turkedjiev 2016, 10.1090/mcom/3013; the control family is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.radial import RadialProcess
from sdebench.errors import ParameterError
from sdebench.problem import Array
from sdebench.radial_problem import RadialProblem
from sdebench.simulate.tables import TINY


@dataclass(frozen=True, kw_only=True)
class ManufacturedSine(RadialProblem):
    """Known value function in 100 dimensions, cost from its equation.

    Parameters
    ----------
    amplitude : of V, not 0.
    power : in (0, 1].
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 400
    source: ClassVar[str] = (
        "E, Han and Jentzen 2017, arXiv:1706.04702, quadratically growing derivatives; "
        "control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= u\,dt + dW_t, \quad X_0 = 0, \quad d = 100 \\
V(x, t) &= a \sin \left( (T - t + |x|^2)^{\text{power}} \right), \quad
  a = \text{amplitude} \\
r(x) &= -V(x, T), \quad
  f = -\partial_t V - \tfrac{1}{2} \Delta V + \tfrac{1}{2} |\nabla V|^2
\end{aligned}"""
    hardness: ClassVar[str] = (
        "The running cost is hundreds of times its own value function and cancels "
        "along the path: most of the noise is in costs that no control can change."
    )

    dim: ClassVar[int] = 100
    amplitude: float = -2.0
    power: float = 0.4
    horizon: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.power <= 1.0:
            raise ParameterError(f"power {self.power} must be in (0, 1]")
        if self.amplitude == 0.0:
            raise ParameterError("amplitude 0 leaves nothing to control; give another")

    @property
    def sigma(self) -> float:
        return 1.0

    def _slopes(self, q: Array) -> tuple[Array, Array, Array]:
        """Return psi', psi'' and psi'''."""
        height = q**self.power
        first = self.power * height / q
        second = (self.power - 1.0) * first / q
        third = (self.power - 2.0) * second / q
        sine, cosine = np.sin(height), np.cos(height)
        return (
            first * cosine,
            second * cosine - first**2 * sine,
            (third - first**3) * cosine - 3.0 * first * second * sine,
        )

    def _coefficients(self) -> tuple[float, float, float]:
        """Return those of psi', s psi'' and s psi'^2 in f."""
        a = self.amplitude
        return a * (1.0 - self.dim), -2.0 * a, 2.0 * a**2

    def _cost(self, s: Array, t: Array) -> Array:
        first, second, _ = self._slopes(self.horizon - t + s + TINY)
        a, b, c = self._coefficients()
        return a * first + s * (b * second + c * first**2)

    def _cost_slope(self, s: Array, t: Array) -> Array:
        first, second, third = self._slopes(self.horizon - t + s + TINY)
        a, b, c = self._coefficients()
        inner = b * second + c * first**2
        return a * second + inner + s * (b * third + 2.0 * c * first * second)

    @property
    def process(self) -> RadialProcess:
        a, power = self.amplitude, self.power
        return RadialProcess(
            dim=self.dim,
            noise_level=1.0,
            horizon=self.horizon,
            profiles=self.profiles,
            running=(self._cost, self._cost_slope),
            cost=(
                lambda s: a * np.sin(s**power),
                lambda s: a * self._slopes(s + TINY)[0],
            ),
        )

    def value_and_slope(self, s: Array, t: float) -> tuple[Array, Array]:
        q = self.horizon - t + s
        value = self.amplitude * np.sin(q**self.power)
        return value, self.amplitude * self._slopes(q + TINY)[0]

    def other_tables(self, times: Array) -> dict[str, Array]:
        costs = np.diff(times)[:, None] * np.array(self._coefficients())
        return {
            "wave": np.column_stack([self.horizon - times[:-1], costs]),
            "reward_wave": np.array([-self.amplitude]),
            "wave_power": np.array([self.power]),
        }
