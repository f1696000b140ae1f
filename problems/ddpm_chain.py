"""Linear-Gaussian denoising chain, the setting of the likelihood-ratio analysis.

Chain     X_{n+1} = factor X_n + noise_level (w_n + z_n),  X_0 = start,  n < n_steps
Reward    r(x) = -curvature |x|^2

It is the Euler-Maruyama chain with steps of length 1 of the process

    dX = (factor - 1) X dt + noise_level (u dt + dW),  t in [0, n_steps],

which is what the continuous answers belong to; with steps so long they are far from
those of the chain.  The parameter ``state`` subtracts noise_level theta from the
factor, so that at theta = 0 the derivative of E|X_N|^2 with respect to the factor is
that of -E r with respect to theta, divided by -curvature noise_level.
Source: the setting of the RLR optimizer, arXiv:2502.00639; the numbers of the chain
with 4 steps are re-derived.
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
class DDPMChain(LinearProblem):
    """Linear-Gaussian denoising chain with a quadratic reward.

    Parameters
    ----------
    dim : >= 1.
    n_steps : number of denoising steps, >= 1; the horizon.
    factor : of the state in every step.
    noise_level : > 0.
    start : every coordinate of X_0.
    curvature : of the reward.
    """

    source: ClassVar[str] = "arXiv:2502.00639, RLR optimizer, linear chain"
    formula: ClassVar[str] = r"""\begin{aligned}
X_{n+1} &= \text{factor}\,X_n + \sigma\,(w_n + z_n), \quad X_0 = \text{start} \\
r(x) &= -\text{curvature}\,|x|^2, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Few long steps: every step carries a large share of the gradient, so that an "
        "estimator that leaves one out or counts one twice is far off."
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"n_steps": 20})

    dim: int = 1
    n_steps: int = 4
    factor: float = 0.9
    noise_level: float = 0.7
    start: float = 1.2
    curvature: float = 1.0

    @property
    def default_steps(self) -> int:  # type: ignore[override]
        """The number of steps of length 1."""
        return self.n_steps

    def build(self) -> LinearQuadratic:
        if self.dim < 1 or self.n_steps < 1:
            raise ParameterError(
                f"dim {self.dim} and n_steps {self.n_steps} must be at least 1"
            )
        if not self.noise_level > 0:
            raise ParameterError(
                f"noise_level {self.noise_level} must be positive: without noise "
                "there is no tilted law"
            )
        eye = np.eye(self.dim)
        return LinearQuadratic(
            drift_matrix=(self.factor - 1.0) * eye,
            drift_offset=np.zeros(self.dim),
            diffusion=self.noise_level * eye,
            running=0.0 * eye,
            reward_quadratic=2.0 * self.curvature * eye,
            reward_linear=np.zeros(self.dim),
            reward_constant=0.0,
            horizon=float(self.n_steps),
            start_mean=np.full(self.dim, self.start),
            start_covariance=0.0 * eye,
        )
