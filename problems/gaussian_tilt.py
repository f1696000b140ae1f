"""Gaussian data, quadratic reward: every schedule, memoryless or not.

Data N(mean 1, variance I), schedule (alpha, beta), reward
r(x) = slope sum x - curvature |x|^2 / 2; control family u_theta with features
(sum x, -|x|^2 / 2), theta* = (slope, curvature).  With q = alpha^2 variance + beta^2,

    X_T | X_t = x ~ N(Phi x + ..., S),   memoryless: Phi = alpha variance / q

and all is Gaussian: u*, V, log Z, J, and the N-step chain are exact.  With noise =
"constant" the start and the end of the base are correlated, so that X_T under u* is
not the tilted law: on the linear flow with mean 0 and variance 1 a linear reward is
realized only to 1 - exp(-pi noise_level^2 / 2) (the initial-value bias).
Source: Domingo-Enrich et al. 2024, arXiv:2409.08861 (memoryless noise); closed forms
re-derived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sdebench.closed_form.base_process import (
    BaseProcess,
    ConstantNoiseBase,
    MemorylessBase,
)
from sdebench.closed_form.log_quadratics import gaussian_parameters
from sdebench.closed_form.schedule import make_schedule
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.errors import ParameterError, unknown
from sdebench.tilting_problem import TiltingProblem


@dataclass(frozen=True, kw_only=True)
class GaussianTilt(TiltingProblem):
    """Gaussian base and quadratic reward, any schedule, memoryless or constant noise.

    Parameters
    ----------
    dim : >= 1.
    schedule : "vp", "linear_flow", "cosine" or "ve".
    rate : rate of "vp", noise scale of "ve".
    noise : "memoryless" (sigma^2 = 2 eta) or "constant" (sigma = noise_level).
    noise_level : > 0, used by noise = "constant".
    mean, variance : of the data, variance > 0.
    slope, curvature : of the reward; 1/variance + curvature must be positive.
    horizon : T > 0.
    start_time : in [0, T); > 0 for memoryless "linear_flow" and "cosine".
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = "Domingo-Enrich et al. 2024, arXiv:2409.08861, section 4"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \left( \kappa_t X_t + \left( \tfrac{1}{2} \sigma_t^2 + \eta_t \right)
  \nabla \log p_t(X_t) \right) dt + \sigma_t\,(u\,dt + dW_t) \\
\kappa_t &= \frac{\dot\alpha_t}{\alpha_t}, \quad
  \eta_t = \beta_t (\kappa_t \beta_t - \dot\beta_t), \quad
  p_T = \mathcal{N}(\text{mean}, \text{variance}\,I) \\
r(x) &= \text{slope} \sum_i x_i - \tfrac{1}{2}\,\text{curvature}\,|x|^2,
  \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Constant noise keeps a memory of the start: the optimal control then misses "
        "the tilted law by an amount known exactly."
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"schedule": "linear_flow", "start_time": 0.05},
        {"schedule": "linear_flow", "noise": "constant"},
    )

    dim: int = 1
    schedule: str = "vp"
    rate: float = 6.0
    noise: str = "memoryless"
    noise_level: float = 1.0
    mean: float = 0.0
    variance: float = 0.5
    slope: float = 1.0
    curvature: float = 1.0
    horizon: float = 1.0
    start_time: float = 0.0

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "linear", "quadratic"

    def _base(self) -> BaseProcess:
        schedule = make_schedule(self.schedule, self.horizon, self.rate)
        mean = np.full(self.dim, self.mean)
        if self.noise == "constant":
            return ConstantNoiseBase(
                schedule, mean, self.variance, self.noise_level, self.start_time
            )
        if self.noise != "memoryless":
            raise unknown("noise", self.noise, ("memoryless", "constant"))
        variances = np.full((1, self.dim), self.variance)
        return MemorylessBase(
            schedule, np.zeros(1), mean[None], variances, self.start_time
        )

    def build(self) -> TiltingFamily:
        if self.dim < 1:
            raise ParameterError(f"dim {self.dim} must be at least 1")
        if not self.variance > 0:
            raise ParameterError(f"variance {self.variance} must be positive")
        base, dim = self._base(), self.dim
        features = np.zeros((2, 2 * dim + 1))
        features[0, :dim] = 1.0
        features[1, dim:-1] = -0.5
        _, means, variances = gaussian_parameters(base.marginal(base.start_time))
        return TiltingFamily(
            base=base,
            features=features,
            reference=np.zeros((1, 2 * dim + 1)),
            constant=0.0,
            theta_star=np.array([self.slope, self.curvature]),
            start=StartLaw(np.ones(1), means, np.sqrt(variances)),
            start_is_marginal=True,
        )
