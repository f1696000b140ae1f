"""Problems without closed form whose answers a grid gives, each with an error bound.

The N-step answers come from `sdebench.closed_form.grid_chain.GridChain` on the
problem's own tables, those of continuous time from extrapolation in the step.  The
control family need not hold the optimal control: theta* is its best member.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.closed_form.grid_chain import (
    Certified,
    Extrapolation,
    Grid,
    GridChain,
    PolicyAnswers,
    ValueFunction,
    certify,
)
from sdebench.errors import NotExactError
from sdebench.problem import EULER, Array, Problem, Steps, Truth, as_states, as_time

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.closed_form.gaussian_mixture import GaussianMixture
    from sdebench.simulate.tables import SineTables

LEVELS = Extrapolation((24, 32, 48, 64, 96, 128))
"""Numbers of steps from which continuous time is extrapolated."""
SEARCH = Extrapolation((12, 16, 24, 32))
"""The same for theta*, whose error does not matter."""
REFINEMENTS = (1, 2, 3, 4)
"""Steps per time of the value function."""
N_TIMES = 64


@dataclass(frozen=True, kw_only=True)
class GridProblem(Problem):
    """A problem whose chain, an angle and its velocity, lives on a grid."""

    schemes: ClassVar[tuple[str, ...]] = (EULER,)
    family_holds_optimum: ClassVar[bool] = False

    @property
    def problem_class(self) -> str:
        return "certified reference"

    @property
    def dim(self) -> int:
        return 2

    @property
    @abstractmethod
    def grids(self) -> tuple[Grid, ...]:
        """The grid of a control's answers, and those that bound its error."""

    @property
    @abstractmethod
    def value_grids(self) -> tuple[Grid, ...]:
        """The same for value functions, which have ridges: see `certify`."""

    @abstractmethod
    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> SineTables: ...

    @abstractmethod
    def policy(self, x: Array, t: float, theta: Array) -> Array:
        """Return the control u_theta(x, t), shape of x (..., 2)."""

    @cached_property
    def truth(self) -> GridTruth:
        return _truth(self)

    def best_parameters(self, guess: Array) -> Array:
        """Return the theta of least J, from a guess nearby."""
        from scipy.optimize import minimize

        grid = self.grids[1]

        def cost(theta: Array) -> tuple[float, Array]:
            every = [self.tables(theta, self.time_grid(n)) for n in SEARCH.levels]
            levels = [GridChain(t, grid.widened(t)).policy() for t in every]
            values = SEARCH.weights @ np.stack([level.stacked() for level in levels])
            found = PolicyAnswers.unstacked(values)
            return found.objective, found.gradient

        found = minimize(cost, guess, jac=True, method="BFGS", options={"gtol": 1e-9})
        return np.asarray(found.x)


@lru_cache(maxsize=8)
def _truth(problem: GridProblem) -> GridTruth:
    """Return the truth of all problems that are equal: its answers take seconds."""
    return GridTruth(problem)


class GridTruth(Truth):
    """Certified answers of a `GridProblem`; `error_bound` has the bound of each."""

    precision: ClassVar[float] = 1e-6

    _problem: GridProblem

    def __init__(self, problem: GridProblem) -> None:
        super().__init__(problem)
        self._known: dict[tuple[str, bytes, bytes], Certified] = {}
        self._optima: dict[tuple[bytes, Grid], tuple[float, list[Array]]] = {}

    # ---- answers of a chain ---------------------------------------------------------
    def _certified(
        self,
        what: str,
        answer: Callable[[GridChain], Array],
        theta: Array | None,
        n_steps: Steps,
        scheme: str = EULER,
    ) -> Certified:
        """Return an answer of the N-step chain, or its limit; remembered."""
        problem = self._problem
        times = None if n_steps is None else problem.time_grid(n_steps)
        grids = problem.grids if what == "policy" else problem.value_grids
        key = (
            what,
            b"" if theta is None else theta.tobytes(),
            b"" if times is None else times.tobytes(),
        )

        def on_grid(times: Array, grid: Grid) -> Array:
            tables = problem.tables(theta, times, scheme)
            return answer(GridChain(tables, grid.widened(tables)))

        if key not in self._known:
            if times is None:
                self._known[key] = LEVELS.limit(
                    lambda n, grid: on_grid(problem.time_grid(n), grid), grids
                )
            else:
                self._known[key] = certify(lambda grid: on_grid(times, grid), grids)
        return self._known[key]

    def _policy(
        self, theta: Any, n_steps: Steps, scheme: str = EULER
    ) -> tuple[PolicyAnswers, PolicyAnswers]:
        """Return the answers for a control, and the bounds of their errors."""
        found = self._certified(
            "policy",
            lambda chain: chain.policy().stacked(),
            self._problem.theta(theta),
            n_steps,
            scheme,
        )
        return PolicyAnswers.unstacked(found.value), PolicyAnswers.unstacked(
            found.error
        )

    def _tilt(self, n_steps: Steps, scheme: str = EULER) -> Certified:
        """Return log Z and E log h(X_0, t_0)."""
        return self._certified(
            "tilt",
            lambda chain: np.array(chain.log_normalizer()),
            None,
            n_steps,
            scheme,
        )

    def _best(self, theta: Any, n_steps: Steps, scheme: str = EULER) -> Certified:
        """Return the least cost of the N-step chain and the distance from u*_N."""
        times = self._problem.time_grid(n_steps)

        def answer(chain: GridChain) -> Array:
            cost, controls = self._optimum(chain, times)
            return np.array([cost, chain.control_distance(controls)])

        theta = self._problem.theta(theta)
        return self._certified("best", answer, theta, n_steps, scheme)

    def _optimum(self, chain: GridChain, times: Array) -> tuple[float, list[Array]]:
        """Return the chain's least cost and its controls; they are free of theta."""
        key = times.tobytes(), chain.grid
        if key not in self._optima:
            self._optima[key] = chain.optimal_control()
        return self._optima[key]

    def objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        return self._policy(theta, n_steps, scheme)[0].objective

    def gradient(self, theta: Any, n_steps: Steps = None, scheme: str = EULER) -> Array:
        return self._policy(theta, n_steps, scheme)[0].gradient

    def reward_only_objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        return self._policy(theta, n_steps, scheme)[0].reward_only_objective

    def reward_only_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        return self._policy(theta, n_steps, scheme)[0].reward_only_gradient

    def matching_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        return self._policy(theta, n_steps, scheme)[0].matching_gradient

    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        return float(self._tilt(n_steps, scheme).value[0])

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is None:
            return -float(self._tilt(None).value[1])
        return float(self._best("zero", n_steps, scheme).value[0])

    def discrete_control(self, x: Array, step: int, n_steps: int) -> Array:
        problem, states = self._problem, as_states(x, self._problem.dim)
        times = problem.time_grid(n_steps)
        tables = problem.tables(None, times)
        chain = GridChain(tables, problem.value_grids[0].widened(tables))
        controls = self._optimum(chain, times)[1]
        w = chain.control_at(controls, step, states.reshape(-1, 2))
        u = w.reshape(states.shape[:-1]) / np.sqrt(times[step + 1] - times[step])
        return np.stack([np.zeros_like(u), u], axis=-1)

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        if n_steps is None:
            excess = self.objective(theta) - self.optimal_cost()
            return float(np.sqrt(2.0 * max(excess, 0.0)))
        return float(np.sqrt(self._best(theta, n_steps, scheme).value[1]))

    def policy_chain(
        self,
        theta: Any,
        n_steps: Steps = None,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> PolicyChain:
        raise NotExactError("a nonlinear chain has no exact parts of its gradient")

    # ---- functions of state and time ------------------------------------------------
    def _value_function(self, grid: Grid, n_times: int) -> ValueFunction:
        problem = self._problem
        return ValueFunction(
            lambda times: problem.tables(None, times),
            problem.time_span,
            grid,
            n_times,
            REFINEMENTS,
        )

    @cached_property
    def _value(self) -> ValueFunction:
        return self._value_function(self._problem.value_grids[0], N_TIMES)

    def value(self, x: Array, t: float) -> Array:
        return self._value.value(*self._at(x, t))

    def control(self, x: Array, t: float) -> Array:
        slope = self._value.slope(*self._at(x, t))
        sigma = self._problem.diffusion(t)[1, 1]
        return np.stack([np.zeros_like(slope), -sigma * slope], axis=-1)

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        return self._problem.policy(*self._at(x, t), self._problem.theta(theta))

    def _start_law(self, t: float) -> GaussianMixture:
        from sdebench.closed_form.gaussian_mixture import GaussianMixture

        problem = self._problem
        if as_time(t, problem.time_span) > problem.time_span[0]:
            raise NotExactError("the law of a nonlinear process has no closed form")
        tables = problem.tables(None, problem.time_grid(1))
        if not np.any(tables.start_factor):
            raise NotExactError("X_0 is a point: it has no density")
        return GaussianMixture.normal(
            tables.start_mean, tables.start_factor @ tables.start_factor.T
        )

    def base_marginal(self, t: float) -> GaussianMixture:
        return self._start_law(t)

    def tilted_marginal(self, t: float) -> GaussianMixture:
        return self._start_law(t)

    # ---- bounds ---------------------------------------------------------------------
    def error_bound(
        self, quantity: str, theta: Any = None, n_steps: Steps = None
    ) -> float:
        """Return an absolute error bound: of a vector, of its norm.

        Parameters
        ----------
        quantity : "objective", "gradient", "log_normalizer", ..., or "value" for V
            where |v| <= 3.
        n_steps : bound the answer of the N-step chain instead.
        """
        theta = "optimum" if theta is None else theta
        if quantity == "value":
            return self._value_bound
        if quantity == "log_normalizer":
            return float(self._tilt(n_steps).error[0])
        if quantity == "optimal_cost":
            if n_steps is None:
                return float(self._tilt(None).error[1])
            return float(self._best("zero", n_steps).error[0])
        if quantity == "control_error":
            return self._control_error_bound(theta, n_steps)
        return float(np.linalg.norm(getattr(self._policy(theta, n_steps)[1], quantity)))

    def _control_error_bound(self, theta: Any, n_steps: Steps) -> float:
        """Return the bound of a square root, from that of its argument."""
        if n_steps is None:
            bound = self.error_bound("objective", theta)
            bound = 2.0 * (bound + self.error_bound("optimal_cost"))
        else:
            bound = float(self._best(theta, n_steps).error[1])
        size = self.control_error(theta, n_steps)
        return min(bound / size, float(np.sqrt(bound))) if size else np.sqrt(bound)

    @cached_property
    def _value_bound(self) -> float:
        """How much fewer times, a coarser grid and a smaller box change V."""
        axes = np.linspace(-np.pi, np.pi, 24), np.linspace(-3.0, 3.0, 25)
        x = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
        times = np.linspace(*self._problem.time_span, 9)
        bound = 0.0
        for grid in self._problem.value_grids[1:]:
            other = self._value_function(grid, 3 * N_TIMES // 4)
            gaps = [self._value.value(x, t) - other.value(x, t) for t in times]
            bound += float(np.max(np.abs(gaps)))
        return bound
