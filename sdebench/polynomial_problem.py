"""Ornstein-Uhlenbeck coordinates with the log of a positive polynomial as reward."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.polynomial import polynomial

from sdebench.certified_truth import CertifiedTruth, best_in_family
from sdebench.closed_form.polynomial_tilt import PolynomialTilt
from sdebench.errors import NotExactError, ParameterError
from sdebench.problem import (
    EULER,
    Array,
    Steps,
    as_states,
    as_time,
    check_scheme,
)
from sdebench.separable_problem import SeparableProblem, temporal_profiles

if TYPE_CHECKING:
    from sdebench.closed_form.gaussian_mixture import GaussianMixture

LEVELS = (12, 0.035), (8, 0.045)
"""Panels in time and spacing in standard deviations: of answers, and their check."""


@dataclass(frozen=True, kw_only=True)
class PolynomialProblem(SeparableProblem):
    """Independent coordinates, all alike, with an affine control family."""

    dim: int = 1
    rate: float = 0.5
    start_mean: float = 0.0
    start_scale: float = 1.0
    horizon: float = 1.0

    @property
    @abstractmethod
    def coefficients(self) -> Array:
        """The polynomial's coefficients, lowest power first; it must be positive."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ParameterError(f"dim {self.dim} must be at least 1")
        if not self.horizon > 0:
            raise ParameterError(f"horizon {self.horizon} must be positive")
        if not self.start_scale >= 0:
            raise ParameterError(f"start_scale {self.start_scale} must be at least 0")

    @property
    def problem_class(self) -> str:
        return "polynomial diffusion"

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.horizon

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "feedback", "feedback_slope", "offset", "offset_slope"

    @cached_property
    def truth(self) -> PolynomialTruth:
        return PolynomialTruth(self)

    @cached_property
    def theta_star(self) -> Array:
        """The minimizer of J in the family."""
        return best_in_family(self)

    @cached_property
    def line(self) -> PolynomialTilt:
        """One coordinate."""
        return PolynomialTilt(
            self.rate,
            self.coefficients,
            self.horizon,
            (self.start_mean, self.start_scale**2),
            self.profiles,
        )

    def profiles(self, t: Array) -> Array:
        """Return the temporal profiles 1 and s at times t (...), (..., 2)."""
        return temporal_profiles(t, self.horizon)

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        return -self.rate * as_states(x, self.dim)

    def running_cost(self, x: Array, t: float) -> Array:
        return np.zeros(as_states(x, self.dim).shape[:-1])

    def reward(self, x: Array) -> Array:
        states = as_states(x, self.dim)
        values = polynomial.polyval(states, self.coefficients)
        return np.asarray(np.log(values).sum(axis=-1))

    def base_coefficients(self, h: Array) -> Array:
        base = np.zeros((len(h), self.dim, 2))
        base[:, :, 1] = (1.0 - h * self.rate)[:, None]
        return base

    def gains(self, times: Array) -> Array:
        roots = np.sqrt(np.diff(times))[:, None]
        pushes = (roots * self.profiles(times[:-1])).T[:, :, None]
        gains = np.zeros((4, len(times) - 1, self.dim, 2))
        gains[:2, ..., 1] = -pushes
        gains[2:, ..., 0] = pushes
        return gains

    def other_tables(self, times: Array) -> dict[str, Array]:
        return {
            "reward_factor": np.tile(self.coefficients, (self.dim, 1)),
            "start_mean": np.full(self.dim, float(self.start_mean)),
            "start_factor": self.start_scale * np.eye(self.dim),
        }


class PolynomialTruth(CertifiedTruth):
    """Exact answers of a `PolynomialProblem`."""

    _problem: PolynomialProblem

    def _numbers(
        self, what: str, theta: Array | None, times: Array | None, level: int
    ) -> Array:
        """Return `PolicyAnswers`, or "tilt": log Z and E log h(X_0, t_0)."""
        line, (panels, spacing) = self._problem.line, LEVELS[level]
        if what == "tilt":
            h = line.h(0.0) if times is None else line.chain_h(times)

            def level_of(x: Array) -> Array:
                return np.asarray(polynomial.polyval(x, h))

            mean = line.over_start(level_of, spacing)
            mean_log = line.over_start(lambda x: np.log(level_of(x)), spacing)
            return self._problem.dim * np.array([np.log(mean), mean_log])
        assert theta is not None
        if times is None:
            found = line.policy(theta, panels, spacing)
        else:
            found = line.chain(theta, times, spacing)
        return self._problem.dim * found.stacked()

    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        check_scheme(scheme)
        return float(self._remembered("tilt", None, n_steps)[0])

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is not None:
            return super().optimal_cost(n_steps, scheme)
        return -float(self._remembered("tilt", None, None)[1])

    def error_bound(
        self, quantity: str, theta: Any = None, n_steps: Steps = None
    ) -> float:
        if quantity in ("log_normalizer", "optimal_cost"):
            row = int(quantity == "optimal_cost")
            return float(self._bound("tilt", None, n_steps)[row])
        return super().error_bound(quantity, theta, n_steps)

    # ---- functions of state and time ------------------------------------------------
    def value(self, x: Array, t: float) -> Array:
        states, time = self._at(x, t)
        h = self._problem.line.h(time)
        return np.asarray(-np.log(polynomial.polyval(states, h)).sum(axis=-1))

    def control(self, x: Array, t: float) -> Array:
        states, time = self._at(x, t)
        h = self._problem.line.h(time)
        slope = polynomial.polyval(states, polynomial.polyder(h))
        return np.asarray(slope / polynomial.polyval(states, h))

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        states, time = self._at(x, t)
        rho, theta = (
            self._problem.profiles(np.asarray(time)),
            self._problem.theta(theta),
        )
        return -float(rho @ theta[:2]) * states + float(rho @ theta[2:])

    def base_marginal(self, t: float) -> GaussianMixture:
        from sdebench.closed_form.gaussian_mixture import GaussianMixture

        problem = self._problem
        time = as_time(t, problem.time_span)
        growth = np.exp(-problem.rate * time)
        noise = time
        if problem.rate:
            noise = -np.expm1(-2.0 * problem.rate * time) / (2.0 * problem.rate)
        variance = growth**2 * problem.start_scale**2 + noise
        if variance == 0.0:
            return self._no_law(t)
        mean = np.full(problem.dim, growth * problem.start_mean)
        return GaussianMixture.normal(mean, variance * np.eye(problem.dim))

    def tilted_marginal(self, t: float) -> GaussianMixture:
        if as_time(t, self._problem.time_span) == 0.0:
            return self.base_marginal(t)
        raise NotExactError("the law under u* is not a mixture of Gaussians")
