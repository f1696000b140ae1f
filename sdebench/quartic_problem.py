"""Scalar linear dynamics with a quartic terminal cost.

    dX = a X dt + sigma (u dt + dW),  X_0 ~ N(m_0, s_0^2),  r(x) = -c x^4 / 4

The control family is affine with linear temporal profiles,

    u_theta(x, t) = -(theta_0 + theta_1 s) x - (theta_2 + theta_3 s),  s = 2 (t/T) - 1,

so that X_t is Gaussian and objectives and gradients are exact, in continuous time and
for N steps.  It does not hold the optimal control, which is nonlinear: theta* is the
minimizer of J inside the family.  V, u*, log Z and the law under u* are sums that
converge faster than any power of the spacing, with a bound on their error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from sdebench.closed_form.quartic import HALF_WIDTH, GridLaw, Tilt, tilt
from sdebench.errors import NotExactError, NumericalError, ParameterError
from sdebench.linear_problem import LinearDynamics, LinearTruth, Profile
from sdebench.problem import EULER, Array, Steps

NO_DISCRETE_OPTIMUM = (
    "the optimum of the N-step chain has no closed form with a quartic reward"
)
N_START = 256
"""Nodes of the sums over X_0; their error is far below that of the tilt."""


@dataclass(frozen=True, kw_only=True)
class QuarticProblem(LinearDynamics):
    """A scalar problem whose model has a quartic reward and nothing else in r and f."""

    family_holds_optimum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        model = self.model
        others = model.running, model.reward_quadratic, model.reward_linear
        if model.dim != 1 or any(np.any(other) for other in others):
            raise ParameterError(
                "a QuarticProblem has one dimension and the reward -c x^4 / 4 alone; "
                "build a model without running cost, quadratic and linear reward"
            )

    @property
    def problem_class(self) -> str:
        return "linear, quartic reward"

    @cached_property
    def truth(self) -> QuarticTruth:
        return QuarticTruth(self)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return (
            Profile("feedback", 0, 0),
            Profile("feedback_slope", 0, 1),
            Profile("offset", 1, 0),
            Profile("offset_slope", 1, 1),
        )

    def spatial_map(self, name: str, t: Array) -> tuple[Array, Array]:
        gain, bias = np.zeros((len(t), 1, 1)), np.zeros((len(t), 1))
        (gain if name == "feedback" else bias)[:] = -1.0
        return gain, bias

    @cached_property
    def theta_star(self) -> Array:
        """The minimizer of J in the family, by Newton's method on its gradient."""
        theta, truth = np.zeros(self.n_params), self.truth
        size = np.inf
        for _ in range(60):
            gradient = truth.gradient(theta)
            before, size = size, float(np.linalg.norm(gradient))
            if size <= 1e-14 or (size >= before and size <= 1e-11):
                return theta
            step = np.linalg.solve(self._hessian(theta), gradient)
            # far from the minimum a whole step may overshoot
            theta = theta - step / max(1.0, float(np.linalg.norm(step)))
        raise NumericalError(
            f"no minimizer of J was found in the control family of {self.label}; "
            "reduce the reward's curvature or the horizon"
        )

    def _hessian(self, theta: Array, step: float = 1e-4) -> Array:
        rows = [
            (self.truth.gradient(theta + e) - self.truth.gradient(theta - e))
            / (2.0 * step)
            for e in step * np.eye(len(theta))
        ]
        return 0.5 * (np.array(rows) + np.array(rows).T)


class QuarticTruth(LinearTruth):
    """Exact answers of a `QuarticProblem`."""

    def __init__(self, problem: QuarticProblem) -> None:
        super().__init__(problem)
        model = self._model
        self._rate = float(model.drift_matrix[0, 0])
        self._shift = float(model.drift_offset[0])
        self._noise = float(model.diffusion[0, 0])
        self._curvature = float(np.asarray(model.reward_quartic)[0])
        self._constant = model.reward_constant

    # ---- the base process -----------------------------------------------------------
    def _transition(self, s: float, t: float) -> tuple[float, float, float]:
        """Return E, e, q with X_t | X_s = x ~ N(E x + e, q) under the base."""
        rate, width = self._rate, t - s
        growth = np.exp(rate * width)
        if rate == 0.0:
            return 1.0, self._shift * width, self._noise**2 * width
        integral = np.expm1(rate * width) / rate
        square = np.expm1(2.0 * rate * width) / (2.0 * rate)
        return float(growth), self._shift * integral, self._noise**2 * square

    def _tilt(self, x: Array, t: float) -> tuple[float, Tilt]:
        """Return the growth of X_T in x, and the tilt of X_T given X_t = x (n,)."""
        growth, shift, variance = self._transition(t, self._model.horizon)
        return growth, tilt(self._curvature, growth * x + shift, variance)

    # ---- continuous time ------------------------------------------------------------
    def value(self, x: Array, t: float) -> Array:
        states, time = self._at(x, t)
        found = self._tilt(states.ravel(), time)[1]
        return -found.log_mass.reshape(states.shape[:-1]) - self._constant

    def control(self, x: Array, t: float) -> Array:
        """Return u* = -sigma c E[dX_T/dx X_T^3] under the tilted law given X_t = x."""
        states, time = self._at(x, t)
        growth, found = self._tilt(states.ravel(), time)
        cube = found.cube.reshape(states.shape)
        return -self._noise * self._curvature * growth * cube

    def _terminal_tilt(self) -> Tilt:
        mean, variance = self._model.base_moments([self._model.horizon])
        return tilt(self._curvature, mean[0], float(variance[0, 0, 0]))

    def _log_normalizer(self) -> float:
        return float(self._terminal_tilt().log_mass[0]) + self._constant

    def _start(self) -> tuple[Array, Array]:
        """Return nodes and weights of the law of X_0."""
        mean = self._model.start_mean
        spread = np.sqrt(self._model.start_covariance[0, 0])
        if spread == 0.0:
            return mean, np.ones(1)
        z = np.linspace(-HALF_WIDTH, HALF_WIDTH, N_START + 1)
        weights = np.exp(-0.5 * z**2)
        return mean + spread * z, weights / weights.sum()

    def _optimal_cost(self) -> float:
        nodes, weights = self._start()
        return float(weights @ self.value(nodes[:, None], 0.0))

    def tilted_marginal(self, t: float) -> Any:
        """Return the law of X_t under u*, a `GridLaw`."""
        model = self._model
        spread = np.sqrt(model.start_covariance[0, 0])
        growth, shift, variance = self._transition(0.0, t)
        mean, root = growth * model.start_mean[0] + shift, growth * spread
        width = float(np.sqrt(variance + root**2))
        if width == 0.0:
            raise NotExactError("X_0 is a point: it has no density")
        nodes = mean + width * np.linspace(-HALF_WIDTH, HALF_WIDTH, 2 * N_START + 1)
        # X_0 given X_t = y under the base, N(centre, narrow^2)
        gain = spread * root / width**2
        centre = model.start_mean[0] + gain * (nodes - mean)
        narrow = spread * np.sqrt(variance) / width
        z = np.linspace(-HALF_WIDTH, HALF_WIDTH, N_START + 1)
        weights = np.exp(-0.5 * z**2)
        start = centre[:, None] + narrow * z
        inverse = np.exp(self.value(start.reshape(-1, 1), 0.0)).reshape(start.shape)
        ratio = inverse @ weights / weights.sum()
        log_base = -0.5 * ((nodes - mean) / width) ** 2
        log_base -= np.log(width * np.sqrt(2.0 * np.pi))
        log_h = -self.value(nodes[:, None], t)
        return GridLaw(nodes, log_base + log_h + np.log(ratio))

    def _control_error(self, theta: Array) -> float:
        excess = self._objective(theta) - self._optimal_cost()
        return float(np.sqrt(2.0 * max(excess, 0.0)))

    def error_bound(self, quantity: str, theta: Any = None) -> float:
        if quantity == "log_normalizer":
            return self._terminal_tilt().error_bound
        if quantity in ("optimal_cost", "control_error"):
            bound = self._tilt(self._start()[0], 0.0)[1].error_bound
            if quantity == "optimal_cost":
                return bound
            theta = self._problem.theta("optimum" if theta is None else theta)
            bound += super().error_bound("objective", theta)
            return bound / max(self._control_error(theta), np.sqrt(bound))
        return super().error_bound(quantity, theta)

    # ---- N steps --------------------------------------------------------------------
    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is None:
            return self._log_normalizer()
        chain, (gain, bias, _, _) = self._discrete("zero", n_steps, scheme)
        means, covariances = chain.moments(0.0 * gain, 0.0 * bias)
        found = tilt(self._curvature, means[-1], float(covariances[-1, 0, 0]))
        return float(found.log_mass[0]) + self._constant

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is None:
            return self._optimal_cost()
        raise NotExactError(NO_DISCRETE_OPTIMUM)

    def discrete_control(self, x: Array, step: int, n_steps: int) -> Array:
        raise NotExactError(NO_DISCRETE_OPTIMUM)

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        if n_steps is None:
            return self._control_error(self._problem.theta(theta))
        raise NotExactError(NO_DISCRETE_OPTIMUM)
