"""Neal's funnel from a pinned start.

Base      dX = u dt + dW,  X_0 = 0,  t in [0, T],  so p_T = N(0, T I)
Target    x_0 ~ N(0, spread^2),  x_i | x_0 ~ N(0, e^{x_0}) for i = 1, ..., d - 1
Reward    r = log(target / p_T)

    log Z = 0,   h(x, t) = one integral over the place of x_0 at T,

the other coordinates in closed form: see `sdebench.closed_form.funnel`.  The control
family is affine,

    u_0 = -(theta_0 + theta_1 s) x_0 + theta_2 + theta_3 s,
    u_i = -(theta_4 + theta_5 s) x_i,        s = 2 t / T - 1,

so that X_t is Gaussian and every answer, of the chain too, is closed; theta* is its
best member, the Gaussian that fits the funnel best at that price.

Weights.  E e^r = 1, but E e^{q r} is infinite for every q > 1, under the base and under
every control of the family: given x_0 the integral over x_i has the exponent
-(q e^{-x_0} - (q - 1) / b) x_i^2 / 2, b the variance of x_i in the simulated law, which
is positive where x_0 > log(q b / (q - 1)), whatever b.  Importance weights have the
tail index 1: their mean exists, their variance does not, nor has any estimate that
weighs paths one.  h(x, t) is finite for every x at t > 0, and at t = 0 where all x_i
are 0.  Moments of r itself all exist.

Source: Neal 2003, 10.1214/aos/1056562461 (d = 10, spread 3); Zhang and Chen 2021,
arXiv:2111.15141 (the pinned start); the control family is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.certified_truth import CertifiedTruth, best_in_family
from sdebench.closed_form.funnel import COARSE, FINE, Funnel
from sdebench.errors import ParameterError
from sdebench.problem import EULER, Array, Steps, as_states, as_time, check_scheme
from sdebench.separable_problem import SeparableProblem, temporal_profiles

if TYPE_CHECKING:
    from sdebench.closed_form.gaussian_mixture import GaussianMixture

PANELS = 16, 11
"""Panels in time, of an answer and of its check."""


@dataclass(frozen=True, kw_only=True)
class NealFunnel(SeparableProblem):
    """Neal's funnel: one coordinate sets the scale of all others.

    Parameters
    ----------
    dim : >= 2.
    spread : > 0, standard deviation of x_0 in the target.
    horizon : T > 0.
    """

    weights_have_variance: ClassVar[bool] = False
    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = (
        "Neal 2003, 10.1214/aos/1056562461; pinned start after Zhang and Chen 2021, "
        "arXiv:2111.15141; control family ours"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= u\,dt + dW_t, \quad X_0 = 0 \\
\nu(x) &= \mathcal{N}(x_0; 0, \text{spread}^2)
  \prod_{i=1}^{d-1} \mathcal{N}(x_i; 0, e^{x_0}) \\
r(x) &= \log \frac{\nu(x)}{\mathcal{N}(x; 0, T I)}, \quad f = 0
\end{aligned}"""
    hardness: ClassVar[str] = (
        "Scales from e^{-5} to e^5 in one target: importance weights have infinite "
        "variance, and the reward's gradient grows exponentially."
    )

    dim: int = 10
    spread: float = 3.0
    horizon: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ParameterError(f"dim {self.dim} must be at least 2")
        for name in ("spread", "horizon"):
            if not getattr(self, name) > 0:
                raise ParameterError(f"{name} {getattr(self, name)} must be positive")

    @property
    def problem_class(self) -> str:
        return "certified reference"

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.horizon

    @property
    def parameter_names(self) -> tuple[str, ...]:
        first = "feedback", "feedback_slope", "offset", "offset_slope"
        return (*first, "feedback_others", "feedback_others_slope")

    def profiles(self, t: Array) -> Array:
        """Return the temporal profiles 1 and s at times t (...), (..., 2)."""
        return temporal_profiles(t, self.horizon)

    @cached_property
    def process(self) -> Funnel:
        """The exact algebra."""
        return Funnel(self.dim - 1, self.spread, self.horizon, self.profiles)

    @cached_property
    def truth(self) -> FunnelTruth:
        return FunnelTruth(self)

    @cached_property
    def theta_star(self) -> Array:
        """The minimizer of J in the family."""
        return best_in_family(self)

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        return np.zeros_like(as_states(x, self.dim))

    def running_cost(self, x: Array, t: float) -> Array:
        return np.zeros(as_states(x, self.dim).shape[:-1])

    def reward(self, x: Array) -> Array:
        return self.process.log_reward(as_states(x, self.dim))

    def base_coefficients(self, h: Array) -> Array:
        return np.tile([0.0, 1.0], (len(h), self.dim, 1))

    def gains(self, times: Array) -> Array:
        roots = np.sqrt(np.diff(times))[:, None]
        pushes = (roots * self.profiles(times[:-1])).T  # (2, N)
        gains = np.zeros((6, len(times) - 1, self.dim, 2))
        gains[:2, :, 0, 1] = -pushes
        gains[2:4, :, 0, 0] = pushes
        gains[4:, :, 1:, 1] = -pushes[:, :, None]
        return gains

    def other_tables(self, times: Array) -> dict[str, Array]:
        reward = np.zeros((self.dim, 3))
        reward[:, 2] = 0.5 / self.horizon
        reward[0] += [0.0, -0.5 * (self.dim - 1), -0.5 / self.spread**2]
        reward[0, 0] = 0.5 * self.dim * np.log(self.horizon) - np.log(self.spread)
        return {"reward": reward, "reward_funnel": np.ones(1)}


class FunnelTruth(CertifiedTruth):
    """Exact answers of a `NealFunnel`."""

    _problem: NealFunnel

    def _numbers(
        self, what: str, theta: Array | None, times: Array | None, level: int
    ) -> Array:
        assert theta is not None
        return self._problem.process.answers(theta, times, PANELS[level]).stacked()

    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        """Return 0: the chain without control has the law of X_T exactly."""
        check_scheme(scheme)
        return 0.0

    def _log_h(self, x: Array, t: float, count: int = FINE) -> tuple[Array, Array]:
        states, time = self._at(x, t)
        flat = states.reshape(-1, self._problem.dim)
        value, slope = self._problem.process.log_h(flat, time, count)
        return value.reshape(states.shape[:-1]), slope.reshape(states.shape)

    def value(self, x: Array, t: float) -> Array:
        return -self._log_h(x, t)[0]

    def control(self, x: Array, t: float) -> Array:
        return self._log_h(x, t)[1]

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        states, time = self._at(x, t)
        rho = self._problem.profiles(np.asarray(time))
        theta = self._problem.theta(theta)
        u = -float(rho @ theta[4:]) * states
        u[..., 0] = -float(rho @ theta[:2]) * states[..., 0] + float(rho @ theta[2:4])
        return np.asarray(u)

    def base_marginal(self, t: float) -> GaussianMixture:
        from sdebench.closed_form.gaussian_mixture import GaussianMixture

        problem = self._problem
        time = as_time(t, problem.time_span)
        if time == 0.0:
            return self._no_law(t)
        return GaussianMixture.normal(np.zeros(problem.dim), time * np.eye(problem.dim))

    def error_bound(
        self, quantity: str, theta: Any = None, n_steps: Steps = None
    ) -> float:
        return (
            self._value_bound
            if quantity == "value"
            else super().error_bound(quantity, theta, n_steps)
        )

    @cached_property
    def _value_bound(self) -> float:
        """How much a shorter sum changes V, where the paths of the base go."""
        problem, rng = self._problem, np.random.default_rng(0)
        bound = 0.0
        for t in np.array([0.02, 0.1, 0.3, 0.6, 0.9, 0.98]) * problem.horizon:
            x = 1.5 * np.sqrt(t) * rng.normal(size=(200, problem.dim))
            fine, coarse = (self._log_h(x, t, k)[0] for k in (FINE, COARSE))
            bound = max(bound, float(np.max(np.abs(fine - coarse))))
        return bound
