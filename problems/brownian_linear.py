"""Brownian motion with a linear reward: the optimal control is a constant.

Base      dX = sigma dW,  X_0 = 0,  t in [0, T]
Reward    r(x) = q (x_1 + ... + x_d)

    h(x, t) = exp(q sum x + d q^2 sigma^2 (T - t) / 2),   u* = sigma q (1, ..., 1)
    log Z   = d q^2 sigma^2 T / 2

The lean adjoint is the constant -q, so adjoint matching has no variance at all, and
importance weights under u* are constant for every number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.errors import ParameterError
from sdebench.linear_problem import LinearProblem


@dataclass(frozen=True, kw_only=True)
class BrownianLinear(LinearProblem):
    """Brownian motion, linear reward: constant optimal control.

    Parameters
    ----------
    dim : >= 1.
    slope : q, the reward's slope.
    sigma : noise level > 0.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 20
    source: ClassVar[str] = "elementary; Girsanov's theorem"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \sigma\,(u\,dt + dW_t), \quad X_0 = 0 \\
r(x) &= q \sum_i x_i, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "It is not: estimators that claim zero variance at the optimum must show it "
        "here exactly."
    )

    dim: int = 1
    slope: float = 1.0
    sigma: float = 1.0
    horizon: float = 1.0

    def build(self) -> LinearQuadratic:
        if self.dim < 1:
            raise ParameterError(f"dim {self.dim} must be at least 1")
        eye = np.eye(self.dim)
        return LinearQuadratic(
            drift_matrix=0.0 * eye,
            drift_offset=np.zeros(self.dim),
            diffusion=self.sigma * eye,
            running=0.0 * eye,
            reward_quadratic=0.0 * eye,
            reward_linear=np.full(self.dim, self.slope),
            reward_constant=0.0,
            horizon=self.horizon,
            start_mean=np.zeros(self.dim),
            start_covariance=0.0 * eye,
        )
