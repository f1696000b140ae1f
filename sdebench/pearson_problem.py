"""Polynomial (Pearson) diffusions with noise that depends on the state.

    dX_i = b(X_i) dt + sigma s(X_i) (u_i dt + dW_i),   X_0 = x_0,

with an affine b and a quadratic polynomial s^2, in every coordinate; one control for
all.  The simulation is Euler-Maruyama with the noise truncated, see
`sdebench.simulate.tables.SeparableTables`.  Answers are those of one coordinate times
their number; a closed form of the line (`sdebench.closed_form.square_root` and others)
gives them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.polynomial import polynomial

from sdebench.certified_truth import CertifiedTruth, root_bound
from sdebench.closed_form.grid_chain import PolicyAnswers
from sdebench.errors import ParameterError
from sdebench.problem import (
    EULER,
    Array,
    Steps,
    as_states,
    as_time,
    check_scheme,
)
from sdebench.separable_problem import SeparableProblem


@dataclass(frozen=True, kw_only=True)
class PearsonProblem(SeparableProblem):
    """Independent coordinates, all alike, from a point."""

    control_power: ClassVar[int] = 1
    """Whether u is s(x) times a polynomial, 1, or a polynomial, 0."""

    dim: int = 1
    start: float = 1.0
    horizon: float = 1.0

    # ---- what a subclass writes ---------------------------------------------------
    @property
    @abstractmethod
    def line(self) -> Any:
        """The closed form of one coordinate."""

    @property
    @abstractmethod
    def drift_coefficients(self) -> tuple[float, float]:
        """b_0 and b_1 of b(x) = b_0 + b_1 x."""

    @property
    @abstractmethod
    def variance(self) -> tuple[float, float, float]:
        """The coefficients of s^2, lowest power first."""

    @abstractmethod
    def features(self, t: Array) -> Array:
        """Return du/dtheta, without s, as polynomials at times t (n,): (P, n, J)."""

    @abstractmethod
    def reward_tables(self) -> dict[str, Array]:
        """Return the fields of the reward for one coordinate, (1, J)."""

    # ---- the problem --------------------------------------------------------------
    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ParameterError(f"dim {self.dim} must be at least 1")
        for name in ("horizon", *self.positive):
            if not getattr(self, name) > 0:
                raise ParameterError(f"{name} {getattr(self, name)} must be positive")

    @property
    def positive(self) -> tuple[str, ...]:
        """Names of the parameters that must be positive."""
        return ()

    @property
    def problem_class(self) -> str:
        return "polynomial diffusion"

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.horizon

    @cached_property
    def truth(self) -> PearsonTruth:
        return PearsonTruth(self)

    def noise_factor(self, x: Array) -> Array:
        """Return s(x), zero where s^2 is negative; shape of x."""
        return np.sqrt(np.maximum(polynomial.polyval(x, self.variance), 0.0))

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        constant, slope = self.drift_coefficients
        return np.asarray(constant + slope * as_states(x, self.dim))

    def diffusion(self, t: float) -> Array:
        as_time(t, self.time_span)
        start = np.full(self.dim, float(self.start))
        return self.sigma * np.diag(self.noise_factor(start))

    def diffusion_at(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        return self.sigma * self.noise_factor(x)[..., None] * np.eye(self.dim)

    def running_cost(self, x: Array, t: float) -> Array:
        return np.zeros(as_states(x, self.dim).shape[:-1])

    # ---- the tables ---------------------------------------------------------------
    def base_coefficients(self, h: Array) -> Array:
        constant, slope = self.drift_coefficients
        base = np.zeros((len(h), self.dim, 2))
        base[:, :, 0] = (constant * h)[:, None]
        base[:, :, 1] = (1.0 + slope * h)[:, None]
        return base

    def gains(self, times: Array) -> Array:
        features = self.features(times[:-1])
        roots = np.sqrt(np.diff(times))[:, None]
        return np.repeat((roots * features)[:, :, None, :], self.dim, axis=2)

    def other_tables(self, times: Array) -> dict[str, Array]:
        reward = self.reward_tables()
        every = {
            name: np.repeat(table, self.dim, axis=0) if table.ndim > 1 else table
            for name, table in reward.items()
        }
        return every | {
            "variance": np.tile(np.array(self.variance), (self.dim, 1)),
            "control_power": np.array([float(self.control_power)]),
            "start_mean": np.full(self.dim, float(self.start)),
        }


class PearsonTruth(CertifiedTruth):
    """Exact answers of a `PearsonProblem`."""

    _problem: PearsonProblem

    def _numbers(
        self, what: str, theta: Array | None, times: Array | None, level: int
    ) -> Array:
        """Return answers summed over the coordinates.

        Parameters
        ----------
        what : "policy" (`PolicyAnswers`), "cross_entropy" (its gradient), or of the
            N-step chain "tilt" (log Z) and "best" (the least cost, and the square of
            the distance from u*_N).
        """
        line = self._problem.line
        found: Any
        if what == "policy":
            assert theta is not None
            if times is None:
                policy: PolicyAnswers = line.policy(theta, line.levels[level])
            else:
                policy = line.chain(theta, times)
            found = policy.stacked()
        elif what == "cross_entropy":
            if times is None:
                found = line.cross_entropy_gradient(theta, line.levels[level])
            else:
                found = line.chain_cross_entropy_gradient(theta, times)
        elif what == "tilt":
            found = line.chain_log_normalizer(times)
        else:
            found = line.chain_optimum(theta, times)
        return self._problem.dim * np.atleast_1d(found)

    # ---- answers ------------------------------------------------------------------
    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        check_scheme(scheme)
        if n_steps is not None:
            return float(self._remembered("tilt", None, n_steps)[0])
        start = np.full(self._problem.dim, float(self._problem.start))
        return -float(self.value(start, 0.0))

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is None:
            return -self.log_normalizer()
        zero = np.zeros(self._problem.n_params)
        return float(self._remembered("best", zero, n_steps)[0])

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        if n_steps is None:
            return super().control_error(theta)
        theta = self._problem.theta(theta)
        return float(np.sqrt(self._remembered("best", theta, n_steps)[1]))

    def cross_entropy_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        check_scheme(scheme)
        theta = self._problem.theta(theta)
        return self._remembered("cross_entropy", theta, n_steps).copy()

    def discrete_control(self, x: Array, step: int, n_steps: int) -> Array:
        times = self._problem.time_grid(n_steps)
        states = as_states(x, self._problem.dim)
        return np.asarray(self._problem.line.chain_control(states, step, times))

    def error_bound(
        self, quantity: str, theta: Any = None, n_steps: Steps = None
    ) -> float:
        problem = self._problem
        chosen = problem.theta("optimum" if theta is None else theta)
        if quantity == "cross_entropy_gradient":
            return float(np.linalg.norm(self._bound("cross_entropy", chosen, n_steps)))
        if n_steps is not None and quantity in ("optimal_cost", "control_error"):
            bounds = self._bound("best", chosen, n_steps)
            if quantity == "optimal_cost":
                return float(bounds[0])
            return root_bound(self.control_error(chosen, n_steps), float(bounds[1]))
        bound = super().error_bound(quantity, theta, n_steps)
        if n_steps is None or quantity == "log_normalizer":
            return bound
        error = problem.line.chain_error(chosen, problem.time_grid(n_steps))
        return bound + float(problem.dim * error)

    # ---- functions of state and time ------------------------------------------------
    def value(self, x: Array, t: float) -> Array:
        states, time = self._at(x, t)
        return np.asarray(self._problem.line.value(states, time).sum(axis=-1))

    def control(self, x: Array, t: float) -> Array:
        states, time = self._at(x, t)
        return np.asarray(self._problem.line.control(states, time))

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        states, time = self._at(x, t)
        problem = self._problem
        features = problem.features(np.array([time]))[:, 0]
        values = polynomial.polyval(states, problem.theta(theta) @ features)
        if problem.control_power:
            values = problem.noise_factor(states) * values
        return np.asarray(values)

    def tilted_moments(self, t: float) -> tuple[Array, Array]:
        dim, time = self._problem.dim, as_time(t, self._problem.time_span)
        mean, variance = self._problem.line.tilted_moments(time)
        return np.full(dim, mean), variance * np.eye(dim)
