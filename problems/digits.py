"""Handwritten digits: real images as the means of a mixture, exact denoiser.

Data      sum_k N(x_k, variance I) / n_images, x_k the first images of scikit-learn's
          digits, d = 64, grey levels in [-1, 1]
Base      linear flow (alpha = t, beta = 1 - t) with memoryless noise from
          ``start_time``; the denoiser E[X_T | X_t = x] is a softmax over all images
Reward    r(x) = 8 ink mean(x) + 8 balance (sum of the upper half - of the lower) / d
                 - sharp |x|^2 / 2

The tilt of a mixture is a mixture, so h, u* and the laws are exact at every t.  The
control family u_theta has the three features, theta* = (ink, balance, sharp).

X_0 is the origin (``start`` = "origin"): from a point every answer is closed in any
dimension.  X_T is then the mixture posterior given X_{t_0} = 0, whose weights are
proportional to exp(-alpha^2 |x_k|^2 / (2 (alpha^2 variance + beta^2))), and within 7 %
of 1 / n_images at alpha = 0.1.
With ``start`` = "marginal" X_0 has the density p_{t_0} of the noised images; log Z, h
and u* stay exact, but the objective is then an integral over 64 dimensions, and of no
closed form (up to d = 2 quadrature gives it).

All 1,797 images: ``digits:n_images=1797``, 1.5 GB at the default steps.  One step of
one path takes about 1 microsecond on one core with 100 images and 27 with all (numba,
float64, forward), 15 nanoseconds an image.
Source: digits of scikit-learn (UCI, Alpaydin and Kaynak 1998); tilt and control family
ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sdebench.closed_form.base_process import MemorylessBase
from sdebench.closed_form.log_quadratics import gaussian_parameters
from sdebench.closed_form.schedule import LinearFlow
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.errors import ParameterError, unknown
from sdebench.problems._digits import check_images, images, shape
from sdebench.tilting_problem import TiltingProblem


@dataclass(frozen=True, kw_only=True)
class Digits(TiltingProblem):
    """Images of digits as mixture means, linear and quadratic reward.

    Parameters
    ----------
    n_images : 2 to 1797, the first ones of the data set.
    dim : 64, or fewer: means of rectangles of pixels.
    variance : of each component, > 0.
    ink, balance, sharp : theta*; 1 / variance + sharp must be positive.
    start : "origin" or "marginal".
    start_time : in (0, 1).
    """

    default_steps: ClassVar[int] = 32
    source: ClassVar[str] = (
        "digits of scikit-learn (Alpaydin and Kaynak 1998); tilt and control family "
        "ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= \left( \kappa_t X_t + \sigma_t^2 \nabla \log p_t(X_t) \right) dt
  + \sigma_t\,(u\,dt + dW_t), \quad X_{t_0} = 0 \\
p_t(x) &= \frac{1}{K} \sum_{k=1}^{K} \mathcal{N}(x; t\,x_k,
  (t^2\,\text{variance} + (1 - t)^2) I), \quad \sigma_t^2 = 2\,\frac{1 - t}{t} \\
r(x) &= \tfrac{8}{d}\,\text{ink} \sum_i x_i + \tfrac{8}{d}\,\text{balance}
  \left( \sum_{\text{upper}} x_i - \sum_{\text{lower}} x_i \right)
  - \tfrac{1}{2}\,\text{sharp}\,|x|^2, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Real data: a hundred narrow modes in 64 dimensions, and a flow that decides "
        "between images within a few steps."
    )

    n_images: int = 100
    dim: int = 64
    variance: float = 0.05
    ink: float = 2.0
    balance: float = 1.0
    sharp: float = 0.5
    start: str = "origin"
    start_time: float = 0.1

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "ink", "balance", "sharp"

    @property
    def effort(self) -> int:
        return self.dim * max(1, self.n_images // 20)

    def build(self) -> TiltingFamily:
        check_images(self.n_images)
        if not self.variance > 0:
            raise ParameterError(f"variance {self.variance} must be positive")
        count, dim = self.n_images, self.dim
        base = MemorylessBase(
            LinearFlow(1.0),
            np.full(count, -np.log(count)),
            images(dim)[0][:count],
            np.full((count, dim), self.variance),
            self.start_time,
        )
        rows, columns = shape(dim)
        features = np.zeros((3, 2 * dim + 1))
        features[0, :dim] = 8.0 / dim
        upper = np.sign(0.5 * (rows - 1) - np.arange(rows))
        features[1, :dim] = 8.0 / dim * np.repeat(upper, columns)
        features[2, dim:-1] = -0.5
        return TiltingFamily(
            base=base,
            features=features,
            reference=np.zeros((1, 2 * dim + 1)),
            constant=0.0,
            theta_star=np.array([self.ink, self.balance, self.sharp]),
            start=self._start(base),
            start_is_marginal=self.start == "marginal",
        )

    def _start(self, base: MemorylessBase) -> StartLaw:
        if self.start == "origin":
            point = np.zeros((1, self.dim))
            return StartLaw(np.ones(1), point, point)
        if self.start != "marginal":
            raise unknown("start", self.start, ("origin", "marginal"))
        masses, means, variances = gaussian_parameters(base.marginal(base.start_time))
        return StartLaw(np.exp(masses), means, np.sqrt(variances))
