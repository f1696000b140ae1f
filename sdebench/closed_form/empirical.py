r"""Data that are points: the tilting family of rewards known at the points alone.

Of data sum_k w_k delta_{x_k} the marginals are mixtures of the noising kernels, and
X_T given X_t = x is x_k with probability omega_k(x, t): for any function r

    h(x, t) = sum_k omega_k(x, t) e^{r(x_k)}

exactly.  The family is r_theta = theta^T phi, given by the numbers phi_p(x_k), so that
u_theta is the difference of the scores of two mixtures of the same kernels with
different weights.  The law of X_T has no density.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.base_process import MemorylessBase
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.log_quadratics import Array
from sdebench.closed_form.tilting import TiltingFamily
from sdebench.errors import NotExactError


class PointMasses(GaussianMixture):
    """Weighted points: a mixture whose variances are zero, without a density."""

    def _require_positive_definite(self) -> None:
        """Nothing: the variances are zero on purpose."""

    def log_density(self, x: object) -> Array:
        raise NotExactError("the law of X_T is discrete: it has no density")


@dataclass(frozen=True, eq=False)
class EmpiricalTilting(TiltingFamily):
    """`TiltingFamily` of features with arbitrary values at data points.

    Parameters
    ----------
    values : (P, K), phi_p(x_k); ``features`` and ``reference`` are not used.
    """

    values: Array = field(kw_only=True)

    @property
    def affine(self) -> bool:
        """Whether the control is affine: never."""
        return False

    @property
    def _points(self) -> tuple[Array, Array]:
        """Logarithms of the weights (K,), and the points (K, d)."""
        assert isinstance(self.base, MemorylessBase)
        return self.base.log_weights, self.base.means

    def reward_rows(self, theta: Array) -> Array:
        raise NotExactError("the reward is given by its values at the data points")

    def tilt_rows(self, theta: Array, t: float) -> tuple[Array, Array, Array]:
        rows = self.base.marginal(t)
        tilted = rows.copy()
        tilted[:, -1] += np.asarray(theta, float) @ self.values
        derivative = np.zeros((len(self.values), *rows.shape))
        derivative[..., -1] = self.values
        return rows, tilted, derivative

    def _tilted(
        self, theta: Array, t: float
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        rows = self.tilt_rows(theta, t)[1]
        points = self._points[1]
        nothing = np.zeros_like(points)
        return rows, (nothing, points, nothing)

    def _log_posterior(self, x: Array, t: float) -> tuple[Array, Array]:
        """Return log omega (..., K) and the slopes of its exponents (K, d)."""
        rows = self.base.marginal(t)
        exponents = lq.terms(rows, x)
        total = logsumexp(exponents, axis=-1, keepdims=True)
        return exponents - total, lq.split(rows)[0]

    def log_h(self, x: Array, t: float, theta: Array) -> Array:
        # one posterior, not a difference of two: nothing large cancels
        logs = self._log_posterior(x, t)[0]
        return np.asarray(logsumexp(logs + theta @ self.values, axis=-1))

    def control(self, x: Array, t: float, theta: Array) -> Array:
        logs, slopes = self._log_posterior(x, t)
        tilted = logs + theta @ self.values
        tilted = tilted - logsumexp(tilted, axis=-1, keepdims=True)
        return self.base.sigma(t) * ((np.exp(tilted) - np.exp(logs)) @ slopes)

    def feature_moments(self, x: Array, theta: Array) -> tuple[Array, Array]:
        gamma = self._posterior(x, theta)[0]
        mean = gamma @ self.values.T
        centred = self.values - mean[:, :, None]
        return mean, np.einsum("nk,npk,nqk->npq", gamma, centred, centred)

    def memoryless_log_normalizer(self, theta: Array | None = None) -> float:
        theta = self.theta_star if theta is None else np.asarray(theta, float)
        return float(logsumexp(self._points[0] + theta @ self.values))

    def ideal_law(self, theta: Array) -> tuple[Array, Array, Array]:
        log_weights, points = self._points
        logs = log_weights + np.asarray(theta, float) @ self.values
        return np.exp(logs - logsumexp(logs)), points, np.zeros_like(points)

    def transition(
        self, x: Array, t: float, theta: Array | None
    ) -> tuple[Array, Array, Array, Array]:
        if t < self.base.horizon:
            return super().transition(x, t, theta)
        parameters = np.zeros(len(self.values)) if theta is None else theta
        gamma, means, nothing = self._posterior(x, parameters)
        return gamma, means, nothing, nothing

    def end_law(self, theta: Array | None) -> PointMasses:
        """Return the law of X_T under u_theta (None: the base) from a point."""
        gamma, means, _, _ = self.transition(self.start.means, self.base.horizon, theta)
        kept = gamma[0] > 0.0
        count = int(kept.sum())
        return PointMasses(np.log(gamma[0, kept]), means[0, kept], np.zeros(count))
