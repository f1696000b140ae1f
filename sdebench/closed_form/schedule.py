"""Noise schedules of the interpolant x_t = alpha_t x_T + beta_t x_0, x_0 ~ N(0, I).

Time runs from noise (t = 0) to data (t = horizon): alpha rises to 1, beta falls to 0.
With kappa = alpha'/alpha and eta = beta (kappa beta - beta'), the memoryless noise
level is sigma^2 = 2 eta (Domingo-Enrich et al. 2024, arXiv:2409.08861, Prop. 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdebench.errors import ParameterError, unknown


@dataclass(frozen=True)
class Schedule:
    """A schedule on [0, horizon]; times are scalars or arrays, results likewise."""

    horizon: float = 1.0

    def __post_init__(self) -> None:
        if not self.horizon > 0:
            raise ParameterError(f"horizon {self.horizon!r} must be positive")

    def alpha(self, t: np.ndarray | float) -> np.ndarray:
        """Return the signal scale alpha_t."""
        raise NotImplementedError

    def variance(self, t: np.ndarray | float) -> np.ndarray:
        """Return the noise variance beta_t^2."""
        raise NotImplementedError

    def alpha_slope(self, t: np.ndarray | float) -> np.ndarray:
        """Return alpha'_t."""
        raise NotImplementedError

    def variance_slope(self, t: np.ndarray | float) -> np.ndarray:
        """Return the derivative of beta_t^2."""
        raise NotImplementedError

    def kappa(self, t: np.ndarray | float) -> np.ndarray:
        """Return alpha'_t / alpha_t, the linear drift of the flow."""
        return self.alpha_slope(t) / self.alpha(t)

    def eta(self, t: np.ndarray | float) -> np.ndarray:
        """Return eta_t = beta (kappa beta - beta'), half the memoryless sigma^2."""
        return self.kappa(t) * self.variance(t) - 0.5 * self.variance_slope(t)

    def inverse_variance_integral(
        self, t0: np.ndarray | float, t1: np.ndarray | float, data_variance: float
    ) -> np.ndarray:
        """Return the integral of 1/q_t from t0 to t1, q = alpha^2 C + beta^2."""
        raise NotImplementedError


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """Reversed Ornstein-Uhlenbeck: alpha = exp(-rate (T - t)/2), beta^2 = 1 - alpha^2.

    sigma^2 = 2 eta = rate is constant; alpha_0 > 0, so the start is nearly memoryless.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        if not self.rate > 0:
            raise ParameterError(f"rate {self.rate!r} must be positive")

    def alpha(self, t: np.ndarray | float) -> np.ndarray:
        return np.exp(-0.5 * self.rate * (self.horizon - np.asarray(t)))

    def variance(self, t: np.ndarray | float) -> np.ndarray:
        # expm1: beta^2 is small near the data end, where 1 - alpha^2 cancels.
        return -np.expm1(-self.rate * (self.horizon - np.asarray(t)))

    def alpha_slope(self, t: np.ndarray | float) -> np.ndarray:
        return 0.5 * self.rate * self.alpha(t)

    def variance_slope(self, t: np.ndarray | float) -> np.ndarray:
        return -self.rate * self.alpha(t) ** 2

    def inverse_variance_integral(
        self, t0: np.ndarray | float, t1: np.ndarray | float, data_variance: float
    ) -> np.ndarray:
        def log_q(t: np.ndarray | float) -> np.ndarray:
            return np.log1p((data_variance - 1.0) * self.alpha(t) ** 2)

        span = np.asarray(t1) - np.asarray(t0)
        return span - (log_q(t1) - log_q(t0)) / self.rate


@dataclass(frozen=True)
class LinearFlow(Schedule):
    """Linear flow matching (rectified flow): alpha = t/T, beta = 1 - t/T.

    sigma^2 = 2 (1 - s)/(s T), s = t/T: infinite at t = 0, so that a memoryless process
    must start later, at a start time > 0.
    """

    def alpha(self, t: np.ndarray | float) -> np.ndarray:
        return np.asarray(t, float) / self.horizon

    def variance(self, t: np.ndarray | float) -> np.ndarray:
        return (1.0 - np.asarray(t, float) / self.horizon) ** 2

    def alpha_slope(self, t: np.ndarray | float) -> np.ndarray:
        return np.full_like(np.asarray(t, float), 1.0 / self.horizon)

    def variance_slope(self, t: np.ndarray | float) -> np.ndarray:
        return -2.0 * (1.0 - np.asarray(t, float) / self.horizon) / self.horizon

    def inverse_variance_integral(
        self, t0: np.ndarray | float, t1: np.ndarray | float, data_variance: float
    ) -> np.ndarray:
        root = np.sqrt(data_variance)

        def angle(t: np.ndarray | float) -> np.ndarray:
            s = np.asarray(t, float) / self.horizon
            return np.arctan2(root * s, 1.0 - s)

        return self.horizon / root * (angle(t1) - angle(t0))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Trigonometric flow: alpha = sin(pi t / 2T), beta = cos(pi t / 2T)."""

    def _angle(self, t: np.ndarray | float) -> np.ndarray:
        return 0.5 * np.pi * np.asarray(t, float) / self.horizon

    def alpha(self, t: np.ndarray | float) -> np.ndarray:
        return np.sin(self._angle(t))

    def variance(self, t: np.ndarray | float) -> np.ndarray:
        return np.sin(0.5 * np.pi - self._angle(t)) ** 2

    def alpha_slope(self, t: np.ndarray | float) -> np.ndarray:
        return 0.5 * np.pi / self.horizon * np.cos(self._angle(t))

    def variance_slope(self, t: np.ndarray | float) -> np.ndarray:
        return -0.5 * np.pi / self.horizon * np.sin(2.0 * self._angle(t))

    def inverse_variance_integral(
        self, t0: np.ndarray | float, t1: np.ndarray | float, data_variance: float
    ) -> np.ndarray:
        root = np.sqrt(data_variance)

        def angle(t: np.ndarray | float) -> np.ndarray:
            x = self._angle(t)
            return np.arctan2(root * np.sin(x), np.cos(x))

        return 2.0 * self.horizon / (np.pi * root) * (angle(t1) - angle(t0))


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    """alpha = 1, beta^2 = scale^2 (1 - t/T): constant sigma = scale / sqrt(T).

    The start is nearly memoryless only for a scale far above the data's spread.
    """

    scale: float = 10.0

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        if not self.scale > 0:
            raise ParameterError(f"scale {self.scale!r} must be positive")

    def alpha(self, t: np.ndarray | float) -> np.ndarray:
        return np.ones_like(np.asarray(t, float))

    def variance(self, t: np.ndarray | float) -> np.ndarray:
        return self.scale**2 * (1.0 - np.asarray(t, float) / self.horizon)

    def alpha_slope(self, t: np.ndarray | float) -> np.ndarray:
        return np.zeros_like(np.asarray(t, float))

    def variance_slope(self, t: np.ndarray | float) -> np.ndarray:
        return np.full_like(np.asarray(t, float), -(self.scale**2) / self.horizon)

    def inverse_variance_integral(
        self, t0: np.ndarray | float, t1: np.ndarray | float, data_variance: float
    ) -> np.ndarray:
        def log_q(t: np.ndarray | float) -> np.ndarray:
            return np.log(data_variance + self.variance(t))

        return self.horizon / self.scale**2 * (log_q(t0) - log_q(t1))


SCHEDULES: dict[str, type[Schedule]] = {
    "vp": VariancePreserving,
    "linear_flow": LinearFlow,
    "cosine": Cosine,
    "ve": VarianceExploding,
}


def make_schedule(name: str, horizon: float, rate: float) -> Schedule:
    """Return a schedule by name.

    Parameters
    ----------
    name : "vp", "linear_flow", "cosine" or "ve".
    horizon : > 0.
    rate : the rate of "vp" (> 0), the noise scale of "ve" (> 0); unused otherwise.
    """
    if name == "vp":
        return VariancePreserving(horizon, rate)
    if name == "ve":
        return VarianceExploding(horizon, rate)
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    return SCHEDULES[name](horizon)
