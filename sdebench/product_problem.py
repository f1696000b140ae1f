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
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.polynomial import polynomial

from sdebench.closed_form import line_chain, line_diffusion
from sdebench.closed_form.line_chain import LineChain
from sdebench.closed_form.line_diffusion import (
    LineAnswers,
    LineDiffusion,
    Value,
    check_range,
)
from sdebench.errors import NotApplicableError, NotExactError, NumericalError
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


class Kind(NamedTuple):
    """A kind of coordinates: coefficients, lowest power first, and how many."""

    force: Array  # (J,) b
    features: Array  # (P, J) phi; zero rows for parameters of other kinds
    cost: Array  # (J,) g
    copies: int


@dataclass(frozen=True, kw_only=True)
class ProductProblem(Problem):
    """Independent coordinates of one or more kinds, from X_0 = 0."""

    schemes: ClassVar[tuple[str, ...]] = (EULER,)
    family_holds_optimum: ClassVar[bool] = False

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

    def diffusion(self, t: float) -> Array:
        as_time(t, self.time_span)
        return np.eye(self.dim)

    def running_cost(self, x: Array, t: float) -> Array:
        return np.zeros(as_states(x, self.dim).shape[:-1])

    def reward(self, x: Array) -> Array:
        states = as_states(x, self.dim)
        return -self._evaluate(self.per_coordinate("cost"), states).sum(axis=-1)

    def policy(self, x: Array, t: float, theta: Array) -> Array:
        """Return u_theta, shape of x (..., d)."""
        features = self.per_coordinate("features")  # (d, P, J)
        return self._evaluate(np.einsum("p,dpj->dj", theta, features), x)

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
                f"scheme {scheme} needs a base process with a linear part; give {EULER}"
            )
        if noisy is not None and not np.all(noisy):
            raise NotApplicableError(
                "steps without noise need a memoryless base process with a probability "
                "flow; a process from a fixed point has none"
            )
        h, dim = np.diff(times), self.dim
        force = self.per_coordinate("force")
        base = h[:, None, None] * force
        base[:, :, 1] += 1.0
        features = np.moveaxis(self.per_coordinate("features"), 1, 0)  # (P, d, J)
        gains = np.sqrt(h)[None, :, None, None] * features[:, None]
        gains = np.ascontiguousarray(gains)
        weights = np.zeros(len(gains)) if theta is None else np.asarray(theta, float)
        return SeparableTables(
            reach=np.array([self.reach]),
            base=base,
            beyond=np.ones((len(h), dim)),
            noise=np.sqrt(h)[:, None] * np.ones(dim),
            gain=np.tensordot(weights, gains, 1),
            gain_derivative=gains,
            running=np.zeros((len(h), 0, 0)),
            reward=-self.per_coordinate("cost"),
            reward_factor=np.zeros((0, 0)),
            reward_log=np.zeros(1),
            reward_wave=np.zeros(1),
            wave_power=np.zeros(1),
            wave=np.zeros((0, 4)),
            start_mean=np.zeros(dim),
            start_factor=np.zeros((dim, dim)),
        )


@lru_cache(maxsize=16)
def _truth(problem: ProductProblem) -> ProductTruth:
    """Return the truth of all problems that are equal, with what it remembers."""
    return ProductTruth(problem)


@lru_cache(maxsize=16)
def best_parameters(problem: ProductProblem) -> Array:
    """Return the minimizer of J in the family, by Newton's method on its gradient."""
    truth, theta = _truth(problem), np.zeros(problem.n_params)
    size, step = np.inf, 1e-4
    for _ in range(80):
        gradient = truth.gradient(theta)
        before, size = size, float(np.linalg.norm(gradient))
        if size <= 1e-14 or (size >= before and size <= 1e-11):
            return theta
        rows = [
            (truth.gradient(theta + e) - truth.gradient(theta - e)) / (2.0 * step)
            for e in step * np.eye(len(theta))
        ]
        hessian = 0.5 * (np.array(rows) + np.array(rows).T)
        least = float(np.linalg.eigvalsh(hessian)[0])
        hessian += max(0.0, 0.05 - least) * np.eye(len(theta))
        change = np.linalg.solve(hessian, gradient)
        # far from the minimum a whole step may overshoot
        theta = theta - change / max(1.0, float(np.linalg.norm(change)))
    raise NumericalError(
        f"no minimizer of J was found in the control family of {problem.label}; "
        "reduce the reward or the horizon"
    )


def _on_chain(chain: LineChain, what: str) -> Array:
    if what == "policy":
        return chain.policy().stacked()
    if what == "tilt":
        return np.array([chain.log_normalizer()])
    cost, controls = chain.optimal_control()
    return np.array([cost, chain.control_distance(controls)])


class ProductTruth(Truth):
    """Certified answers of a `ProductProblem`."""

    _problem: ProductProblem

    def __init__(self, problem: ProductProblem) -> None:
        super().__init__(problem)
        self._lines = [
            LineDiffusion(kind.force, kind.features, kind.cost, problem.end_time)
            for kind in problem.kinds
        ]
        self._counts = [kind.copies for kind in problem.kinds]
        self._known: dict[tuple[str, int, bytes, bytes], Array] = {}

    # ---- sums over kinds ----------------------------------------------------------
    def _sum(
        self,
        what: str,
        theta: Array | None,
        n_steps: Steps,
        scheme: str = EULER,
        level: int = 0,
    ) -> Array:
        """Return answers summed over the coordinates, on a fine grid or a coarse one.

        Parameters
        ----------
        what : "policy" (`LineAnswers`), "tilt" (log Z) or "best" (the least cost of the
            N-step chain, and the distance from u*_N).
        level : 0 for the answers, 1 for those that bound their error.
        """
        times = None if n_steps is None else self._problem.time_grid(n_steps)
        key = (
            what,
            level,
            b"" if theta is None else theta.tobytes(),
            b"" if times is None else times.tobytes(),
        )
        if key not in self._known:
            if times is None:
                parts = [
                    self._on_line(line, what, theta, level) for line in self._lines
                ]
            else:
                tables = self._problem.tables(theta, times, scheme)
                firsts = np.cumsum([0, *self._counts[:-1]])
                parts = [
                    _on_chain(
                        LineChain(tables, int(first), line_chain.LEVELS[level]), what
                    )
                    for first in firsts
                ]
            self._known[key] = np.tensordot(self._counts, parts, 1)
        return self._known[key]

    def _on_line(
        self, line: LineDiffusion, what: str, theta: Array | None, level: int
    ) -> Array:
        resolution = line_diffusion.LEVELS[level]
        if what == "tilt":
            return np.array([line.log_h(resolution)])
        assert theta is not None
        return line.policy(theta, resolution).stacked()

    def _bound(
        self, what: str, theta: Array | None, n_steps: Steps, scheme: str = EULER
    ) -> Array:
        """Return bounds of the errors of `_sum`: how far a coarser grid changes it."""
        fine, coarse = (
            self._sum(what, theta, n_steps, scheme, level) for level in (0, 1)
        )
        size = sum(self._counts) + float(np.max(np.abs(fine)))
        return np.abs(fine - coarse) + line_diffusion.ROUNDING * size

    def _policy(self, theta: Any, n_steps: Steps, scheme: str = EULER) -> LineAnswers:
        theta = self._problem.theta(theta)
        return LineAnswers.unstacked(self._sum("policy", theta, n_steps, scheme))

    def _best(self, theta: Any, n_steps: Steps, scheme: str = EULER) -> Array:
        return self._sum("best", self._problem.theta(theta), n_steps, scheme)

    # ---- answers ------------------------------------------------------------------
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
        return float(self._sum("tilt", None, n_steps, scheme)[0])

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        if n_steps is None:
            return -self.log_normalizer()
        return float(self._best("zero", n_steps, scheme)[0])

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        if n_steps is None:
            excess = self.objective(theta) - self.optimal_cost()
            return float(np.sqrt(2.0 * max(excess, 0.0)))
        return float(np.sqrt(self._best(theta, n_steps, scheme)[1]))

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

    def policy_chain(
        self,
        theta: Any,
        n_steps: Steps = None,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> PolicyChain:
        raise NotExactError("a nonlinear chain has no exact parts of its gradient")

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

    def _no_density(self, t: float) -> GaussianMixture:
        if as_time(t, self._problem.time_span) == self._problem.time_span[0]:
            raise NotExactError("X_0 is a point: it has no density")
        raise NotExactError("the law of a nonlinear process has no closed form")

    def base_marginal(self, t: float) -> GaussianMixture:
        return self._no_density(t)

    def tilted_marginal(self, t: float) -> GaussianMixture:
        return self._no_density(t)

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
        theta = self._problem.theta("optimum" if theta is None else theta)
        if quantity == "control_error":
            return self._control_error_bound(theta, n_steps)
        if quantity == "optimal_cost" and n_steps is not None:
            return float(self._bound("best", self._problem.theta("zero"), n_steps)[0])
        if quantity in ("log_normalizer", "optimal_cost"):
            return float(self._bound("tilt", None, n_steps)[0])
        bounds = LineAnswers.unstacked(self._bound("policy", theta, n_steps))
        return float(np.linalg.norm(getattr(bounds, quantity)))

    def _control_error_bound(self, theta: Array, n_steps: Steps) -> float:
        """Return the bound of a square root, from that of its argument."""
        if n_steps is None:
            bound = self.error_bound("objective", theta)
            bound = 2.0 * (bound + self.error_bound("optimal_cost"))
        else:
            bound = float(self._bound("best", theta, n_steps)[1])
        size = self.control_error(theta, n_steps)
        return min(bound / size, float(np.sqrt(bound))) if size else np.sqrt(bound)

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
