"""Problems whose coordinates are independent diffusions in polynomial potentials.

    dX_i = b_k(X_i) dt + u_i dt + dW_i,  X_0 = 0,  r(x) = -sum_i g_k(x_i)

with polynomials b_k and g_k of the kind k of coordinate i, and the control family
u_i = sum_p theta_p phi_kp(X_i), polynomials as well, so that the coordinates stay
independent.  Every answer is a sum over kinds of answers on the line, times the number
of coordinates of that kind: in continuous time from
`sdebench.closed_form.line_diffusion`, for N steps from
`sdebench.closed_form.line_chain`, each with an error bound.

Beyond ``reach`` force, control and cost are constant.  In continuous time paths get
there with a probability below rounding; the Euler-Maruyama chain would not have bounded
moments without it (see `sdebench.simulate.tables.SeparableTables`).  The family does
not hold the optimal control: theta* is its best member.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import polynomial

from sdebench.certified_truth import CertifiedTruth, best_in_family, root_bound
from sdebench.closed_form import line_chain, line_diffusion
from sdebench.closed_form.line_chain import LineChain
from sdebench.closed_form.line_diffusion import (
    LineDiffusion,
    Value,
    check_range,
)
from sdebench.problem import (
    EULER,
    Array,
    Steps,
    as_states,
    as_time,
    check_scheme,
)
from sdebench.separable_problem import SeparableProblem


class Kind(NamedTuple):
    """A kind of coordinates: coefficients, lowest power first, and how many."""

    force: Array  # (J,) b
    features: Array  # (P, J) phi; zero rows for parameters of other kinds
    cost: Array  # (J,) g
    copies: int


@dataclass(frozen=True, kw_only=True)
class ProductProblem(SeparableProblem):
    """Independent coordinates of one or more kinds, from X_0 = 0."""

    @property
    @abstractmethod
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of coordinates, in their order."""

    @property
    @abstractmethod
    def reach(self) -> float:
        """Where force, control and cost become constant."""

    @property
    @abstractmethod
    def trusted(self) -> float:
        """How far from 0 the bound of V's error holds."""

    @property
    @abstractmethod
    def end_time(self) -> float:
        """T."""

    @property
    def problem_class(self) -> str:
        return "certified reference"

    @property
    def dim(self) -> int:
        return sum(kind.copies for kind in self.kinds)

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.end_time

    @cached_property
    def truth(self) -> ProductTruth:
        return _truth(self)

    @property
    def theta_star(self) -> Array:
        return best_parameters(self)

    def per_coordinate(self, name: str) -> Array:
        """Return the coefficients ``name`` of every coordinate, (d, ..., J)."""
        parts = [np.asarray(getattr(kind, name)) for kind in self.kinds]
        width = max(part.shape[-1] for part in parts)
        padded = [
            np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, width - p.shape[-1])])
            for p in parts
        ]
        return np.repeat(padded, [kind.copies for kind in self.kinds], axis=0)

    def _evaluate(self, coefficients: Array, x: Array) -> Array:
        """Return sum_j coefficients_ij x_i^j at the clipped x (..., d)."""
        y = np.clip(x, -self.reach, self.reach)
        return np.asarray(polynomial.polyval(y, coefficients.T, tensor=False))

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        return self._evaluate(self.per_coordinate("force"), as_states(x, self.dim))

    def running_cost(self, x: Array, t: float) -> Array:
        return np.zeros(as_states(x, self.dim).shape[:-1])

    def reward(self, x: Array) -> Array:
        states = as_states(x, self.dim)
        return -self._evaluate(self.per_coordinate("cost"), states).sum(axis=-1)

    def policy(self, x: Array, t: float, theta: Array) -> Array:
        """Return u_theta, shape of x (..., d)."""
        features = self.per_coordinate("features")  # (d, P, J)
        return self._evaluate(np.einsum("p,dpj->dj", theta, features), x)

    def base_coefficients(self, h: Array) -> Array:
        base = h[:, None, None] * self.per_coordinate("force")
        base[:, :, 1] += 1.0
        return base

    def gains(self, times: Array) -> Array:
        features = np.moveaxis(self.per_coordinate("features"), 1, 0)  # (P, d, J)
        return np.asarray(
            np.sqrt(np.diff(times))[None, :, None, None] * features[:, None]
        )

    def other_tables(self, times: Array) -> dict[str, Array]:
        return {"reward": -self.per_coordinate("cost")}


@lru_cache(maxsize=16)
def _truth(problem: ProductProblem) -> ProductTruth:
    """Return the truth of all problems that are equal, with what it remembers."""
    return ProductTruth(problem)


@lru_cache(maxsize=16)
def best_parameters(problem: ProductProblem) -> Array:
    """Return the minimizer of J in the family; remembered, it takes seconds."""
    return best_in_family(problem)


def _on_chain(chain: LineChain, what: str) -> Array:
    if what == "policy":
        return chain.policy().stacked()
    if what == "tilt":
        return np.array([chain.log_normalizer()])
    cost, controls = chain.optimal_control()
    return np.array([cost, chain.control_distance(controls)])


class ProductTruth(CertifiedTruth):
    """Certified answers of a `ProductProblem`."""

    _problem: ProductProblem

    def __init__(self, problem: ProductProblem) -> None:
        super().__init__(problem)
        self._lines = [
            LineDiffusion(kind.force, kind.features, kind.cost, problem.end_time)
            for kind in problem.kinds
        ]
        self._counts = [kind.copies for kind in problem.kinds]

    def _numbers(
        self, what: str, theta: Array | None, times: Array | None, level: int
    ) -> Array:
        """Return answers summed over the coordinates.

        Parameters
        ----------
        what : "policy" (`PolicyAnswers`), "tilt" (log Z) or "best" (the least cost of
            the N-step chain, and the distance from u*_N).
        """
        if times is None:
            parts = [self._on_line(one, what, theta, level) for one in self._lines]
        else:
            tables = self._problem.tables(theta, times)
            resolution = line_chain.LEVELS[level]
            parts = [
                _on_chain(LineChain(tables, int(first), resolution), what)
                for first in np.cumsum([0, *self._counts[:-1]])
            ]
        return np.tensordot(self._counts, parts, 1)

    def _on_line(
        self, line: LineDiffusion, what: str, theta: Array | None, level: int
    ) -> Array:
        resolution = line_diffusion.LEVELS[level]
        if what == "tilt":
            return np.array([line.log_h(resolution)])
        assert theta is not None
        return line.policy(theta, resolution).stacked()

    # ---- answers ------------------------------------------------------------------
    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        check_scheme(scheme)
        return float(self._remembered("tilt", None, n_steps)[0])

    def _best(self, theta: Any, n_steps: Steps) -> Array:
        return self._remembered("best", self._problem.theta(theta), n_steps)

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is None:
            return -self.log_normalizer()
        return float(self._best("zero", n_steps)[0])

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        if n_steps is None:
            return super().control_error(theta)
        return float(np.sqrt(self._best(theta, n_steps)[1]))

    def discrete_control(self, x: Array, step: int, n_steps: int) -> Array:
        from scipy.interpolate import CubicSpline

        problem, states = self._problem, as_states(x, self._problem.dim)
        times = problem.time_grid(n_steps)
        tables = problem.tables(None, times)
        found, first = np.empty_like(states), 0
        for count in self._counts:
            chain = LineChain(tables, first, line_chain.FINE)
            spline = CubicSpline(chain.points, chain.optimal_control()[1][step])
            found[..., first : first + count] = spline(
                states[..., first : first + count]
            )
            first += count
        return found / np.sqrt(times[step + 1] - times[step])

    # ---- functions of state and time ------------------------------------------------
    @cached_property
    def _values(self) -> list[Value]:
        return [Value(line, line_diffusion.FINE) for line in self._lines]

    def _by_coordinate(self, x: Array, t: float, slope: bool) -> Array:
        """Return V or its slope coordinate by coordinate, shape of x."""
        check_range(x, self._problem.trusted)
        found, first = np.empty_like(x), 0
        for value, count in zip(self._values, self._counts, strict=True):
            mine = slice(first, first + count)
            answer = value(x[..., mine].ravel(), t)[int(slope)]
            found[..., mine] = answer.reshape(x[..., mine].shape)
            first += count
        return found

    def value(self, x: Array, t: float) -> Array:
        return np.asarray(self._by_coordinate(*self._at(x, t), False).sum(axis=-1))

    def control(self, x: Array, t: float) -> Array:
        return -self._by_coordinate(*self._at(x, t), True)

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        states, time = self._at(x, t)
        return self._problem.policy(states, time, self._problem.theta(theta))

    # ---- bounds ---------------------------------------------------------------------
    def error_bound(
        self, quantity: str, theta: Any = None, n_steps: Steps = None
    ) -> float:
        """Return an absolute error bound: of a vector, of its norm.

        Parameters
        ----------
        quantity : "objective", "gradient", "log_normalizer", ..., or "value" for V
            where no |x_i| exceeds 3/4 of the reach.
        n_steps : bound the answer of the N-step chain instead.
        """
        if quantity == "value":
            return self._value_bound
        if quantity == "log_normalizer":
            return float(self._bound("tilt", None, n_steps)[0])
        if quantity == "optimal_cost" and n_steps is None:
            return float(self._bound("tilt", None, None)[0])
        if n_steps is not None and quantity in ("optimal_cost", "control_error"):
            theta = self._problem.theta("optimum" if theta is None else theta)
            if quantity == "optimal_cost":
                return float(self._bound("best", 0.0 * theta, n_steps)[0])
            bound = float(self._bound("best", theta, n_steps)[1])
            return root_bound(self.control_error(theta, n_steps), bound)
        return super().error_bound(quantity, theta, n_steps)

    @cached_property
    def _value_bound(self) -> float:
        """How much a coarser grid changes V."""
        x = np.linspace(-0.75, 0.75, 61) * self._problem.reach
        times = np.linspace(0.0, 0.98, 8) * self._problem.end_time
        bound = 0.0
        for line, value, count in zip(
            self._lines, self._values, self._counts, strict=True
        ):
            other = Value(line, line_diffusion.COARSE)
            gaps = [np.abs(value(x, t)[0] - other(x, t)[0]) for t in times]
            bound += count * float(np.max(gaps))
        return bound
