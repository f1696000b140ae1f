"""Ornstein-Uhlenbeck process with a linear cost (SOC Matching, "OU linear").

Base      dX = A X dt + sigma dW,  X_0 = 0,  t in [0, T]
Reward    r(x) = -omega (x_1 + ... + x_d)
          A = -I + spread xi,  sigma = I + spread xi',  xi, xi' standard normal matrices

    u*(x, t) = -sigma^T e^{A^T (T - t)} omega 1,   free of x

so the lean adjoint is deterministic: a zero-variance test of adjoint matching with
matrices that do not commute.
Source: Domingo-Enrich et al. 2023, arXiv:2312.02027, section 4; the paper's draws are
not published, ours are fixed by ``matrix_seed``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.closed_form.seeded import seeded_normals
from sdebench.errors import ParameterError
from sdebench.linear_problem import LinearProblem


@dataclass(frozen=True, kw_only=True)
class OULinear(LinearProblem):
    """Ornstein-Uhlenbeck process with dense matrices, linear reward.

    Parameters
    ----------
    dim : >= 1.
    spread : size of the random part of A and sigma, >= 0.
    omega : slope of the terminal cost.
    horizon : T > 0.
    matrix_seed : fixes the random matrices.
    """

    default_steps: ClassVar[int] = 100
    source: ClassVar[str] = "Domingo-Enrich et al. 2023, arXiv:2312.02027, OU linear"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= A X_t\,dt + \sigma\,(u\,dt + dW_t), \quad X_0 = 0 \\
A &= -I + \text{spread}\,\xi, \quad \sigma = I + \text{spread}\,\xi' \\
r(x) &= -\omega \sum_i x_i, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Dense, non-commuting drift and noise matrices: a transposed Jacobian or noise "
        "matrix shows at once."
    )

    dim: int = 10
    spread: float = 0.1
    omega: float = 1.0
    horizon: float = 1.0
    matrix_seed: int = 1

    def build(self) -> LinearQuadratic:
        if self.dim < 1 or self.matrix_seed < 0:
            raise ParameterError(
                f"dim {self.dim} must be at least 1 and matrix_seed "
                f"{self.matrix_seed} at least 0"
            )
        dim, eye = self.dim, np.eye(self.dim)
        xi = seeded_normals(self.matrix_seed, (2, dim, dim))
        return LinearQuadratic(
            drift_matrix=-eye + self.spread * xi[0],
            drift_offset=np.zeros(dim),
            diffusion=eye + self.spread * xi[1],
            running=0.0 * eye,
            reward_quadratic=0.0 * eye,
            reward_linear=np.full(dim, -self.omega),
            reward_constant=0.0,
            horizon=self.horizon,
            start_mean=np.zeros(dim),
            start_covariance=0.0 * eye,
        )
