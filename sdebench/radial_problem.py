"""Problems in many dimensions whose costs depend on |x|^2 alone.

    dX = sigma (u dt + dW),   X_0 = 0,   costs f(|x|^2, t) and r(|x|^2)

The control family is linear with a linear temporal profile,

    u_theta(x, t) = -(theta_0 + theta_1 s) x,   s = 2 t / T - 1,

so that X_t ~ N(0, c_t I) and objectives and gradients are exact sums over the law of
chi^2, in continuous time and for N steps: see `sdebench.closed_form.radial`.  The
family does not hold the optimal control, a nonlinear function of |x|: theta* is its
best member.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sdebench.certified_truth import CertifiedTruth, best_in_family
from sdebench.closed_form.radial import RadialProcess
from sdebench.errors import (
    NotExactError,
    ParameterError,
)
from sdebench.problem import (
    EULER,
    Array,
    Steps,
    as_states,
    as_time,
)
from sdebench.separable_problem import SeparableProblem, temporal_profiles

if TYPE_CHECKING:
    from sdebench.closed_form.gaussian_mixture import GaussianMixture

LEVELS = (40, 1.0), (28, 0.8)
"""Panels in time and density of the nodes: of an answer, and to bound its error."""


@dataclass(frozen=True, kw_only=True)
class RadialProblem(SeparableProblem):
    """Brownian motion from the origin with costs of |x|^2, linear feedback.

    A subclass has the attributes ``dim`` and ``horizon``.
    """

    if TYPE_CHECKING:

        @property
        def horizon(self) -> float: ...

    # ---- what a subclass writes ---------------------------------------------------
    @property
    @abstractmethod
    def sigma(self) -> float:
        """The noise level."""

    @property
    @abstractmethod
    def process(self) -> RadialProcess:
        """The process and its costs as functions of |x|^2."""

    @abstractmethod
    def value_and_slope(self, s: Array, t: float) -> tuple[Array, Array]:
        """Return V and its derivative in s = |x|^2."""

    # ---- the problem --------------------------------------------------------------
    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ParameterError(f"dim {self.dim} must be at least 1")
        if not self.horizon > 0:
            raise ParameterError(f"horizon {self.horizon} must be positive")

    @property
    def problem_class(self) -> str:
        return "linear, radial cost"

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.horizon

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "feedback", "feedback_slope"

    def profiles(self, t: Array) -> Array:
        """Return the temporal profiles 1 and s at times t (...), (..., 2)."""
        return temporal_profiles(t, self.horizon)

    @cached_property
    def truth(self) -> RadialTruth:
        return RadialTruth(self)

    @cached_property
    def theta_star(self) -> Array:
        """The minimizer of J in the family."""
        return best_in_family(self)

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        return np.zeros_like(as_states(x, self.dim))

    def running_cost(self, x: Array, t: float) -> Array:
        s = np.sum(as_states(x, self.dim) ** 2, axis=-1)
        running = self.process.running
        return np.zeros_like(s) if running is None else running[0](s, np.asarray(t))

    def reward(self, x: Array) -> Array:
        s = np.sum(as_states(x, self.dim) ** 2, axis=-1)
        return -self.process.cost[0](s)

    def base_coefficients(self, h: Array) -> Array:
        return np.tile([0.0, 1.0], (len(h), self.dim, 1))

    def gains(self, times: Array) -> Array:
        gains = np.zeros((2, len(times) - 1, self.dim, 2))
        roots = np.sqrt(np.diff(times))[:, None]
        gains[..., 1] = -(roots * self.profiles(times[:-1])).T[:, :, None]
        return gains


class RadialTruth(CertifiedTruth):
    """Exact answers of a `RadialProblem`."""

    _problem: RadialProblem

    def _numbers(
        self, what: str, theta: Array | None, times: Array | None, level: int
    ) -> Array:
        assert theta is not None
        panels, density = LEVELS[level]
        process = self._problem.process
        if times is None:
            return process.policy(theta, panels, density).stacked()
        return process.chain(theta, times, density).stacked()

    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is not None and self._problem.process.running is not None:
            raise NotExactError(
                "log Z of the N-step chain has no closed form with this running cost"
            )
        # Without control the chain is Brownian motion at its own times.
        value, _ = self._problem.value_and_slope(np.zeros(1), 0.0)
        return -float(value[0])

    def value(self, x: Array, t: float) -> Array:
        states, time = self._at(x, t)
        return self._problem.value_and_slope(np.sum(states**2, axis=-1), time)[0]

    def control(self, x: Array, t: float) -> Array:
        states, time = self._at(x, t)
        slope = self._problem.value_and_slope(np.sum(states**2, axis=-1), time)[1]
        return -2.0 * self._problem.sigma * slope[..., None] * states

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        states, time = self._at(x, t)
        rate = self._problem.profiles(np.asarray(time)) @ self._problem.theta(theta)
        return -float(rate) * states

    def base_marginal(self, t: float) -> GaussianMixture:
        from sdebench.closed_form.gaussian_mixture import GaussianMixture

        problem = self._problem
        if as_time(t, problem.time_span) == 0.0:
            return self._no_law(t)
        covariance = problem.sigma**2 * t * np.eye(problem.dim)
        return GaussianMixture.normal(np.zeros(problem.dim), covariance)
