"""What the three quadratic Ornstein-Uhlenbeck settings of SOC Matching share.

Base      dX = a X dt + dW,  X_0 ~ N(0, start_scale^2 I),  t in [0, T]
Costs     running p |x|^2, terminal q |x|^2 (no factor 1/2)

    V = F(t) |x|^2 + d int_t^T F,   u* = -2 F(t) x,   F' = -2 a F + 2 F^2 - p,  F(T) = q

and for q = a/2, as published, F = a/2 + (k/2) tanh(k (T - t)), k = sqrt(a^2 + 2 p).
Source: Domingo-Enrich et al. 2023, arXiv:2312.02027, section 4 and its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.errors import ParameterError
from sdebench.linear_problem import LinearProblem


@dataclass(frozen=True, kw_only=True)
class OUQuadratic(LinearProblem):
    """Ornstein-Uhlenbeck process with quadratic costs."""

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = "Domingo-Enrich et al. 2023, arXiv:2312.02027, OU quadratic"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= a X_t\,dt + u\,dt + dW_t, \quad X_0 \sim \mathcal{N}(0, s^2 I) \\
f(x) &= p\,|x|^2, \quad r(x) = -q\,|x|^2
\end{aligned}"""

    dim: int = 20
    rate: float = 1.0
    state_cost: float = 0.0
    terminal_cost: float = 0.5
    start_scale: float = 0.5
    horizon: float = 1.0

    def build(self) -> LinearQuadratic:
        if self.dim < 1 or self.start_scale < 0:
            raise ParameterError(
                f"dim {self.dim} must be at least 1 and start_scale "
                f"{self.start_scale} at least 0"
            )
        eye = np.eye(self.dim)
        return LinearQuadratic(
            drift_matrix=self.rate * eye,
            drift_offset=np.zeros(self.dim),
            diffusion=eye,
            running=2.0 * self.state_cost * eye,
            reward_quadratic=2.0 * self.terminal_cost * eye,
            reward_linear=np.zeros(self.dim),
            reward_constant=0.0,
            horizon=self.horizon,
            start_mean=np.zeros(self.dim),
            start_covariance=self.start_scale**2 * eye,
        )
