"""Base processes whose law at every time is a Gaussian mixture (classes G and F).

A base process is known through Gaussian kernels: backward, X_s given X_t for s <= t,
and, where the base is Gaussian, forward, X_T given X_t.  From these `tilting` builds
every control, value, gradient and table.  All variances are isotropic; means per
coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial.legendre import leggauss
from scipy.special import exprel

from sdebench.closed_form.log_quadratics import Array, gaussian_rows, gradient
from sdebench.closed_form.schedule import Schedule
from sdebench.errors import NotApplicableError, ParameterError


@dataclass(frozen=True)
class GaussianStep:
    """One step X' = scale X + offset + base_gain score(X) + noise (w + z)."""

    scale: float
    offset: Array
    base_gain: float
    noise: float
    control_gain: float


class BaseProcess:
    """A base process on [start_time, horizon] with terminal law ``terminal``.

    Attributes
    ----------
    gaussian : the score of the marginals is linear and folded into the drift.
    terminal : rows of the density of X_T, (K, 2d + 1).
    """

    gaussian: bool
    start_time: float
    horizon: float
    dim: int
    terminal: Array

    def sigma(self, t: float) -> float:
        """Return the noise level sigma_t."""
        raise NotImplementedError

    def marginal(self, t: float) -> Array:
        """Return the rows of the density p_t when X_{t0} ~ p_{t0}."""
        raise NotImplementedError

    def backward(self, s: float, t: float) -> tuple[float, Array, float]:
        """Return (scale, offset (d,), variance) of X_s given X_t, s <= t."""
        raise NotImplementedError

    def forward(self, s: float, t: float) -> tuple[float, Array, float]:
        """Return (scale, offset (d,), variance) of X_t given X_s; Gaussian bases."""
        raise NotImplementedError

    def linear_drift(self, t: float) -> tuple[float, Array]:
        """Return (scale, offset (d,)) of the linear part of the drift."""
        raise NotImplementedError

    def linear_growth(self, s: float, t: float) -> float:
        """Return exp of the integral of the linear drift's scale over [s, t]."""
        raise NotImplementedError

    def drift(self, x: Array, t: float) -> Array:
        """Return the base drift b(x, t), shape of x (..., d)."""
        scale, offset = self.linear_drift(t)
        drift = scale * x + offset
        if not self.gaussian:
            drift = drift + self.sigma(t) ** 2 * gradient(self.marginal(t), x)
        return drift

    def flow_drift(self, t: float) -> tuple[float, Array]:
        """Return (scale, offset (d,)) of the linear part of the probability flow."""
        raise NotApplicableError(
            f"{type(self).__name__} has no probability flow that its control steers; "
            "mixed ODE-SDE sampling needs a memoryless denoising base"
        )

    def denoiser(self, s: float, t: float) -> tuple[float, ...] | None:
        """Return the denoised prediction at s and its noising, or None.

        E[X_T | X_s = x] under the control is the sum of the first three with x, the
        Euler-Maruyama mean of the step from s to t without control, and the control in
        noise units; X_s is the sum of the last two with X_T and a standard normal.
        """
        return None

    def flow_step(self, s: float, t: float) -> GaussianStep:
        """Return the coefficients of one Euler step of the probability flow.

        The velocity under the control u is v + sigma u / 2 (Domingo-Enrich et al. 2024,
        arXiv:2409.08861, section 4): half of what u adds to the drift with noise.
        """
        h, sigma = t - s, self.sigma(s)
        scale, offset = self.flow_drift(s)
        root = np.sqrt(h) * sigma
        score = 0.0 if self.gaussian else 0.5 * h * sigma**2
        return GaussianStep(1.0 + h * scale, h * offset, score, root, 0.5 * root)

    def step(self, s: float, t: float, scheme: str) -> GaussianStep:
        """Return the coefficients of one step from s to t.

        "euler_maruyama" freezes the whole drift; "exponential" integrates the linear
        part and the noise exactly and freezes only score and control.
        """
        h = t - s
        sigma = self.sigma(s)
        if scheme == "euler_maruyama":
            linear, offset = self.linear_drift(s)
            root = np.sqrt(h) * sigma
            score = 0.0 if self.gaussian else h * sigma**2
            return GaussianStep(
                1.0 + h * linear, h * offset, score, root, np.sqrt(h) * sigma
            )
        # Nodes in the root of the distance to t: sigma may vanish like sqrt(T - t).
        nodes, node_weights = leggauss(40)
        roots = 0.5 * (nodes + 1.0)
        times = t - h * roots**2
        growth = np.array([self.linear_growth(r, t) for r in times])
        levels = np.array([self.sigma(r) for r in times])

        def integral(values: Array) -> float:
            return float(h * (node_weights * roots) @ values)

        noise = np.sqrt(integral((growth * levels) ** 2))
        # Control frozen at its value u = sigma_s (s_1 - s_0), pushed by sigma_r.
        control = integral(growth * levels) * sigma / noise
        if self.gaussian:
            scale, shift, _ = self.forward(s, t)
            return GaussianStep(scale, shift, 0.0, noise, control)
        return GaussianStep(
            self.linear_growth(s, t),
            np.zeros(self.dim),
            integral(growth * levels**2),
            noise,
            control,
        )


def _check_start(start_time: float, horizon: float, alpha: float) -> None:
    if not 0.0 <= start_time < horizon:
        raise ParameterError(
            f"start_time {start_time!r} must be in [0, horizon = {horizon!r})"
        )
    if alpha == 0.0:
        raise ParameterError(
            "start_time 0 needs infinite memoryless noise on this schedule, where "
            "alpha = 0; choose a start_time > 0, e.g. 0.05"
        )


@dataclass(frozen=True)
class MemorylessBase(BaseProcess):
    """Time reversal of noising a mixture: sigma^2 = 2 eta (class G).

    drift kappa x + 2 eta grad log p_t; X_s | X_t is the noising kernel
    N((alpha_s/alpha_t) x, beta_s^2 - (alpha_s/alpha_t)^2 beta_t^2).  A single
    isotropic Gaussian gives a linear drift (``gaussian``).
    """

    schedule: Schedule
    log_weights: Array
    means: Array
    variances: Array
    start_time: float = 0.0

    def __post_init__(self) -> None:
        _check_start(
            self.start_time, self.horizon, float(self.schedule.alpha(self.start_time))
        )

    @property
    def horizon(self) -> float:  # type: ignore[override]
        return self.schedule.horizon

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self.means.shape[1]

    @property
    def gaussian(self) -> bool:  # type: ignore[override]
        return len(self.log_weights) == 1 and np.ptp(self.variances) == 0.0

    @property
    def terminal(self) -> Array:  # type: ignore[override]
        return gaussian_rows(self.log_weights, self.means, self.variances)

    def sigma(self, t: float) -> float:
        return float(np.sqrt(2.0 * self.schedule.eta(t)))

    def marginal(self, t: float) -> Array:
        alpha = self.schedule.alpha(t)
        return gaussian_rows(
            self.log_weights,
            alpha * self.means,
            alpha**2 * self.variances + self.schedule.variance(t),
        )

    def backward(self, s: float, t: float) -> tuple[float, Array, float]:
        scale = float(self.schedule.alpha(s) / self.schedule.alpha(t))
        variance = self.schedule.variance(s) - scale**2 * self.schedule.variance(t)
        return scale, np.zeros(self.dim), float(variance)

    def _moments(self, t: float) -> tuple[Array, float]:
        alpha = self.schedule.alpha(t)
        q = alpha**2 * self.variances[0, 0] + self.schedule.variance(t)
        return alpha * self.means[0], float(q)

    def forward(self, s: float, t: float) -> tuple[float, Array, float]:
        # Bayes: X_t | X_s from X_s | X_t and the Gaussian law of X_t.
        scale, _, variance = self.backward(s, t)
        (mean_s, q_s), (mean_t, q_t) = self._moments(s), self._moments(t)
        gain = scale * q_t / q_s
        return gain, mean_t - gain * mean_s, q_t * variance / q_s

    def linear_drift(self, t: float) -> tuple[float, Array]:
        kappa = float(self.schedule.kappa(t))
        if not self.gaussian:
            return kappa, np.zeros(self.dim)
        mean, q = self._moments(t)
        pull = 2.0 * float(self.schedule.eta(t)) / q
        return kappa - pull, pull * mean

    def flow_drift(self, t: float) -> tuple[float, Array]:
        # kappa x + eta grad log p_t: half the score of the drift with noise.
        scale, offset = self.linear_drift(t)
        return 0.5 * (float(self.schedule.kappa(t)) + scale), 0.5 * offset

    def denoiser(self, s: float, t: float) -> tuple[float, ...]:
        # Tweedie: (x + beta^2 score) / alpha; the step's mean holds h sigma^2 score.
        h, sigma = t - s, self.sigma(s)
        alpha, variance = float(self.schedule.alpha(s)), self.schedule.variance(s)
        by_mean = float(variance) / (alpha * h * sigma**2)
        by_state = 1.0 / alpha - by_mean * (1.0 + h * float(self.schedule.kappa(s)))
        by_control = by_mean * np.sqrt(h) * sigma
        return by_state, by_mean, by_control, alpha, float(np.sqrt(variance))

    def linear_growth(self, s: float, t: float) -> float:
        if self.gaussian:
            return self.forward(s, t)[0]
        return float(self.schedule.alpha(t) / self.schedule.alpha(s))


@dataclass(frozen=True)
class ConstantNoiseBase(BaseProcess):
    """Gaussian data N(m, C I), flow marginals, constant noise level: not memoryless.

    drift kappa x + (sigma^2/2 + eta) grad log p_t, linear since p_t is Gaussian.
    With q = alpha^2 C + beta^2 the transition factor is
    sqrt(q_t/q_s) exp(-sigma^2/2 int_s^t dr/q_r).
    """

    schedule: Schedule
    mean: Array
    variance: float
    noise_level: float
    start_time: float = 0.0

    gaussian = True

    def __post_init__(self) -> None:
        _check_start(self.start_time, self.horizon, 1.0)
        if not self.noise_level > 0:
            raise ParameterError(f"noise_level {self.noise_level!r} must be positive")

    @property
    def horizon(self) -> float:  # type: ignore[override]
        return self.schedule.horizon

    @property
    def dim(self) -> int:  # type: ignore[override]
        return len(self.mean)

    @property
    def terminal(self) -> Array:  # type: ignore[override]
        return self.marginal(self.horizon)

    def sigma(self, t: float) -> float:
        return self.noise_level

    def _moments(self, t: float) -> tuple[Array, float]:
        alpha = self.schedule.alpha(t)
        return alpha * self.mean, float(
            alpha**2 * self.variance + self.schedule.variance(t)
        )

    def marginal(self, t: float) -> Array:
        mean, q = self._moments(t)
        return gaussian_rows(np.zeros(1), mean[None], np.full((1, self.dim), q))

    def _factor(self, s: float, t: float) -> float:
        integral = self.schedule.inverse_variance_integral(s, t, self.variance)
        ratio = self._moments(t)[1] / self._moments(s)[1]
        return float(np.sqrt(ratio) * np.exp(-0.5 * self.noise_level**2 * integral))

    def forward(self, s: float, t: float) -> tuple[float, Array, float]:
        factor = self._factor(s, t)
        (mean_s, q_s), (mean_t, q_t) = self._moments(s), self._moments(t)
        return factor, mean_t - factor * mean_s, q_t - factor**2 * q_s

    def backward(self, s: float, t: float) -> tuple[float, Array, float]:
        (mean_s, q_s), (mean_t, q_t) = self._moments(s), self._moments(t)
        gain = q_s * self._factor(s, t) / q_t
        return gain, mean_s - gain * mean_t, q_s - gain**2 * q_t

    def linear_drift(self, t: float) -> tuple[float, Array]:
        # kappa x + eta s moves the mean by alpha' m and q by q'; written with the
        # slopes of alpha and beta^2, which stay finite where alpha = 0.
        mean, q = self._moments(t)
        alpha, slope = self.schedule.alpha(t), self.schedule.alpha_slope(t)
        half_q_slope = alpha * slope * self.variance + 0.5 * (
            self.schedule.variance_slope(t)
        )
        scale = float((half_q_slope - 0.5 * self.noise_level**2) / q)
        return scale, slope * self.mean - scale * mean

    def linear_growth(self, s: float, t: float) -> float:
        return self._factor(s, t)


@dataclass(frozen=True)
class PinnedBase(BaseProcess):
    """Brownian motion sigma W from the point x_0 (Foellmer, path-integral sampler).

    X_s | X_t is the Brownian bridge; X_T ~ N(x_0, sigma^2 T I).
    """

    point: Array
    noise_level: float
    horizon: float = 1.0

    gaussian = True
    start_time = 0.0

    def __post_init__(self) -> None:
        for name, value in (
            ("noise_level", self.noise_level),
            ("horizon", self.horizon),
        ):
            if not value > 0:
                raise ParameterError(f"{name} {value!r} must be positive")

    @property
    def dim(self) -> int:  # type: ignore[override]
        return len(self.point)

    @property
    def terminal(self) -> Array:  # type: ignore[override]
        return self.marginal(self.horizon)

    def sigma(self, t: float) -> float:
        return self.noise_level

    def marginal(self, t: float) -> Array:
        variance = np.full((1, self.dim), self.noise_level**2 * t)
        return gaussian_rows(np.zeros(1), self.point[None], variance)

    def forward(self, s: float, t: float) -> tuple[float, Array, float]:
        return 1.0, np.zeros(self.dim), self.noise_level**2 * (t - s)

    def backward(self, s: float, t: float) -> tuple[float, Array, float]:
        ratio = s / t
        variance = self.noise_level**2 * s * (t - s) / t
        return ratio, (1.0 - ratio) * self.point, variance

    def linear_drift(self, t: float) -> tuple[float, Array]:
        return 0.0, np.zeros(self.dim)

    def linear_growth(self, s: float, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class GeometricPinnedBase(PinnedBase):
    """Brownian motion from the point x_0 whose noise level falls geometrically.

    sigma_t = noise_level (final_noise_level / noise_level)^(t / T), so that the noise
    that is left at t is about sigma_t^2 T / (2 log ratio): uniform time steps resolve
    every scale alike, from the spread of a target to the width of its modes.
    """

    final_noise_level: float = 1.0

    def __post_init__(self) -> None:
        PinnedBase.__post_init__(self)
        if not self.final_noise_level > 0:
            raise ParameterError(
                f"final_noise_level {self.final_noise_level!r} must be positive"
            )

    def sigma(self, t: float) -> float:
        ratio = self.final_noise_level / self.noise_level
        return float(self.noise_level * ratio ** (t / self.horizon))

    def _variation(self, s: float, t: float) -> float:
        """Return the integral of sigma^2 over [s, t]."""
        rate = 2.0 * np.log(self.final_noise_level / self.noise_level) / self.horizon
        return self.sigma(s) ** 2 * (t - s) * float(exprel(rate * (t - s)))

    def marginal(self, t: float) -> Array:
        variance = np.full((1, self.dim), self._variation(0.0, t))
        return gaussian_rows(np.zeros(1), self.point[None], variance)

    def forward(self, s: float, t: float) -> tuple[float, Array, float]:
        return 1.0, np.zeros(self.dim), self._variation(s, t)

    def backward(self, s: float, t: float) -> tuple[float, Array, float]:
        ratio = self._variation(0.0, s) / self._variation(0.0, t)
        return ratio, (1.0 - ratio) * self.point, ratio * self._variation(s, t)
