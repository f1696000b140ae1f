"""What the mixture problems share: VP noising of a mixture, quadratic reward.

Data sum_k w_k N(m_k, variance I), alpha = exp(-rate (T - t) / 2), sigma^2 = rate
(memoryless), reward r(x) = -beta |x - target|^2 / 2; control family u_theta with
features (x_1, ..., x_d, -|x|^2 / 2), theta* = beta (target, 1).  The tilt of a mixture
is a mixture, so h = Z p*_t / p_t and u* = sigma (grad log p*_t - grad log p_t).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.base_process import MemorylessBase
from sdebench.closed_form.log_quadratics import Array, gaussian_parameters
from sdebench.closed_form.schedule import VariancePreserving
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.errors import ParameterError, unknown
from sdebench.tilting_problem import TiltingProblem


@dataclass(frozen=True, kw_only=True)
class TiltedMixture(TiltingProblem):
    """A mixture of isotropic Gaussians tilted towards a target point."""

    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \sigma^2 \left( \tfrac{1}{2} X_t + \nabla \log p_t(X_t) \right) dt
  + \sigma\,(u\,dt + dW_t), \quad \sigma^2 = \text{rate} \\
p_T(x) &= \sum_k w_k\,\mathcal{N}(x; m_k, \text{variance}\,I) \\
r(x) &= -\tfrac{1}{2} \beta\,|x - \text{target}|^2, \quad f = 0
\end{aligned}"""

    beta: float = 0.25
    variance: float = 1.0
    rate: float = 4.0
    horizon: float = 1.0
    start: str = "marginal"

    @abstractmethod
    def modes(self) -> tuple[Array, Array, Array]:
        """Return weights (K,), means (K, d) and the target (d,)."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return (*(f"linear_{i + 1}" for i in range(self.dim)), "quadratic")

    def build(self) -> TiltingFamily:
        if not self.variance > 0:
            raise ParameterError(f"variance {self.variance} must be positive")
        weights, means, target = self.modes()
        count, dim = means.shape
        base = MemorylessBase(
            VariancePreserving(self.horizon, self.rate),
            np.log(weights),
            means,
            np.full((count, dim), self.variance),
        )
        features = np.zeros((dim + 1, 2 * dim + 1))
        features[:dim, :dim] = np.eye(dim)
        features[dim, dim:-1] = -0.5
        if self.start == "marginal":
            masses, centres, variances = gaussian_parameters(base.marginal(0.0))
            start = StartLaw(np.exp(masses), centres, np.sqrt(variances))
        elif self.start == "normal":
            start = StartLaw(np.ones(1), np.zeros((1, dim)), np.ones((1, dim)))
        else:
            raise unknown("start", self.start, ("marginal", "normal"))
        return TiltingFamily(
            base=base,
            features=features,
            reference=np.zeros((1, 2 * dim + 1)),
            constant=-0.5 * self.beta * float(target @ target),
            theta_star=self.beta * np.append(target, 1.0),
            start=start,
            start_is_marginal=self.start == "marginal",
        )
