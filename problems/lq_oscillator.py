"""Oscillator with noise and control on the velocity alone, quadratic costs.

Base      dX = A X dt + B (u dt + dW),  A = [[0, 1], [-1, -damping]],  B = (0, 1)^T
          X_0 ~ N(0, I),  t in [0, T]
Costs     running |x|^2 / 2, reward r(x) = -|x|^2 / 2

The noise reaches the position only through the velocity (hypoelliptic).  With
-G' = A^T G + G A - G B B^T G + I, G(T) = I, the optimal control is -B^T G x, and
G(0) = [[1.8149, 0.4114], [0.4114, 1.2523]]; under a frozen policy u = -K x the costate
is G x with -G' = A^T G + G (A - B K) + I, see
`sdebench.closed_form.linear_quadratic.LinearQuadratic.frozen_costate`.
Source: the linear-quadratic study of Mei and Taghvaei 2024, arXiv:2410.04615
(T = 4, dt = 0.02).
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
class LQOscillator(LinearProblem):
    """Damped oscillator, noise and control on the velocity, running cost.

    Parameters
    ----------
    noise_level : > 0.
    damping : friction coefficient.
    horizon : T > 0.
    initial_law : whether theta holds mean and covariance of X_0 as well; J then gains
        their relative entropy to N(0, I), and J(theta*) = -log Z.
    """

    default_steps: ClassVar[int] = 200
    source: ClassVar[str] = "Mei and Taghvaei 2024, arXiv:2410.04615, LQ study"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= A X_t\,dt + \sigma\,(u\,dt + dW_t), \quad X_0 \sim \mathcal{N}(0, I) \\
A &= \begin{pmatrix} 0 & 1 \\ -1 & -\text{damping} \end{pmatrix}, \quad
  \sigma = \text{noise level} \begin{pmatrix} 0 & 0 \\ 0 & 1 \end{pmatrix} \\
f(x) &= \tfrac{1}{2} |x|^2, \quad r(x) = -\tfrac{1}{2} |x|^2
\end{aligned}"""
    hardness: ClassVar[str] = (
        "A singular noise matrix: densities of one step do not exist, and the control "
        "moves the position only by way of the velocity."
    )

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"initial_law": True})

    noise_level: float = 1.0
    damping: float = 0.1
    horizon: float = 4.0
    initial_law: bool = False

    def build(self) -> LinearQuadratic:
        if not self.noise_level > 0:
            raise ParameterError(
                f"noise_level {self.noise_level} must be positive: without noise "
                "there is no tilted law"
            )
        eye = np.eye(2)
        return LinearQuadratic(
            drift_matrix=np.array([[0.0, 1.0], [-1.0, -self.damping]]),
            drift_offset=np.zeros(2),
            diffusion=self.noise_level * np.diag([0.0, 1.0]),
            running=eye,
            reward_quadratic=eye,
            reward_linear=np.zeros(2),
            reward_constant=0.0,
            horizon=self.horizon,
            start_mean=np.zeros(2),
            start_covariance=eye,
        )
