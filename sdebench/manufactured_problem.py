"""Problems from a value function of your own (class M).

Any smooth V(x, t), drift b(x, t) and noise sigma(t) make a control problem whose
optimal control, value function and log Z are exact in any dimension, for any nonlinear
drift: the running cost and the reward are those for which V solves the
Hamilton-Jacobi-Bellman equation, see `sdebench.closed_form.manufactured`.

    @dataclass(frozen=True, kw_only=True)
    class MyProblem(ManufacturedProblem):
        dim: int = 2

        def value_function(self, x, t):
            return torch.cos(x).sum(1) * (1.0 + t)

        def drift_function(self, x, t):
            return x - x**3

        def noise(self, t):
            return np.eye(2)

The functions are in torch and simulated as they are, by the torch backend alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.closed_form.manufactured import ManufacturedCosts
from sdebench.errors import NotExactError, ParameterError
from sdebench.problem import (
    EULER,
    Array,
    Problem,
    Truth,
    as_states,
    as_time,
    check_euler_only,
)
from sdebench.simulate.tables import FunctionTables

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.gaussian_mixture import GaussianMixture


@dataclass(frozen=True, kw_only=True)
class ManufacturedProblem(Problem):
    """A chosen value function, drift and noise, from a point.

    A subclass writes `value_function`, `drift_function` and `noise`, and gives ``dim``
    as a field or property.  The control family is

        u_theta(x, t) = (theta_0 + theta_1 s) u*(x, t) - theta_2 x,   s = 2 t / T - 1,

    so that theta* = (1, 0, 0); another one is made by overriding `control_features`,
    `parameter_names` and `theta_star`.

    Parameters
    ----------
    horizon : T > 0.
    """

    schemes: ClassVar[tuple[str, ...]] = (EULER,)
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    source: ClassVar[str] = "the method of manufactured solutions"
    formula: ClassVar[str] = r"""\begin{aligned}
dX_t &= b(X_t, t)\,dt + \sigma(t)\,(u\,dt + dW_t), \quad r(x) = -V(x, T) \\
f &= -\partial_t V - b \cdot \nabla V
  - \tfrac{1}{2} \operatorname{tr}(\sigma \sigma^\top \nabla^2 V)
  + \tfrac{1}{2} |\sigma^\top \nabla V|^2
\end{aligned}"""

    horizon: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.horizon < np.inf:
            raise ParameterError(f"horizon {self.horizon} must be a positive number")

    # ---- what a subclass writes ---------------------------------------------------
    @abstractmethod
    def value_function(self, x: Tensor, t: Tensor) -> Tensor:
        """Return V (n,) for states (n, d) and times (n,); twice differentiable."""

    @abstractmethod
    def drift_function(self, x: Tensor, t: float) -> Tensor:
        """Return the base drift b (n, d) for states (n, d)."""

    @abstractmethod
    def noise(self, t: float) -> Array:
        """Return sigma(t) (d, d), in numpy."""

    @property
    def start(self) -> Array:
        """The point X_0 (d,)."""
        return np.zeros(self.dim)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "optimal", "optimal:s", "feedback"

    @property
    def theta_star(self) -> Array:
        return np.array([1.0, 0.0, 0.0])

    def control_features(self, x: Tensor, t: float) -> Tensor:
        """Return psi (P, n, d) of u_theta = sum_p theta_p psi_p."""
        import torch

        optimal = self.costs.control(x, t)
        return torch.stack([optimal, (2.0 * t / self.horizon - 1.0) * optimal, -x])

    # ---- the problem ---------------------------------------------------------------
    @property
    def problem_class(self) -> str:
        return "manufactured"

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.horizon

    @cached_property
    def costs(self) -> ManufacturedCosts:
        """Running cost, reward and optimal control, functions of torch tensors."""
        return ManufacturedCosts(
            self.value_function, self.drift_function, self.diffusion, self.horizon
        )

    def running_cost_function(self, x: Tensor, t: float) -> Tensor:
        """Return f (n,) for states (n, d)."""
        return self.costs.running_cost(x, t)

    def reward_function(self, x: Tensor) -> Tensor:
        """Return r (n,) for states (n, d)."""
        return self.costs.reward(x)

    def drift(self, x: Array, t: float) -> Array:
        t = as_time(t, self.time_span)
        return self._apply(lambda y: self.drift_function(y, t), x)

    def diffusion(self, t: float) -> Array:
        sigma = np.asarray(self.noise(as_time(t, self.time_span)), np.float64)
        if sigma.shape != (self.dim, self.dim):
            raise ParameterError(
                f"noise returns shape {sigma.shape}; return ({self.dim}, {self.dim})"
            )
        return sigma

    def running_cost(self, x: Array, t: float) -> Array:
        t = as_time(t, self.time_span)
        return self._apply(lambda y: self.costs.running_cost(y, t), x)

    def reward(self, x: Array) -> Array:
        return self._apply(self.costs.reward, x)

    def _apply(self, function: Callable[[Tensor], Tensor], x: Array) -> Array:
        """Return a function of torch states (n, d) at numpy states (..., d)."""
        import torch

        states = as_states(x, self.dim)
        flat = torch.tensor(states.reshape(-1, self.dim))
        found = function(flat).detach().numpy()
        return np.asarray(found.reshape(states.shape[:-1] + found.shape[1:]))

    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> FunctionTables:
        check_euler_only(scheme, noisy, len(times) - 1)
        noise = np.array([self.diffusion(t) for t in times[:-1]])
        return FunctionTables(
            functions=self,
            theta=np.zeros(self.n_params) if theta is None else np.array(theta),
            times=np.array(times),
            noise=np.sqrt(np.diff(times))[:, None, None] * noise,
            start_mean=np.array(self.start, np.float64),
            start_factor=np.zeros((self.dim, self.dim)),
        )

    @cached_property
    def truth(self) -> ManufacturedTruth:
        return ManufacturedTruth(self)


class ManufacturedTruth(Truth):
    """Exact wherever V says it: u*, V, log Z, and that gradients vanish at theta*."""

    _problem: ManufacturedProblem

    def control(self, x: Array, t: float) -> Array:
        t = as_time(t, self._problem.time_span)
        return self._problem._apply(lambda y: self._problem.costs.control(y, t), x)

    def value(self, x: Array, t: float) -> Array:
        t = as_time(t, self._problem.time_span)
        return self._problem._apply(lambda y: self._problem.costs.value_at(y, t), x)

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        problem, t = self._problem, as_time(t, self._problem.time_span)
        weights = problem.theta(theta)

        def control(y: Tensor) -> Tensor:
            features = problem.control_features(y, t)
            return (features.new_tensor(weights)[:, None, None] * features).sum(0)

        return problem._apply(control, x)

    def _log_normalizer(self) -> float:
        return -float(self.value(self._problem.start, 0.0))

    def _optimal_cost(self) -> float:
        return -self._log_normalizer()

    def _objective(self, theta: Array) -> float:
        self._optimum_only(theta)
        return self._optimal_cost()

    def _gradient(self, theta: Array) -> Array:
        self._optimum_only(theta)
        return np.zeros(self._problem.n_params)

    _matching_gradient = _gradient
    _cross_entropy_gradient = _gradient

    def _optimum_only(self, theta: Array) -> None:
        problem = self._problem
        if not problem.family_holds_optimum or not np.array_equal(
            theta, problem.theta_star
        ):
            raise NotExactError(
                "answers for a control are known at the optimum alone, where the "
                "family holds it; ask at the point optimum, or for log_normalizer, "
                "control and value"
            )

    def _reward_only_objective(self, theta: Array) -> float:
        raise NotExactError("the law of X_T has no closed form")

    def _reward_only_gradient(self, theta: Array) -> Array:
        raise NotExactError("the law of X_T has no closed form")

    def base_marginal(self, t: float) -> GaussianMixture:
        raise NotExactError("the law of X_t has no closed form")

    tilted_marginal = base_marginal
