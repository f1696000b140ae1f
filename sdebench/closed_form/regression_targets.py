r"""Regression targets for the score of a tilted law, and their exact noise.

Under the tilted law P* of a denoising problem, x_1 ~ p* and
x_t = alpha_t x_1 + beta_t xi with a standard normal xi.  A random target tau with
E[tau | x_t] = grad log p*_t(x_t) is a label for the optimal control
u* = sigma (grad log p*_t - grad log p_t).  With g = grad log p*, which is
grad log p_1 + grad r,

    conditional (CSM)   -xi / beta
    target (TSM)        g(x_1) / alpha
    affine              c g(x_1) / alpha - (1 - c) xi / beta,   c = rho^2/(m + rho^2),

rho = alpha/beta.  The one parameter, a **precision** m, holds them all: m = infinity
is CSM and m = 0 is TSM; m = 1 is novel score matching (NSM); m the precision of a
Gaussian base N(., I/m) is the lean adjoint (AM), whose label
score_t(x_t) + alpha/(alpha^2 + m beta^2) grad r(x_1) is that combination path by path;
and m = J/d, with the Fisher information J = E|g(x_1)|^2, has the least noise.

**Noise.**  Write A(rho) = E Tr Cov(x_1 | x_t), the minimum mean square error.  Two
integrations by parts in the posterior of x_1, whose score is g + rho^2 (...), give
E Tr Cov(x_1, g | x_t) = rho^2 A - d and E Tr Cov(g | x_t) = J - d rho^2 + rho^4 A, so

    beta^2 E Tr Cov(tau | x_t) = rho^2 A - 2 c d + c^2 (d + J / rho^2).

**Its integral** under the weight of KL(P* || P_theta) = int eta E|s* - s_theta|^2 dt,
eta = sigma^2/2, is the same for every schedule since eta dt = beta^2 dlog(rho).  With
the mutual information I(rho) of x_1 and x_t, I' = rho A, and v = m + rho^2,

    int eta E Tr Cov(tau | x_t) dt = [ I - (d/2) log v - (J - m d)/(2 v) ],

CSM: [I].  From rho = 0 to infinity, with the entropy H of p*:

    CSM        infinite, d log(rho_max)
    TSM        infinite, J / (2 rho_min^2)
    m finite   J/(2m) - d/2 + H - (d/2) log(2 pi e / m)
               = E|grad log(p*/q)|^2/(2m) - KL(p* || q),   q = N(0, I/m),

the gap in the logarithmic Sobolev inequality of q; for AM, with q the base (its mean
drops out), that is E|grad r|^2/(2m) - KL(p* || p_1).  At m = J/d it is
(d/2) log(J N/d), N the entropy power: the gap in Stam's inequality; its noise at one
rho is that in the inequality of van Trees, A >= d^2/(J + d rho^2).  Gaussian base
N(0, 1), r = -k x^2/2: 1/2 (k - log(1 + k)).

Single Gaussians are closed form in any dimension.  Mixtures need A, J and entropies by
the trapezoidal rule, up to two dimensions; on these analytic integrands halving the
step squares the error, so the last change is far above what is left of it.  Each
number has this change plus rounding as its error bound.

Sources: targets, Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229, Phillips et al.
2024 (NSM) and De Bortoli et al. 2024 (TSM); I' = rho A is of Guo, Shamai and Verdu
2005.  The noise in closed form is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isinf, log, pi
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.quadratic import Array
from sdebench.errors import NotApplicableError, NotExactError, ParameterError, unknown

if TYPE_CHECKING:
    from sdebench.tilting_problem import TiltingProblem

TARGETS = ("conditional", "target", "novel", "adjoint", "affine")
"""CSM, TSM, NSM, AM (Gaussian base) and the affine combination with the least noise."""

_REACH = 10.0  # standard deviations; the mass beyond is below 1e-22
_MOST_POINTS = 2_000_000
_TOLERANCE = 1e-13
_ROUNDING = 1e-15


class Bounded(NamedTuple):
    """A number with a bound of its absolute error."""

    value: float
    bound: float


@dataclass(frozen=True, eq=False)
class RegressionTargets:
    """Exact noise of the regression targets for one tilted law.

    Parameters
    ----------
    law : p*, the tilted law of x_1; covariances isotropic or diagonal.
    base_variance : of each coordinate of a Gaussian base p_1; None if it is none, and
        then the lean adjoint depends on the whole path.
    """

    law: GaussianMixture
    base_variance: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "law", self.law.normalized().as_diagonal())
        if self.base_variance is not None and not self.base_variance > 0:
            raise ParameterError(f"base_variance {self.base_variance} must be positive")

    @classmethod
    def of(cls, problem: TiltingProblem) -> RegressionTargets:
        """Return those of a problem, X_0 tilted as well."""
        base = problem.family.base
        variance = None
        if base.gaussian:
            from sdebench.closed_form.log_quadratics import gaussian_parameters

            variance = float(gaussian_parameters(base.terminal)[2][0, 0])
        return cls(problem.truth.ideal_law(), variance)

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.law.dim

    # ---- targets ------------------------------------------------------------------
    def precision(self, target: str) -> float:
        """Return m of a target, in [0, infinity]."""
        if target == "adjoint":
            if self.base_variance is None:
                raise NotApplicableError(
                    "the noise of the lean adjoint has a closed form for a Gaussian "
                    "base only: on other bases the adjoint depends on the whole path"
                )
            return 1.0 / self.base_variance
        if target == "affine":
            return self.fisher_information.value / self.dim
        known = {"conditional": inf, "target": 0.0, "novel": 1.0}
        if target not in known:
            raise unknown("target", target, TARGETS)
        return known[target]

    def squared_errors(
        self, targets: Sequence[str], alpha: float, beta: float, x_1: Array, xi: Array
    ) -> Array:
        """Return |tau - grad log p*_t(x_t)|^2 of samples x_1 and xi (n, d).

        One row (n,) per target.
        """
        marginal = self.law.push_forward(alpha, 0.0, beta**2)
        best = marginal.score(alpha * x_1 + beta * xi)
        by_data, by_noise = self.law.score(x_1) / alpha, xi / beta
        shares = [_share(self.precision(target), alpha / beta) for target in targets]
        labels = [c * by_data - (1.0 - c) * by_noise for c in shares]
        return np.array([np.sum((tau - best) ** 2, axis=1) for tau in labels])

    # ---- what the noise is made of -----------------------------------------------
    @cached_property
    def fisher_information(self) -> Bounded:
        """J = E|grad log p*|^2."""
        if self._gaussian:
            return _rounded(float(np.sum(1.0 / self._variances)))
        return self._integral(self.law, lambda y: np.sum(self.law.score(y) ** 2, 1))

    def mean_square_error(self, rho: float) -> Bounded:
        """Return A = E Tr Cov(x_1 | x_t)."""
        if self._gaussian:
            return _rounded(
                float(np.sum(self._variances / (1.0 + rho**2 * self._variances)))
            )
        noise = rho**-2.0

        def trace(y: Array) -> Array:
            covariance = self.law.posterior(y, 1.0, noise).covariance()
            return np.asarray(np.trace(covariance, axis1=1, axis2=2))

        return self._integral(self.law.push_forward(1.0, 0.0, noise), trace)

    def entropy(self, rho: float = inf) -> Bounded:
        """Return the entropy of x_1 + xi/rho; that of p* by default."""
        noise = rho**-2.0
        if self._gaussian:
            terms = np.log(2.0 * pi * np.e * (self._variances + noise))
            return _rounded(0.5 * float(np.sum(terms)))
        law = self.law.push_forward(1.0, 0.0, noise)
        return self._integral(law, lambda y: -law.log_density(y))

    def information(self, rho: float) -> Bounded:
        """Return the mutual information I(rho) of x_1 and x_t."""
        if self._gaussian:
            return _rounded(0.5 * float(np.sum(np.log1p(rho**2 * self._variances))))
        if rho == 0.0:
            return Bounded(0.0, 0.0)
        value, bound = self.entropy(rho)
        noise = 0.5 * self.dim * log(2.0 * pi * np.e / rho**2)
        return Bounded(value - noise, bound + _ROUNDING * abs(noise))

    # ---- noise --------------------------------------------------------------------
    def noise(self, target: str, rho: float) -> Bounded:
        """Return beta^2 E Tr Cov(tau | x_t), that of the label for -beta score."""
        if not 0.0 < rho < inf:
            raise ParameterError(f"rho {rho} must be positive and finite")
        m, d = self.precision(target), self.dim
        if self._gaussian:
            return _rounded(self._gaussian_noise(m, rho))
        c = _share(m, rho)
        error, information = self.mean_square_error(rho), self.fisher_information
        parts = (rho**2 * error.value, c**2 * (d + information.value / rho**2))
        value = parts[0] - 2.0 * c * d + parts[1]
        bound = rho**2 * error.bound + (c / rho) ** 2 * information.bound
        return Bounded(value, bound + 4.0 * _ROUNDING * (sum(parts) + 2.0 * c * d))

    def conditional_variance(self, target: str, alpha: float, beta: float) -> Bounded:
        """Return E Tr Cov(tau | x_t)."""
        return Bounded(*(v / beta**2 for v in self.noise(target, alpha / beta)))

    def noise_at(self, target: str, rho: float, y: Array) -> Bounded:
        """Return beta^2 Tr Cov(tau | x_t = alpha y) at one point y (d,).

        As on average, with -E[div g(x_1) | x_t] instead of J.
        """
        c, d = _share(self.precision(target), rho), self.dim
        curvature, error = self._at(rho, y)
        parts = (rho**2 * error, c**2 * (d + curvature.value / rho**2))
        bound = (c / rho) ** 2 * curvature.bound
        bound += 4.0 * _ROUNDING * (sum(parts) + 2.0 * c * d)
        return Bounded(parts[0] - 2.0 * c * d + parts[1], bound)

    def best_share(self, rho: float, y: Array) -> float:
        """Return the c of the affine target with the least noise at one point y (d,).

        d rho^2 / (d rho^2 - E[div g(x_1) | x_t]); `precision` has the best one that
        does not depend on the point.
        """
        square = self.dim * rho**2
        return square / (square + self._at(rho, y)[0].value)

    def _at(self, rho: float, y: Array) -> tuple[Bounded, float]:
        """Return -E[div g(x_1) | x_t = alpha y] and Tr Cov(x_1 | x_t)."""
        posterior = self.law.posterior(np.asarray(y, float), 1.0, rho**-2.0)
        error = float(np.trace(posterior.covariance()))

        def curvature(x: Array) -> Array:
            return -np.trace(self.law.score_jacobian(x), axis1=1, axis2=2)

        return self._integral(posterior.at(()), curvature), error

    def _gaussian_noise(self, m: float, rho: float) -> float:
        # tau is affine in x_1 with one slope for each coordinate; no cancellation
        C = self._variances
        slope = rho if isinf(m) else rho * (m - 1.0 / C) / (m + rho**2)
        return float(np.sum(slope**2 * C / (1.0 + rho**2 * C)))

    def integral(
        self, target: str, rho_min: float = 0.0, rho_max: float = inf
    ) -> Bounded:
        """Return int eta E Tr Cov(tau | x_t) dt between two rho, infinite or not."""
        if not 0.0 <= rho_min < rho_max:
            raise ParameterError(
                f"rho_min {rho_min} and rho_max {rho_max} must be increasing and not "
                "negative"
            )
        m = self.precision(target)
        if (isinf(m) and isinf(rho_max)) or (m == 0.0 and rho_min == 0.0):
            return Bounded(inf, 0.0)
        low, high = self._primitive(m, rho_min), self._primitive(m, rho_max)
        return Bounded(high.value - low.value, high.bound + low.bound)

    def _primitive(self, m: float, rho: float) -> Bounded:
        """Return I - (d/2) log v - (J - m d)/(2 v), v = m + rho^2, or its limit."""
        if isinf(m):
            return self.information(rho)
        d = self.dim
        if isinf(rho):
            value, bound = self.entropy()
            noise = 0.5 * d * log(2.0 * pi * np.e)
            return Bounded(value - noise, bound + _ROUNDING * abs(noise))
        v = m + rho**2
        information, fisher = self.information(rho), self.fisher_information
        rest = 0.5 * (fisher.value - m * d) / v
        value = information.value - 0.5 * d * log(v) - rest
        rounding = _ROUNDING * (abs(information.value) + d * abs(log(v)) + abs(rest))
        return Bounded(value, information.bound + 0.5 * fisher.bound / v + rounding)

    # ---- quadrature ---------------------------------------------------------------
    @property
    def _gaussian(self) -> bool:
        return self.law.n_components == 1

    @property
    def _variances(self) -> Array:
        return np.asarray(self.law.as_diagonal().covariances[0])

    def _integral(
        self, law: GaussianMixture, function: Callable[[Array], Array]
    ) -> Bounded:
        """Return E function(y) under a mixture, y (n, d) -> (n,)."""
        if self.dim > 2:
            raise NotExactError(
                f"the noise of a mixture's targets needs quadrature in {self.dim} "
                "dimensions, which is done up to 2; take a single Gaussian"
            )
        diagonal = law.as_diagonal()
        scales = np.sqrt(diagonal.covariances)
        low = np.min(law.means - _REACH * scales, axis=0)
        high = np.max(law.means + _REACH * scales, axis=0)
        step = np.min(scales, axis=0)
        previous, gap = np.nan, inf
        while np.prod((high - low) / step) <= _MOST_POINTS:
            axes = [np.arange(*ends) for ends in zip(low, high, step, strict=True)]
            grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
            y = grid.reshape(-1, self.dim)
            values = np.exp(law.log_density(y)) * function(y)
            value = float(np.sum(values) * np.prod(step))
            rounding = _ROUNDING * float(np.sum(np.abs(values)) * np.prod(step))
            gap = abs(value - previous)
            if gap <= _TOLERANCE * max(1.0, abs(value)):
                break
            previous, step = value, 0.5 * step
        if isinf(gap) or np.isnan(gap):
            raise NotExactError(
                "the modes are too narrow for their distance: the quadrature would "
                f"need more than {_MOST_POINTS:,} points"
            )
        return Bounded(value, gap + 4.0 * rounding)


def _share(m: float, rho: float) -> float:
    """Return c, the share of the target score in a label."""
    return 0.0 if isinf(m) else rho**2 / (m + rho**2)


def _rounded(value: float) -> Bounded:
    return Bounded(value, 4.0 * _ROUNDING * abs(value))
