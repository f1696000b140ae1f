"""Damped oscillator with noise on both coordinates and a quadratic terminal cost.

Base      dX = A X dt + noise_level (u dt + dW),  A = [[0, 1], [-1, -damping]]
          X_0 ~ N(0, I),  t in [0, T];   reward r(x) = -|x|^2 / 2

Without control the costate is e^{A^T (T - t)} e^{A (T - t)} x at every noise level.
Source: the two-dimensional linear test of Mei and Taghvaei 2026, arXiv:2603.20455
(T = 2, dt = 0.05, noise levels 0.5 to 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.errors import ParameterError
from sdebench.linear_problem import LinearProblem


@dataclass(frozen=True, kw_only=True)
class DampedOscillator(LinearProblem):
    """Two-dimensional damped oscillator, quadratic reward, noise level free.

    Parameters
    ----------
    noise_level : > 0; published 0.5, 1, 2, 5.
    damping : friction coefficient.
    frequency : spring constant.
    horizon : T > 0.
    """

    default_steps: ClassVar[int] = 40
    source: ClassVar[str] = "Mei and Taghvaei 2026, arXiv:2603.20455, linear test"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= A X_t\,dt + \sigma\,(u\,dt + dW_t), \quad X_0 \sim \mathcal{N}(0, I) \\
A &= \begin{pmatrix} 0 & 1 \\ -\text{frequency} & -\text{damping} \end{pmatrix} \\
r(x) &= -\tfrac{1}{2} |x|^2, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Rotating dynamics: position and velocity exchange roles along the path, and "
        "the noise level scales the variance of every estimator."
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"noise_level": 5.0})

    noise_level: float = 1.0
    damping: float = 0.5
    frequency: float = 1.0
    horizon: float = 2.0

    def build(self) -> LinearQuadratic:
        if not self.noise_level > 0:
            raise ParameterError(
                f"noise_level {self.noise_level} must be positive: without noise "
                "there is no tilted law"
            )
        eye = np.eye(2)
        return LinearQuadratic(
            drift_matrix=np.array([[0.0, 1.0], [-self.frequency, -self.damping]]),
            drift_offset=np.zeros(2),
            diffusion=self.noise_level * eye,
            running=0.0 * eye,
            reward_quadratic=eye,
            reward_linear=np.zeros(2),
            reward_constant=0.0,
            horizon=self.horizon,
            start_mean=np.zeros(2),
            start_covariance=eye,
        )
