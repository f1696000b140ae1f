"""Independent double wells from the top of their barriers.

Base      dX = -grad psi(X) dt + u dt + dW,  X_0 = 0,  t in [0, T]
          psi(x) = barrier sum_i ((x_i / well)^2 - 1)^2
Reward    r(x) = -sum_i nu_i ((x_i / well)^2 - 1)^2,  nu_i = ``heavy`` for the first
          three tenths of the coordinates (rounded up) and ``light`` for the others
Control   u_i = -(theta_a y_i + theta_b y_i^3),  y = x / well; two parameters for the
          heavy and two for the light coordinates

Beyond |x_i| = 2 well force, control and cost are constant: paths get there with
probability below 1e-16 in continuous time, and without it the moments of the
Euler-Maruyama chain would not exist in the limit of small steps (Hutzenthaler, Jentzen
and Kloeden 2011).

The published setting is ``double_well:well=1,barrier=5`` with 200 steps; its force is
so stiff (rate 40 in the wells) that fewer than about 80 steps are unstable, and u* is
zero until shortly before the end, so that this family, which is constant in time, does
best with almost no control there.  The default has half the barrier and, by Brownian
scaling, a quarter of the horizon: rate 5 in the wells, stable from about 4 steps.

Source: Domingo-Enrich et al. 2023, arXiv:2312.02027, double well (d = 10, kappa = 5,
nu = 3 or 1); the control family is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from sdebench.errors import ParameterError
from sdebench.problem import Array
from sdebench.product_problem import Kind, ProductProblem, best_parameters

OPTIMUM = (-2.10144409813217, 2.09431368192667, -0.877347460575665, 0.8680814753445707)
"""theta* of the default parameters: what `product_problem.best_parameters` finds."""
REACH = 2.0
"""Where forces become constant, in units of ``well``."""
SMALLEST = 27.0
"""V is trusted where exp(-psi - g) is above exp(-27) = 2e-12: see `Value`."""


@dataclass(frozen=True, kw_only=True)
class DoubleWell(ProductProblem):
    """Double wells in every coordinate, started on the barrier; a quartic cost.

    Parameters
    ----------
    dim : >= 1.
    well : > 0, distance of the wells from the barrier.
    barrier : > 0, height of the barrier in psi.
    heavy, light : >= 0, weight of the terminal cost in the first 3/10 of the
        coordinates, rounded up, and in the others.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 200
    source: ClassVar[str] = (
        "Domingo-Enrich et al. 2023, arXiv:2312.02027, double well; wider wells and "
        "the control family are ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= -\nabla \psi(X_t)\,dt + u\,dt + dW_t, \quad X_0 = 0 \\
\psi(x) &= \text{barrier} \sum_i \left( (x_i / \text{well})^2 - 1 \right)^2 \\
r(x) &= -\sum_i \nu_i \left( (x_i / \text{well})^2 - 1 \right)^2, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Paths fall into one of 2^d wells: near the barrier they separate "
        "exponentially, and with them adjoints and weights."
    )

    dim: int = 10
    well: float = 2.0
    barrier: float = 2.5
    heavy: float = 3.0
    light: float = 1.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ParameterError(f"dim {self.dim} must be at least 1")
        for name in ("well", "barrier", "horizon"):
            if not getattr(self, name) > 0:
                raise ParameterError(f"{name} {getattr(self, name)} must be positive")
        for name in ("heavy", "light"):
            if not getattr(self, name) >= 0:
                raise ParameterError(f"{name} {getattr(self, name)} must be at least 0")

    @property
    def parameter_names(self) -> tuple[str, ...]:
        names = ("heavy_linear", "heavy_cubic", "light_linear", "light_cubic")
        return names[: 2 * len(self.kinds)]

    @property
    def theta_star(self) -> Array:
        if replace(self, dim=DoubleWell.dim) == DoubleWell():
            return np.array(OPTIMUM[: self.n_params])
        return best_parameters(self)

    @property
    def end_time(self) -> float:
        return self.horizon

    @property
    def reach(self) -> float:
        return REACH * self.well

    @property
    def trusted(self) -> float:
        top = self.barrier + max(self.heavy, self.light)
        return self.well * min(math.sqrt(1.0 + math.sqrt(SMALLEST / top)), 0.95 * REACH)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        first = math.ceil(0.3 * self.dim - 1e-9)
        counts = [(self.heavy, first), (self.light, self.dim - first)]
        counts = [pair for pair in counts if pair[1]]
        a = self.well
        square = np.array([1.0, 0.0, -2.0 / a**2, 0.0, 1.0 / a**4])
        force = -self.barrier * square[1:] * np.arange(1, 5)
        found = []
        for k, (weight, count) in enumerate(counts):
            features = np.zeros((2 * len(counts), 4))
            features[2 * k, 1] = -1.0 / a
            features[2 * k + 1, 3] = -1.0 / a**3
            found.append(Kind(force, features, weight * square, count))
        return tuple(found)
