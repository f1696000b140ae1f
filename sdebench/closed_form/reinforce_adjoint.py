r"""Where reinforce adjoint matching stops, in closed form for Gaussians.

Data N(m, P) on the line, reward r(x) = b x - k x^2/2, a model with the data law
N(mu, B).  With the denoiser D(x_t) = E[x_1 | x_t], reinforce adjoint matching regresses
the model's on

    D_ref(x_t) + r(x_1) (x_1 - D(x_t)),     x_1 from the model, x_t its noising,

whose conditional mean is D_ref + Cov_model(r, x_1 | x_t).  The tilt itself is
D* = D_ref + int_0^1 Cov_l(r, x_1 | x_t) dl along the tilts by l r: the method takes one
implicit Euler step of it, exact where the covariance does not depend on l.

Every denoiser gives a flow of x_t / beta_t in rho = alpha/beta, dn/drho = D.  With the
one above it ends in a law of the variance and the mean

    B' = P exp(-k B),
    mu' = sqrt(P) exp(-k B/2) int_0^infinity (m/(1 + P rho^2)
          + S (b - k mu/(1 + B rho^2))) / E drho,
    S = B/(1 + B rho^2),   E = sqrt(1 + P rho^2) exp(-k B S rho^2 / 2),

so that it stops at B = W(k P)/k, Lambert's W, and not at the tilt's P/(1 + k P).  A
linear reward (k = 0) is met exactly.  The undamped iteration B -> B' has the slope
-W(k P) there: it turns in ever wider circles for k P > e.  For k P < -1/e there is no
fixed point, while tilts exist for k P > -1.

Source: reinforce adjoint matching, arXiv:2605.10759, the loss without its correction
for the path cost; the fixed point is derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
from scipy.integrate import quad
from scipy.special import lambertw

from sdebench.errors import NotExactError, ParameterError


@dataclass(frozen=True)
class ReinforceAdjoint:
    """The fixed-point map of a Gaussian problem.

    Parameters
    ----------
    mean, variance : m and P > 0 of the data.
    slope, curvature : b and k of the reward, 1/P + k > 0.
    """

    mean: float = 0.0
    variance: float = 1.0
    slope: float = 0.0
    curvature: float = 1.0

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ParameterError(f"variance {self.variance} must be positive")
        if not 1.0 / self.variance + self.curvature > 0:
            raise ParameterError(
                f"curvature {self.curvature} must be above -1/variance = "
                f"{-1.0 / self.variance:.6g}: there is no tilted law"
            )

    def tilted(self) -> tuple[float, float]:
        """Return mean and variance of the tilted law."""
        variance = self.variance / (1.0 + self.curvature * self.variance)
        return variance * (self.mean / self.variance + self.slope), variance

    def step(self, mean: float, variance: float) -> tuple[float, float]:
        """Return mean and variance that the flow of the regression's minimizer has."""
        after = self.variance * exp(-self.curvature * variance)
        constant, linear = self._mean_map(variance)
        return constant + linear * mean, after

    def fixed_point(self) -> tuple[float, float]:
        """Return mean and variance of the law at which the method stops.

        Raises
        ------
        NotExactError
            If there is none, for curvature times variance below -1/e.
        """
        k, product = self.curvature, self.curvature * self.variance
        if product < -exp(-1.0):
            raise NotExactError(
                f"curvature times variance is {product:.6g}: below -1/e reinforce "
                "adjoint matching has no fixed point"
            )
        variance = float(np.real(lambertw(product))) / k if k else self.variance
        constant, linear = self._mean_map(variance)
        return constant / (1.0 - linear), variance

    def _mean_map(self, variance: float) -> tuple[float, float]:
        """Return c and l of the mean's map mu' = c + l mu."""
        P, B, k = self.variance, variance, self.curvature

        def parts(angle: float) -> tuple[float, float, float]:
            # sqrt(P) rho = tan(angle): the factor 1/E turns into a cosine
            rho = np.tan(angle) / sqrt(P)
            S = B / (1.0 + B * rho**2)
            weight = exp(-0.5 * k * B * (1.0 - S * rho**2)) / np.cos(angle)
            return weight, S, 1.0 / (1.0 + P * rho**2)

        def constant(angle: float) -> float:
            weight, S, own = parts(angle)
            return weight * (self.mean * own + S * self.slope)

        def linear(angle: float) -> float:
            weight, S, _ = parts(angle)
            return -weight * k * S**2 / B

        ends = 0.0, 0.5 * np.pi
        found = [quad(part, *ends, epsabs=1e-13)[0] for part in (constant, linear)]
        return found[0], found[1]
