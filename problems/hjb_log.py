"""Brownian motion in many dimensions with a logarithmic terminal cost.

Base      dX = root(2) (u dt + dW),  X_0 = 0,  t in [0, T]
Reward    r(x) = -ln((1 + |x|^2) / 2)

    V_t + Laplacian V - |grad V|^2 = 0,   V(x, T) = ln((1 + |x|^2) / 2),

the Hamilton-Jacobi-Bellman test of deep solvers of backward stochastic differential
equations, in their scaling: V(0, 0) = 4.59016172 at d = 100.  One quadrature gives V
for any d, see `sdebench.closed_form.radial.log_mean_reciprocal`.  The control family is
u_theta = -(theta_0 + theta_1 s) x, s = 2 t / T - 1.

Source: E, Han and Jentzen 2017, arXiv:1706.04702, section 4.3 (lambda = 1); the control
family is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.radial import RadialProcess, log_mean_reciprocal
from sdebench.problem import Array
from sdebench.radial_problem import RadialProblem

LOG_2 = float(np.log(2.0))


@dataclass(frozen=True, kw_only=True)
class HJBLog(RadialProblem):
    """Brownian motion in 100 dimensions, logarithmic terminal cost.

    Parameters
    ----------
    dim : >= 1.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 20
    source: ClassVar[str] = (
        "E, Han and Jentzen 2017, arXiv:1706.04702, Hamilton-Jacobi-Bellman equation; "
        "control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \sqrt{2}\,(u\,dt + dW_t), \quad X_0 = 0 \\
r(x) &= -\ln \tfrac{1}{2} (1 + |x|^2), \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "A hundred dimensions: |X_T| concentrates, and each coordinate's share in the "
        "reward is of size 1/d."
    )

    dim: int = 100
    horizon: float = 1.0

    @property
    def sigma(self) -> float:
        return float(np.sqrt(2.0))

    @property
    def process(self) -> RadialProcess:
        return RadialProcess(
            dim=self.dim,
            noise_level=self.sigma,
            horizon=self.horizon,
            profiles=self.profiles,
            running=None,
            cost=(lambda s: np.log1p(s) - LOG_2, lambda s: 1.0 / (1.0 + s)),
        )

    def value_and_slope(self, s: Array, t: float) -> tuple[Array, Array]:
        variance = 2.0 * (self.horizon - t)
        level, slope = log_mean_reciprocal(s, variance, self.dim)
        return -level - LOG_2, -slope

    def other_tables(self, times: Array) -> dict[str, Array]:
        constant = np.zeros((self.dim, 1))
        constant[0] = LOG_2
        return {
            "reward": constant,
            "reward_log": np.ones(1),
        }
