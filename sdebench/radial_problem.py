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
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.closed_form.radial import RadialAnswers, RadialProcess
from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    NumericalError,
    ParameterError,
)
from sdebench.problem import (
    EULER,
    Array,
    Problem,
    Steps,
    Truth,
    as_states,
    as_time,
    check_noisy,
    check_scheme,
)
from sdebench.simulate.tables import SeparableTables

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.closed_form.gaussian_mixture import GaussianMixture

LEVELS = (40, 1.0), (28, 0.8)
"""Panels in time and density of the nodes: of an answer, and to bound its error."""
ROUNDING = 4e-14
NO_OPTIMUM = (
    "the optimum of the N-step chain has no closed form with a cost that is not "
    "quadratic"
)
UNLIMITED = 1e30


@dataclass(frozen=True, kw_only=True)
class RadialProblem(Problem):
    """Brownian motion from the origin with costs of |x|^2, linear feedback.

    A subclass has the attributes ``dim`` and ``horizon``.
    """

    schemes: ClassVar[tuple[str, ...]] = (EULER,)
    family_holds_optimum: ClassVar[bool] = False

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

    @abstractmethod
    def reward_tables(self) -> dict[str, Array]:
        """Return the fields of `SeparableTables` that hold the reward."""

    def wave(self, times: Array) -> Array:
        """Return the field ``wave`` of `SeparableTables`."""
        return np.zeros((0, 4))

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
        t = np.asarray(t, dtype=np.float64)
        return np.stack([np.ones_like(t), 2.0 * t / self.horizon - 1.0], axis=-1)

    @cached_property
    def truth(self) -> RadialTruth:
        return RadialTruth(self)

    @cached_property
    def theta_star(self) -> Array:
        """The minimizer of J in the family, by Newton's method on its gradient."""
        theta, truth = np.zeros(2), self.truth
        size, step = np.inf, 1e-4
        for _ in range(80):
            gradient = truth.gradient(theta)
            before, size = size, float(np.linalg.norm(gradient))
            if size <= 1e-14 or (size >= before and size <= 1e-10):
                return theta
            rows = [
                (truth.gradient(theta + e) - truth.gradient(theta - e)) / (2.0 * step)
                for e in step * np.eye(2)
            ]
            change = np.linalg.solve(
                0.5 * (np.array(rows) + np.array(rows).T), gradient
            )
            # far from the minimum a whole step may overshoot
            theta = theta - change / max(1.0, float(np.linalg.norm(change)))
        raise NumericalError(
            f"no minimizer of J was found in the control family of {self.label}; "
            "reduce the horizon"
        )

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        return np.zeros_like(as_states(x, self.dim))

    def diffusion(self, t: float) -> Array:
        as_time(t, self.time_span)
        return self.sigma * np.eye(self.dim)

    def running_cost(self, x: Array, t: float) -> Array:
        s = np.sum(as_states(x, self.dim) ** 2, axis=-1)
        running = self.process.running
        return np.zeros_like(s) if running is None else running[0](s, np.asarray(t))

    def reward(self, x: Array) -> Array:
        s = np.sum(as_states(x, self.dim) ** 2, axis=-1)
        return -self.process.cost[0](s)

    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> SeparableTables:
        check_scheme(scheme)
        check_noisy(noisy, len(times) - 1, scheme)
        if scheme != EULER:
            raise NotApplicableError(
                f"scheme {scheme} is that of {EULER} for a base process without drift; "
                f"give {EULER}"
            )
        if noisy is not None and not np.all(noisy):
            raise NotApplicableError(
                "steps without noise need a memoryless base process with a probability "
                "flow; a process from a fixed point has none"
            )
        h, dim = np.diff(times), self.dim
        base = np.zeros((len(h), dim, 2))
        base[:, :, 1] = 1.0
        gains = np.zeros((2, len(h), dim, 2))
        gains[..., 1] = -(np.sqrt(h)[:, None] * self.profiles(times[:-1])).T[:, :, None]
        weights = np.zeros(2) if theta is None else np.asarray(theta, float)
        return SeparableTables(
            reach=np.array([UNLIMITED]),
            base=base,
            beyond=np.ones((len(h), dim)),
            noise=self.sigma * np.sqrt(h)[:, None] * np.ones(dim),
            gain=np.tensordot(weights, gains, 1),
            gain_derivative=gains,
            running=np.zeros((len(h), 0, 0)),
            reward_factor=np.zeros((0, 0)),
            wave=self.wave(times),
            start_mean=np.zeros(dim),
            start_factor=np.zeros((dim, dim)),
            **self.reward_tables(),
        )


class RadialTruth(Truth):
    """Exact answers of a `RadialProblem`."""

    _problem: RadialProblem

    def __init__(self, problem: RadialProblem) -> None:
        super().__init__(problem)
        self._known: dict[tuple[bytes, bytes, int], Array] = {}

    def _answers(self, theta: Array, n_steps: Steps, level: int = 0) -> Array:
        """Return `RadialAnswers`, stacked; remembered."""
        times = None if n_steps is None else self._problem.time_grid(n_steps)
        key = theta.tobytes(), b"" if times is None else times.tobytes(), level
        if key not in self._known:
            panels, density = LEVELS[level]
            process = self._problem.process
            self._known[key] = (
                process.policy(theta, panels, density)
                if times is None
                else process.chain(theta, times, density)
            ).stacked()
        return self._known[key]

    def _policy(self, theta: Any, n_steps: Steps, scheme: str) -> RadialAnswers:
        check_scheme(scheme)
        theta = self._problem.theta(theta)
        return RadialAnswers.unstacked(self._answers(theta, n_steps))

    def objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        return self._policy(theta, n_steps, scheme).objective

    def gradient(self, theta: Any, n_steps: Steps = None, scheme: str = EULER) -> Array:
        return self._policy(theta, n_steps, scheme).gradient.copy()

    def reward_only_objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        return self._policy(theta, n_steps, scheme).reward_only_objective

    def reward_only_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        return self._policy(theta, n_steps, scheme).reward_only_gradient.copy()

    def matching_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        return self._policy(theta, n_steps, scheme).matching_gradient.copy()

    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is not None and self._problem.process.running is not None:
            raise NotExactError(
                "log Z of the N-step chain has no closed form with this running cost"
            )
        # Without control the chain is Brownian motion at its own times.
        value, _ = self._problem.value_and_slope(np.zeros(1), 0.0)
        return -float(value[0])

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is not None:
            raise NotExactError(NO_OPTIMUM)
        return -self.log_normalizer()

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        if n_steps is not None:
            raise NotExactError(NO_OPTIMUM)
        return self._control_error(self._problem.theta(theta))

    def _control_error(self, theta: Array) -> float:
        excess = self.objective(theta) - self.optimal_cost()
        return float(np.sqrt(2.0 * max(excess, 0.0)))

    def discrete_control(self, x: Array, step: int, n_steps: int) -> Array:
        raise NotExactError(NO_OPTIMUM)

    def policy_chain(
        self,
        theta: Any,
        n_steps: Steps = None,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> PolicyChain:
        raise NotExactError(
            "a cost that is not quadratic has no exact parts of a gradient"
        )

    # ---- functions of state and time ------------------------------------------------
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
            raise NotExactError("X_0 is a point: it has no density")
        covariance = problem.sigma**2 * t * np.eye(problem.dim)
        return GaussianMixture.normal(np.zeros(problem.dim), covariance)

    def tilted_marginal(self, t: float) -> GaussianMixture:
        if as_time(t, self._problem.time_span) == 0.0:
            raise NotExactError("X_0 is a point: it has no density")
        raise NotExactError("the law under u* is not a mixture of Gaussians")

    # ---- bounds ---------------------------------------------------------------------
    def error_bound(self, quantity: str, theta: Any = None) -> float:
        if quantity in ("value", "log_normalizer", "optimal_cost"):
            return ROUNDING * (1.0 + abs(self.log_normalizer()))
        theta = self._problem.theta("optimum" if theta is None else theta)
        fine, coarse = (self._answers(theta, None, level) for level in (0, 1))
        bounds = np.abs(fine - coarse) + ROUNDING * (1.0 + np.max(np.abs(fine)))
        if quantity == "control_error":
            bound = 2.0 * (float(bounds[0]) + self.error_bound("optimal_cost"))
            size = self._control_error(theta)
            return min(bound / size, np.sqrt(bound)) if size else float(np.sqrt(bound))
        part = getattr(RadialAnswers.unstacked(bounds), quantity)
        return float(np.linalg.norm(part))
