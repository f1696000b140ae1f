"""What a problem is: what estimators may see, and, apart from it, the truth.

A problem file fills in parameters and returns closed-form algebra; the two base
classes `sdebench.tilting_problem.TiltingProblem` (classes G and F of the catalogue)
and `sdebench.linear_problem.LinearProblem` (class L) turn it into coefficient tables
for the simulation and into a `Truth`.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sdebench.callable_module import make_callable
from sdebench.errors import NotApplicableError, NotExactError, ParameterError, unknown
from sdebench.registry import label
from sdebench.registry import problem as problem_by_name

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import AffineChain, PolicyChain
    from sdebench.closed_form.gaussian_mixture import GaussianMixture
    from sdebench.simulate.tables import Tables

Array = NDArray[np.float64]

POINTS: Mapping[str, float] = {
    "zero": 0.0,
    "halfway": 0.5,
    "optimum": 1.0,
    "overshoot": 1.5,
}
"""Evaluation points, as multiples of the optimal parameters."""

SCHEMES = ("euler_maruyama", "exponential")
EULER = SCHEMES[0]
Steps = int | Sequence[float] | Array | None
"""A number of uniform steps, a time grid, or None for continuous time."""

ESTIMANDS = {
    "gradient": "gradient of the control objective J",
    "reward_only_gradient": "gradient of -E r(X_T), without control and running cost",
    "matching_gradient": "gradient of the adjoint-matching loss",
    "cross_entropy_gradient": "gradient of KL(P* || P_theta), P* the tilted path law",
    "log_normalizer": "log Z",
}
"""What can be estimated, each with an exact answer in `Truth`."""


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """A problem of the catalogue; subclasses are frozen dataclasses of parameters.

    Class attributes
    ----------------
    default_steps : the published number of time steps, or the suite's.
    source : where the problem comes from.
    formula : the process, the reward and the running cost in LaTeX, without dollars.
    hardness : one sentence, why it is hard.
    variants : parameter dictionaries that the suites run.
    schemes : the time-stepping schemes that the tables know.
    family_holds_optimum : whether theta_star gives u*; if not, theta_star is the
        minimizer of J in the control family, and J(theta_star) > J(u*).
    backends : what can simulate its tables, the fastest first.
    weights_have_variance : whether the weights e^r dP/dP_u of paths may have a second
        moment under controls of the family.
    has_derivatives : whether X_T and the reward have derivatives that an estimator may
        use; if not, those that need one are refused.
    """

    default_steps: ClassVar[int] = 50
    source: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    hardness: ClassVar[str] = ""
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    schemes: ClassVar[tuple[str, ...]] = SCHEMES
    family_holds_optimum: ClassVar[bool] = True
    backends: ClassVar[tuple[str, ...]] = ("numba", "torch")
    weights_have_variance: ClassVar[bool] = True
    has_derivatives: ClassVar[bool] = True

    # ---- identity ---------------------------------------------------------------
    @property
    def name(self) -> str:
        """The file's stem, its name everywhere; of a class typed in, the class's."""
        stem = type(self).__module__.rpartition(".")[2]
        return type(self).__name__ if stem == "__main__" else stem

    @property
    def parameters(self) -> dict[str, Any]:
        """All parameters with their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def label(self) -> str:
        """The name with the parameters that differ from their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return label(self.name, self.parameters, defaults)

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return (inspect.getdoc(type(self)) or "").partition("\n")[0]

    # ---- what the estimators see --------------------------------------------------
    @property
    @abstractmethod
    def problem_class(self) -> str:
        """What kind of problem it is, in words: the marker in figures."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Dimension d of the state and of the noise."""

    @property
    @abstractmethod
    def time_span(self) -> tuple[float, float]:
        """Start and end of the process."""

    @property
    @abstractmethod
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the components of theta."""

    @property
    @abstractmethod
    def theta_star(self) -> Array:
        """Parameters (P,) at which the control is optimal in continuous time.

        Where the family does not hold u*: those of its least objective.
        """

    @abstractmethod
    def drift(self, x: Array, t: float) -> Array:
        """Return the base drift b(x, t), shape of x (..., d)."""

    @abstractmethod
    def diffusion(self, t: float) -> Array:
        """Return sigma(t), (d, d).

        Of noise that depends on the state: at X_0; see `diffusion_at`.
        """

    def diffusion_at(self, x: Array, t: float) -> Array:
        """Return sigma(x, t), (..., d, d), for x (..., d); diagonal if it varies."""
        return np.broadcast_to(self.diffusion(t), (*x.shape, x.shape[-1]))

    @abstractmethod
    def running_cost(self, x: Array, t: float) -> Array:
        """Return the running cost f(x, t), shape (...), for x (..., d)."""

    @abstractmethod
    def reward(self, x: Array) -> Array:
        """Return the terminal reward r(x), shape (...), for x (..., d)."""

    @abstractmethod
    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = "euler_maruyama",
        noisy: Array | None = None,
    ) -> Tables:
        """Fill the coefficient tables on a time grid.

        Parameters
        ----------
        theta : (P,) control parameters, or None for no control.
        times : (n_steps + 1,) increasing, from `time_grid`.
        scheme : "euler_maruyama" or "exponential".
        noisy : (n_steps,) 1 for steps of the SDE, 0 for steps of the probability flow;
            default: the SDE everywhere.

        Raises
        ------
        NotApplicableError
            For steps without noise where the process has no probability flow.
        """

    @property
    @abstractmethod
    def truth(self) -> Truth:
        """The exact answers; never handed to an estimator."""

    @property
    def n_params(self) -> int:
        """Number P of control parameters."""
        return len(self.parameter_names)

    @property
    def effort(self) -> int:
        """How many coordinates of an ordinary path one step costs as much as."""
        return self.dim

    @property
    def has_start_parameters(self) -> bool:
        """Whether theta moves the law of X_0 as well."""
        return False

    @property
    def noise_depends_on_state(self) -> bool:
        """Whether sigma is a function of x, then a diagonal one."""
        return type(self).diffusion_at is not Problem.diffusion_at

    # ---- evaluation points and grids ------------------------------------------------
    @cached_property
    def points(self) -> dict[str, Array]:
        """The named evaluation points."""
        return {name: factor * self.theta_star for name, factor in POINTS.items()}

    def theta(self, point: str | Sequence[float] | Array) -> Array:
        """Return theta (P,) for a point's name or for given numbers.

        Raises
        ------
        UnknownNameError, ParameterError
            For an unknown point, a wrong length or a value that is not finite.
        """
        if isinstance(point, str):
            if point not in self.points:
                raise unknown("evaluation point", point, self.points)
            return self.points[point]
        try:
            theta = np.asarray(point, dtype=np.float64)
        except (TypeError, ValueError):
            theta = np.full(1, np.nan)
        if theta.shape != (self.n_params,) or not np.all(np.isfinite(theta)):
            names = ", ".join(self.parameter_names)
            raise ParameterError(
                f"theta {point!r} does not fit {self.name}; give {self.n_params} "
                f"finite numbers ({names}) or one of {', '.join(self.points)}"
            )
        return theta

    def time_grid(self, steps: int | Sequence[float] | Array | None = None) -> Array:
        """Return the time grid (n_steps + 1,).

        Parameters
        ----------
        steps : number of uniform steps (default: ``default_steps``), or the grid.
        """
        start, end = self.time_span
        if steps is None:
            steps = self.default_steps
        if isinstance(steps, int | np.integer):
            if steps < 1 or isinstance(steps, bool):
                raise ParameterError(
                    f"n_steps {steps} is not allowed; give at least 1 time step"
                )
            return np.linspace(start, end, int(steps) + 1)
        times = np.array(steps, dtype=np.float64)
        rounding = 1e-12 * (end - start)
        if (
            times.ndim != 1
            or len(times) < 2
            or not np.all(np.diff(times) > 0)
            or not np.allclose(times[[0, -1]], (start, end), rtol=0.0, atol=rounding)
        ):
            raise ParameterError(
                f"time grid {np.array2string(times, threshold=6)} is not allowed; give "
                f"increasing times from {start:g} to {end:g}"
            )
        times[[0, -1]] = start, end
        return times


def as_states(x: Any, dim: int) -> Array:
    """Return x as float64 states (..., dim); float32 is refused.

    Raises
    ------
    ParameterError
        For float32 or lower precision (exact answers to 1e-12 need float64 input), a
        wrong last axis, or values that are not finite.
    """
    states = np.asarray(x)
    if states.dtype in (np.float32, np.float16):
        raise ParameterError(
            f"x has dtype {states.dtype}; exact answers need float64: pass "
            "x.astype('float64')"
        )
    states = states.astype(np.float64)
    if states.ndim == 0 or states.shape[-1] != dim:
        raise ParameterError(
            f"x has shape {states.shape}; expected (..., {dim}), the state's dimension "
            "last"
        )
    if not np.all(np.isfinite(states)):
        raise ParameterError("x holds NaN or infinity; give finite states")
    return states


def as_time(t: Any, span: tuple[float, float]) -> float:
    """Return t as a float inside the time span, or raise `ParameterError`."""
    time = float(t)
    if not span[0] <= time <= span[1]:
        raise ParameterError(
            f"t = {time:g} is outside the process's time span [{span[0]:g}, "
            f"{span[1]:g}]"
        )
    return time


def check_scheme(scheme: str) -> None:
    """Raise for an unknown time-stepping scheme."""
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)


def check_noisy(noisy: Array | None, n_steps: int, scheme: str) -> None:
    """Raise for a mask of noisy steps that does not fit."""
    if noisy is None:
        return
    if np.shape(noisy) != (n_steps,) or not np.all(np.isin(noisy, (0.0, 1.0))):
        raise ParameterError(f"noisy must hold {n_steps} zeros and ones, one per step")
    if scheme != EULER:
        raise ParameterError(
            f"steps without noise need scheme {EULER}; {scheme} was given"
        )


def check_euler_only(scheme: str, noisy: Array | None, n_steps: int) -> None:
    """Raise for all but Euler-Maruyama steps with noise, which some problems have."""
    check_scheme(scheme)
    check_noisy(noisy, n_steps, scheme)
    if scheme != EULER:
        raise NotApplicableError(
            f"scheme {scheme} needs a base process with a linear part that moves the "
            f"noise; give {EULER}"
        )
    if noisy is not None and not np.all(noisy):
        raise NotApplicableError(
            "steps without noise need a memoryless base process with a probability "
            "flow; this one has none"
        )


class Truth:
    """Exact answers of one problem, for the harness only.

    Every method raises `NotExactError` with the reason where no exact answer exists.
    ``n_steps`` asks for the answer of the N-step discretization, by ``scheme``, instead
    of continuous time; it may also be a grid.  `error_bound` tells how far an answer
    that needs quadrature may be off; it is 0 for closed forms up to rounding.

    A subclass gives the continuous answers (the methods with an underscore) and, where
    the discretized problem is linear-quadratic, its chain.

    Class attributes
    ----------------
    precision : what every error bound at the point "halfway" stays below.
    """

    precision: ClassVar[float] = 1e-9

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    # ---- what a subclass writes ---------------------------------------------------
    def control(self, x: Array, t: float) -> Array:
        """Return the optimal control u*(x, t), shape of x (..., d)."""
        raise NotImplementedError

    def value(self, x: Array, t: float) -> Array:
        """Return V(x, t) = -log h(x, t), shape (...)."""
        raise NotImplementedError

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        """Return the control u_theta(x, t), shape of x (..., d)."""
        raise NotImplementedError

    def base_marginal(self, t: float) -> GaussianMixture:
        """Return the law of X_t under the base process."""
        raise NotImplementedError

    def tilted_marginal(self, t: float) -> GaussianMixture:
        """Return the law of X_t under the optimal control."""
        raise NotImplementedError

    def tilted_moments(self, t: float) -> tuple[Array, Array]:
        """Return mean (d,) and covariance (d, d) of X_t under the optimal control."""
        law = self.tilted_marginal(t)
        return law.mean(), law.covariance()

    def _log_normalizer(self) -> float:
        raise NotImplementedError

    def _objective(self, theta: Array) -> float:
        raise NotImplementedError

    def _gradient(self, theta: Array) -> Array:
        raise NotImplementedError

    def _reward_only_objective(self, theta: Array) -> float:
        raise NotImplementedError

    def _reward_only_gradient(self, theta: Array) -> Array:
        raise NotImplementedError

    def _matching_gradient(self, theta: Array) -> Array:
        raise NotImplementedError

    def _cross_entropy_gradient(self, theta: Array) -> Array:
        raise NotExactError(
            "the gradient of the cross-entropy is exact on linear-quadratic problems "
            "and the tilting family only: the tilted path law has no closed form here"
        )

    def _optimal_cost(self) -> float:
        return self._objective(self._problem.theta_star)

    def _control_error(self, theta: Array) -> float:
        """Return the control error by the regret identity (2 (J - J*))^(1/2)."""
        excess = self._objective(theta) - self._optimal_cost()
        return float(np.sqrt(2.0 * max(excess, 0.0)))

    def _chain(
        self, theta: Array, times: Array, scheme: str, noisy: Array | None = None
    ) -> tuple[AffineChain, tuple[Array, Array, Array, Array]]:
        """Return the N-step chain and its (K, k, dK/dtheta, dk/dtheta)."""
        raise NotExactError(
            "the discretized objective is exact on linear-quadratic and Gaussian "
            "problems only: the Euler-Maruyama chain of others has no closed law"
        )

    # ---- answers ------------------------------------------------------------------
    def _at(self, x: Array, t: float) -> tuple[Array, float]:
        problem = self._problem
        return as_states(x, problem.dim), as_time(t, problem.time_span)

    def _discrete(
        self, theta: Any, n_steps: Steps, scheme: str = EULER
    ) -> tuple[AffineChain, tuple[Array, Array, Array, Array]]:
        problem = self._problem
        return self._chain(problem.theta(theta), problem.time_grid(n_steps), scheme)

    def start_divergence(self, theta: Any) -> float:
        """Return the relative entropy of the law of X_0 to that at the optimum.

        J(theta) - J* = 1/2 control_error(theta)^2 + start_divergence(theta); it is 0
        where theta does not move the law of X_0.
        """
        return 0.0

    def h(self, x: Array, t: float) -> Array:
        """Return h(x, t) = E[exp(r(X_T) - int f) | X_t = x] under the base."""
        return np.exp(-self.value(x, t))

    def log_normalizer(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        """Return log Z = log E_{p_0} h(X_0, t_0)."""
        if n_steps is None:
            return self._log_normalizer()
        return self._discrete("optimum", n_steps, scheme)[0].log_normalizer()

    def objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        """Return J(theta) = E int (1/2 |u|^2 + f) dt - E r(X_T).

        Plus the relative entropy of the law of X_0 to that of the base process, where
        theta moves it.
        """
        if n_steps is None:
            return self._objective(self._problem.theta(theta))
        chain, (gain, bias, _, _) = self._discrete(theta, n_steps, scheme)
        return chain.objective(gain, bias)

    def gradient(self, theta: Any, n_steps: Steps = None, scheme: str = EULER) -> Array:
        """Return the gradient of J, (P,)."""
        if n_steps is None:
            return self._gradient(self._problem.theta(theta))
        chain, coefficients = self._discrete(theta, n_steps, scheme)
        return chain.gradient(*coefficients)

    def reward_only_objective(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        """Return -E r(X_T) under u_theta, the objective without costs."""
        if n_steps is None:
            return self._reward_only_objective(self._problem.theta(theta))
        chain, (gain, bias, _, _) = self._discrete(theta, n_steps, scheme)
        return chain.reward_only_objective(gain, bias)

    def reward_only_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        """Return the gradient of -E r(X_T), (P,)."""
        if n_steps is None:
            return self._reward_only_gradient(self._problem.theta(theta))
        chain, coefficients = self._discrete(theta, n_steps, scheme)
        return chain.gradient(*coefficients, reward_only=True)

    def policy_chain(
        self,
        theta: Any,
        n_steps: Steps = None,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> PolicyChain:
        """Return the N-step chain with its feedback and that of u*.

        ``noisy`` : (n_steps,) as in `Problem.tables`.

        Raises
        ------
        NotExactError
            Where the discretized problem is not linear-quadratic.
        """
        from sdebench.closed_form.affine_chain import PolicyChain

        problem, times = self._problem, self._problem.time_grid(n_steps)
        _, optimal = self._chain(problem.theta_star, times, scheme, noisy)

        def at(theta: Array) -> PolicyChain:
            chain, feedback = self._chain(theta, times, scheme, noisy)
            return PolicyChain(chain, *feedback, *optimal[:2], theta, at)

        return at(problem.theta(theta))

    def matching_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        """Return the gradient of the adjoint-matching loss at its own control, (P,)."""
        if n_steps is None:
            return self._matching_gradient(self._problem.theta(theta))
        chain, coefficients = self._discrete(theta, n_steps, scheme)
        return chain.matching_gradient(*coefficients)

    def cross_entropy_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> Array:
        """Return the gradient of KL(P* || P_theta), (P,).

        P* is the base path law times exp(r(X_T) - int f) / Z, so that X_0 is tilted
        too: E* int (du_theta/dtheta)^T (u_theta - u*) dt, and minus the expected score
        of the law of X_0 where theta moves it.
        """
        if n_steps is None:
            return self._cross_entropy_gradient(self._problem.theta(theta))
        chain, coefficients = self._discrete(theta, n_steps, scheme)
        return chain.cross_entropy_gradient(*coefficients)

    def optimal_cost(self, n_steps: Steps = None, scheme: str = EULER) -> float:
        """Return the least objective, J(u*) = -E_{p_0} log h(X_0, t_0).

        Where theta moves the law of X_0 it is -log Z.
        """
        if n_steps is None:
            return self._optimal_cost()
        return self._discrete("optimum", n_steps, scheme)[0].optimal_cost()

    def discrete_control(self, x: Array, step: int, n_steps: int) -> Array:
        """Return the optimal control u*_N(x, t_step) of the N-step chain."""
        chain, _ = self._discrete("optimum", n_steps)
        gain, bias = chain.optimal_feedback()
        times = self._problem.time_grid(n_steps)
        root = np.sqrt(times[step + 1] - times[step])
        return (as_states(x, self._problem.dim) @ gain[step].T + bias[step]) / root

    def control_error(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> float:
        """Return (E_theta int |u_theta - u*|^2 dt)^(1/2).

        With ``n_steps``: the distance from u*_N under the N-step chain.
        """
        if n_steps is None:
            return self._control_error(self._problem.theta(theta))
        chain, (gain, bias, _, _) = self._discrete(theta, n_steps, scheme)
        distance = chain.control_distance(gain, bias, *chain.optimal_feedback())
        return float(np.sqrt(distance))

    def error_bound(self, quantity: str, theta: Any = None) -> float:
        """Return an absolute error bound of "gradient", "log_normalizer", ... ."""
        return 0.0

    def answer(
        self,
        estimand: str,
        theta: Any,
        n_steps: Steps = None,
        scheme: str = EULER,
    ) -> Array | None:
        """Return the exact value of an estimand as a vector, or None if there is none.

        Parameters
        ----------
        estimand : a key of `ESTIMANDS`.
        theta : (P,) or a point's name; unused for "log_normalizer".
        """
        if estimand not in ESTIMANDS:
            raise unknown("estimand", estimand, ESTIMANDS)
        try:
            if estimand == "log_normalizer":
                return np.array([self.log_normalizer(n_steps, scheme)])
            method = getattr(self, estimand)
            return np.asarray(method(theta, n_steps, scheme))
        except NotExactError:
            return None


make_callable(__name__, problem_by_name)
