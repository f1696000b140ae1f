"""Ornstein-Uhlenbeck process with a quartic terminal cost: a cubic costate.

Base      dX = -rate X dt + u dt + dW,  X_0 ~ N(start_mean, start_scale^2), t in [0, T]
Reward    r(x) = -curvature x^4 / 4

Without control the costate phi(t, x) = E[E_t curvature X_T^3 | X_t = x] is cubic,

    phi(t, x) = curvature E_t ((E_t x)^3 + 3 q_t E_t x),
    E_t = e^{-rate (T - t)},  q_t = (1 - e^{-2 rate (T - t)}) / (2 rate),

and under an affine control X_t is Gaussian, so that J and its gradients are exact.
Source: the label-error study of time-reversed BSDEs, after Mei and Taghvaei 2026,
arXiv:2603.20455; its numbers belong to start_mean = 0.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.errors import ParameterError
from sdebench.quartic_problem import QuarticProblem


@dataclass(frozen=True, kw_only=True)
class CubicCostate(QuarticProblem):
    """Scalar Ornstein-Uhlenbeck process, quartic terminal cost.

    Parameters
    ----------
    curvature : c > 0 of the terminal cost c x^4 / 4.
    rate : of the mean reversion.
    start_mean, start_scale : of X_0; scale 0 is a point.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 40
    source: ClassVar[str] = "after Mei and Taghvaei 2026, arXiv:2603.20455"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= -\text{rate}\,X_t\,dt + u\,dt + dW_t, \quad
  X_0 \sim \mathcal{N}(\text{start mean}, \text{start scale}^2) \\
r(x) &= -\tfrac{1}{4}\,\text{curvature}\,x^4, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "The costate is a cubic of the state: its gradients are heavy in the tails, "
        "and a regression on affine functions misses it."
    )

    curvature: float = 1.0
    rate: float = 0.5
    start_mean: float = 0.3
    start_scale: float = 1.0
    horizon: float = 1.0

    def build(self) -> LinearQuadratic:
        if not self.curvature > 0:
            raise ParameterError(f"curvature {self.curvature} must be positive")
        if not self.start_scale >= 0:
            raise ParameterError(f"start_scale {self.start_scale} must be at least 0")
        one, zero = np.eye(1), np.zeros((1, 1))
        return LinearQuadratic(
            drift_matrix=-self.rate * one,
            drift_offset=np.zeros(1),
            diffusion=one,
            running=zero,
            reward_quadratic=zero,
            reward_linear=np.zeros(1),
            reward_constant=0.0,
            horizon=self.horizon,
            start_mean=np.full(1, self.start_mean),
            start_covariance=self.start_scale**2 * one,
            reward_quartic=np.full(1, self.curvature),
        )
