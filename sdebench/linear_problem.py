"""Linear-quadratic problems with time-varying linear feedback as control family.

The control family spans the optimal feedback and offset, each with a constant and a
linear temporal profile, and a plain state feedback whose optimal coefficient is zero:

    u_theta(x, t) = -(theta_0 + theta_1 s) sigma^T P(t) x          feedback
                    -(theta_2 + theta_3 s) sigma^T p(t)            offset
                    - theta_4 R x,       s = 2 (t / T) - 1         state

without the terms whose P or p vanishes; R projects onto the directions that sigma
acts in, R = I for an invertible sigma.  At theta* = (1, 0, 1, 0, 0) it is u*.

A problem with a parameter ``initial_law`` offers the law of X_0 as well.  Where it is
true, theta goes on with mu (d) and the lower triangle of T, row by row,

    X_0 = m_0 + L_0 (mu + (I + T) xi),   xi ~ N(0, I),

and J gains the relative entropy of this law p_theta to p_0 = N(m_0, L_0 L_0^T).  At
theta* it is the tilted law p_0 e^{-V} / Z, so that J(theta*) = -log Z.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from sdebench.closed_form.affine_chain import AffineChain, parameter_derivatives
from sdebench.closed_form.initial_law import (
    InitialLawFamily,
    expected_score,
    relative_entropy,
)
from sdebench.closed_form.linear_quadratic import (
    LinearQuadratic,
    PolicyGradient,
    PolicyObjective,
)
from sdebench.errors import NotApplicableError, NotExactError, ParameterError
from sdebench.problem import (
    EULER,
    Array,
    Problem,
    Steps,
    Truth,
    as_states,
    as_time,
    check_scheme,
)
from sdebench.simulate.tables import LinearTables

if TYPE_CHECKING:
    from sdebench.closed_form.gaussian_mixture import GaussianMixture


def _interpolate(values: Callable[[Array], Array], end: float) -> Callable[..., Array]:
    """Return a Chebyshev interpolant on [0, end], accurate to rounding.

    The Riccati solution is analytic; the degree doubles until the last coefficients
    are at rounding level.
    """
    degree = 32
    while True:
        nodes = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
        samples = values(0.5 * end * (nodes + 1.0))
        shape = samples.shape[1:]
        flat = samples.reshape(degree + 1, -1)
        coefficients = chebyshev.chebfit(nodes, flat, degree)
        size = np.max(np.abs(coefficients), initial=1e-300)
        tail = np.max(np.abs(coefficients[-4:]), initial=0.0)
        if tail <= 1e-14 * size or degree >= 512:
            break
        degree *= 2

    orders = np.arange(degree + 1)

    def evaluate(t: float | Array) -> Array:
        s = np.clip(2.0 * np.asarray(t, float) / end - 1.0, -1.0, 1.0)
        # T_k(s) = cos(k arccos s): one product instead of a recursion in k.
        basis = np.cos(np.arccos(s)[..., None] * orders)
        return np.asarray((basis @ coefficients).reshape(np.shape(t) + shape))

    return evaluate


class Profile(NamedTuple):
    """A control parameter: its name, its spatial map, and its power of s."""

    name: str
    spatial: int
    power: int


@dataclass(frozen=True, kw_only=True)
class LinearDynamics(Problem):
    """A problem with linear drift and a control that is affine in x and in theta."""

    @abstractmethod
    def build(self) -> LinearQuadratic:
        """Return the exact algebra for the current parameters."""

    @cached_property
    def model(self) -> LinearQuadratic:
        """The exact algebra, built once."""
        return self.build()

    @property
    @abstractmethod
    def profiles(self) -> tuple[Profile, ...]:
        """The control parameters; each map has one of power 0."""

    @abstractmethod
    def spatial_map(self, name: str, t: Array) -> tuple[Array, Array]:
        """Return the map (n, d, d) and (n, d) of the parameter of power 0 called so."""

    @property
    def dim(self) -> int:
        return self.model.dim

    @property
    def time_span(self) -> tuple[float, float]:
        return 0.0, self.model.horizon

    def drift(self, x: Array, t: float) -> Array:
        as_time(t, self.time_span)
        states = as_states(x, self.dim)
        return states @ self.model.drift_matrix.T + self.model.drift_offset

    def diffusion(self, t: float) -> Array:
        as_time(t, self.time_span)
        return self.model.diffusion

    def running_cost(self, x: Array, t: float) -> Array:
        states = as_states(x, self.dim)
        return 0.5 * np.einsum("...i,ij,...j->...", states, self.model.running, states)

    def reward(self, x: Array) -> Array:
        states, model = as_states(x, self.dim), self.model
        quadratic = np.einsum(
            "...i,ij,...j->...", states, model.reward_quadratic, states
        )
        value = -0.5 * quadratic + states @ model.reward_linear + model.reward_constant
        return np.asarray(value - 0.25 * states**4 @ np.asarray(model.reward_quartic))

    # ---- control family -------------------------------------------------------------
    @property
    def initial_family(self) -> InitialLawFamily | None:
        """The laws of X_0 that theta chooses from, or None."""
        return None

    @property
    def has_start_parameters(self) -> bool:
        return self.initial_family is not None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        names = tuple(profile.name for profile in self.profiles)
        family = self.initial_family
        return names if family is None else (*names, *family.names)

    def start_parameters(self, theta: Array | None) -> Array:
        """Return the part of theta that moves the law of X_0; zero without theta."""
        if theta is None:
            theta = np.zeros(self.n_params)
        return np.asarray(theta, float)[len(self.profiles) :]

    def theta(self, point: str | Sequence[float] | Array) -> Array:
        theta = super().theta(point)
        if self.initial_family is not None:
            self.initial_family.split(self.start_parameters(theta))
        return theta

    def basis(self, t: Array) -> Array:
        """Return the temporal coefficients (P, S, n) of the maps at times t (n,)."""
        s = 2.0 * np.asarray(t, float) / self.model.horizon - 1.0
        n_maps = self.profiles[-1].spatial + 1
        values = np.zeros((self.n_params, n_maps, len(s)))
        for index, (_, spatial, power) in enumerate(self.profiles):
            values[index, spatial] = s**power
        return values

    def maps(self, t: Array) -> tuple[Array, Array]:
        """Return the spatial maps (S, n, d, d) and (S, n, d) at times t (n,)."""
        pairs = [
            self.spatial_map(profile.name, t)
            for profile in self.profiles
            if profile.power == 0
        ]
        gains, biases = zip(*pairs, strict=True)
        return np.array(gains), np.array(biases)

    def feedback(self, t: Array) -> tuple[Array, Array]:
        """Return du/dtheta at times t (n,): gains (P, n, d, d), biases (P, n, d)."""
        basis = self.basis(t)
        gains, biases = self.maps(t)
        return (
            np.einsum("psn,snij->pnij", basis, gains),
            np.einsum("psn,sni->pni", basis, biases),
        )

    # ---- tables ---------------------------------------------------------------------
    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> LinearTables:
        check_scheme(scheme)
        if noisy is not None:
            raise NotApplicableError(
                f"{self.name} has no probability flow: mixed ODE-SDE sampling needs a "
                "memoryless denoising base"
            )
        model, starts, steps = self.model, times[:-1], np.diff(times)
        dim, count = self.dim, len(steps)
        transition, offset = np.empty((count, dim, dim)), np.empty((count, dim))
        noise, response = np.empty((count, dim, dim)), np.empty((count, dim, dim))
        for n, h in enumerate(steps):
            if n and np.isclose(h, steps[n - 1], rtol=1e-13, atol=0.0):
                for array in (transition, offset, noise, response):
                    array[n] = array[n - 1]
                continue
            transition[n], offset[n], noise[n], response[n] = _step(model, h, scheme)
        gains, biases = self.maps(starts)
        gains = response @ gains
        biases = np.einsum("nij,snj->sni", response, biases)
        basis = self.basis(starts)
        weights = np.zeros(self.n_params) if theta is None else np.asarray(theta, float)
        combined = np.einsum("p,psn->sn", weights, basis)
        return LinearTables(
            transition=transition,
            offset=offset,
            noise=noise,
            gain=np.einsum("sn,snij->nij", combined, gains),
            bias=np.einsum("sn,sni->ni", combined, biases),
            feature_gain=np.ascontiguousarray(gains),
            feature_bias=np.ascontiguousarray(biases),
            basis=basis,
            running=steps[:, None, None] * model.running,
            reward_quadratic=model.reward_quadratic,
            reward_linear=model.reward_linear,
            reward_constant=np.array([model.reward_constant]),
            reward_quartic=np.asarray(model.reward_quartic),
            **self._start_tables(theta),
        )

    def _start_tables(self, theta: Array | None) -> dict[str, Array]:
        """Return the fields of the tables about X_0."""
        family, model = self.initial_family, self.model
        if family is None:
            factor = _factor(model.start_covariance)
            return {"start_mean": model.start_mean, "start_factor": factor}
        parameters = self.start_parameters(theta)
        mean, factor = family.moments(parameters)
        mean_derivative, factor_derivative = family.derivatives()
        cost_gradient = family.cost_gradient(parameters)
        count = len(self.profiles)  # parameters of the control: X_0 does not move

        def padded(array: Array) -> Array:
            return np.concatenate([np.zeros((count, *array.shape[1:])), array])

        return {
            "start_mean": mean,
            "start_factor": factor,
            "start_mean_derivative": padded(mean_derivative),
            "start_factor_derivative": padded(factor_derivative),
            "start_cost_gradient": padded(cost_gradient),
            "start_cost": np.array([family.cost(parameters)]),
        }


@dataclass(frozen=True, kw_only=True)
class LinearProblem(LinearDynamics):
    """A problem given by a `LinearQuadratic` model with constant coefficients."""

    def __post_init__(self) -> None:
        # Build at once: a parameter out of range is refused where it is given.
        self.model.riccati(0.0)
        if self.has_start_parameters:
            _require_density(self.model)

    @property
    def problem_class(self) -> str:
        return "linear–quadratic"

    @cached_property
    def truth(self) -> LinearTruth:
        return LinearTruth(self)

    @cached_property
    def initial_family(self) -> InitialLawFamily | None:
        if not self.parameters.get("initial_law", False):
            return None
        model = self.model
        return InitialLawFamily(model.start_mean, _factor(model.start_covariance))

    @cached_property
    def riccati(self) -> tuple[Callable[..., Array], Callable[..., Array]]:
        """Interpolants of P(t) (..., d, d) and p(t) (..., d)."""
        model = self.model
        return (
            _interpolate(lambda t: model.riccati_grid(t)[0], model.horizon),
            _interpolate(lambda t: model.riccati_grid(t)[1], model.horizon),
        )

    @cached_property
    def profiles(self) -> tuple[Profile, ...]:
        times = np.linspace(0.0, self.model.horizon, 17)
        quadratic, linear, _ = self.model.riccati_grid(times)
        profiles: list[Profile] = []
        n_maps = 0
        for name, values in (("feedback", quadratic), ("offset", linear)):
            if np.any(values):
                profiles += [
                    Profile(name, n_maps, 0),
                    Profile(f"{name}_slope", n_maps, 1),
                ]
                n_maps += 1
        return (*profiles, Profile("state", n_maps, 0))

    @property
    def theta_star(self) -> Array:
        best = [float(name in ("feedback", "offset")) for name, *_ in self.profiles]
        family = self.initial_family
        if family is None:
            return np.array(best)
        start = family.parameters_of(*self.model.tilted_start())
        return np.concatenate([best, start])

    def spatial_map(self, name: str, t: Array) -> tuple[Array, Array]:
        dim, count = self.dim, len(t)
        quadratic, linear = self.riccati
        sigma_t = self.model.diffusion.T
        gain, bias = np.zeros((count, dim, dim)), np.zeros((count, dim))
        if name == "feedback":
            gain = -sigma_t @ quadratic(t)
        elif name == "offset":
            bias = -linear(t) @ sigma_t.T
        else:
            gain[:] = -_row_projection(self.model.diffusion)
        return gain, bias


def _require_density(model: LinearQuadratic) -> None:
    """Raise where X_0 has no density that theta could move."""
    least, largest = np.linalg.eigvalsh(model.start_covariance)[[0, -1]]
    if not least > 1e-12 * largest:
        raise ParameterError(
            "initial_law needs an X_0 with a density; its covariance has the "
            f"eigenvalue {least:.6g}: leave initial_law out"
        )


def _row_projection(sigma: Array) -> Array:
    """Return the orthogonal projection onto the row space of sigma."""
    _, values, rows = np.linalg.svd(sigma)
    kept = values > 1e-12 * values[0]
    if np.all(kept):
        return np.eye(len(sigma))
    return np.asarray(rows[kept].T @ rows[kept])


def _factor(covariance: Array) -> Array:
    """Return L with L L^T = covariance, zero allowed."""
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(np.clip(values, 0.0, None))
    if np.ptp(values) == 0.0:
        return np.diag(root)
    return np.asarray(vectors * root)


def _step(
    model: LinearQuadratic, h: float, scheme: str
) -> tuple[Array, Array, Array, Array]:
    """Return M, c, G and R = G^-1 (response to the control), w = R u."""
    dim = model.dim
    A, sigma = model.drift_matrix, model.diffusion
    if scheme == "euler_maruyama":
        root = np.sqrt(h)
        return (
            np.eye(dim) + h * A,
            h * model.drift_offset,
            root * sigma,
            (root * np.eye(dim)),
        )
    import scipy.linalg

    # Van Loan (1978): one exponential gives the transition and the noise covariance.
    block = np.block([[-A, sigma @ sigma.T], [np.zeros_like(A), A.T]])
    flow = scipy.linalg.expm(h * block)
    transition = flow[dim:, dim:].T
    covariance = transition @ flow[:dim, dim:]
    noise = np.linalg.cholesky(0.5 * (covariance + covariance.T))
    forced = np.block([[A, np.eye(dim)], [np.zeros((dim, 2 * dim))]])
    integral = scipy.linalg.expm(h * forced)[:dim, dim:]
    response = np.linalg.solve(noise, integral @ sigma)
    return transition, integral @ model.drift_offset, noise, response


class LinearTruth(Truth):
    """Exact answers of a `LinearProblem`."""

    def __init__(self, problem: LinearDynamics) -> None:
        super().__init__(problem)
        self._linear = problem
        self._model, self._feedback_at = problem.model, problem.feedback
        self._known: dict[float, tuple[Array, Array]] = {}
        self._objectives: dict[tuple[bytes, bool], PolicyObjective] = {}
        self._matchings: dict[bytes, PolicyGradient] = {}
        self._cross_entropies: dict[bytes, PolicyGradient] = {}

    def control(self, x: Array, t: float) -> Array:
        return self._model.control(*self._at(x, t))

    def value(self, x: Array, t: float) -> Array:
        return self._model.value(*self._at(x, t))

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        gain, bias = self._law(self._problem.theta(theta))
        states, time = self._at(x, t)
        return states @ gain(time).T + bias(time)

    def _feedback(self, t: float) -> tuple[Array, Array]:
        """Return dK/dtheta (P, d, d) and dk/dtheta (P, d) at t, remembered."""
        known = self._known
        if t not in known:
            if len(known) > 4096:
                known.clear()
            gains, biases = self._feedback_at(np.array([t]))
            known[t] = gains[:, 0], biases[:, 0]
        return known[t]

    def _dgain(self, t: float) -> Array:
        return self._feedback(t)[0]

    def _dbias(self, t: float) -> Array:
        return self._feedback(t)[1]

    def _law(self, theta: Array) -> tuple[Callable[..., Array], Callable[..., Array]]:
        def gain(t: float) -> Array:
            return np.tensordot(theta, self._dgain(t), axes=1)

        def bias(t: float) -> Array:
            return np.tensordot(theta, self._dbias(t), axes=1)

        return gain, bias

    def _chain(
        self, theta: Array, times: Array, scheme: str, noisy: Array | None = None
    ) -> tuple[AffineChain, tuple[Array, Array, Array, Array]]:
        tables = self._problem.tables(theta, times, scheme, noisy)
        assert isinstance(tables, LinearTables)
        chain = AffineChain.from_tables(tables)
        return chain, (tables.gain, tables.bias, *parameter_derivatives(tables))

    # ---- the law of X_0 -------------------------------------------------------------
    def _model_at(self, theta: Array) -> LinearQuadratic:
        """Return the model whose X_0 has the law that theta chooses."""
        family = self._linear.initial_family
        if family is None:
            return self._model
        mean, factor = family.moments(self._linear.start_parameters(theta))
        return replace(self._model, start_mean=mean, start_covariance=factor @ factor.T)

    def _start_cost(self, theta: Array) -> float:
        family = self._linear.initial_family
        if family is None:
            return 0.0
        return family.cost(self._linear.start_parameters(theta))

    def _start_part(
        self, theta: Array, *, lean: bool = False, reward_only: bool = False
    ) -> PolicyGradient:
        """Return E[(dX_0)^T lambda_0], plus the derivative of the relative entropy."""
        family, count = self._linear.initial_family, self._linear.n_params
        gradient = np.zeros(count)
        if family is None:
            return PolicyGradient(gradient, 0.0)
        parameters = self._linear.start_parameters(theta)
        in_mean, moment, bound = self._model_at(theta).start_gradient(
            *self._law(theta), lean=lean, reward_only=reward_only
        )
        inverse = np.linalg.inv(family.moments(parameters)[1])
        in_factor = moment @ inverse.T  # E lambda_0 xi^T
        mean, factor = family.derivatives()
        part = mean @ in_mean + np.einsum("pij,ij->p", factor, in_factor)
        if not reward_only:
            part = part + family.cost_gradient(parameters)
        gradient[count - len(part) :] = part
        size = np.sum(np.abs(family.factor)) * (1.0 + np.sum(np.abs(inverse)))
        return PolicyGradient(gradient, float(size * bound))

    def start_divergence(self, theta: Any) -> float:
        if self._linear.initial_family is None:
            return 0.0
        model = self._model_at(self._problem.theta(theta))
        return relative_entropy(
            model.start_mean, model.start_covariance, *self._model.tilted_start()
        )

    # ---- continuous time ------------------------------------------------------------
    def _log_normalizer(self) -> float:
        return self._model.log_normalizer()

    def _optimal_cost(self) -> float:
        if self._linear.has_start_parameters:
            return -self._model.log_normalizer()
        return self._model.optimal_cost()

    def _policy_objective(
        self, theta: Array, reward_only: bool = False
    ) -> PolicyObjective:
        key = theta.tobytes(), reward_only
        if key not in self._objectives:
            found = self._model_at(theta).policy_objective(
                *self._law(theta), self._dgain, self._dbias, reward_only=reward_only
            )
            start = self._start_part(theta, reward_only=reward_only)
            cost = 0.0 if reward_only else self._start_cost(theta)
            self._objectives[key] = PolicyObjective(
                found.objective + cost,
                found.gradient + start.gradient,
                max(found.error_bound, start.error_bound),
            )
        return self._objectives[key]

    def _policy_matching(self, theta: Array) -> PolicyGradient:
        key = theta.tobytes()
        if key not in self._matchings:
            found = self._model_at(theta).matching_gradient(
                *self._law(theta), self._dgain, self._dbias
            )
            start = self._start_part(theta, lean=True)
            self._matchings[key] = PolicyGradient(
                found.gradient + start.gradient,
                max(found.error_bound, start.error_bound),
            )
        return self._matchings[key]

    def _policy_cross_entropy(self, theta: Array) -> PolicyGradient:
        key = theta.tobytes()
        if key not in self._cross_entropies:
            found = self._model.cross_entropy_gradient(
                *self._law(theta), self._dgain, self._dbias
            )
            score = self._start_score(theta)
            self._cross_entropies[key] = found._replace(gradient=found.gradient - score)
        return self._cross_entropies[key]

    def _start_score(self, theta: Array) -> Array:
        """Return the expected score (P,) of the law of X_0 under the tilted one."""
        family, score = self._linear.initial_family, np.zeros(self._linear.n_params)
        if family is not None:
            parameters = self._linear.start_parameters(theta)
            law, slopes = family.moments(parameters), family.derivatives()
            found = expected_score(*law, slopes, *self._model.tilted_start())
            score[-len(found) :] = found
        return score

    def _objective(self, theta: Array) -> float:
        return self._policy_objective(theta).objective

    def _gradient(self, theta: Array) -> Array:
        return self._policy_objective(theta).gradient

    def start_gradient(
        self, theta: Any, n_steps: Steps = None, scheme: str = EULER
    ) -> tuple[Array, Array]:
        """Return the gradient of J in the law of X_0 = m_0 + L xi.

        (d,) with respect to m_0, and (d, d) with respect to L, times L^T.
        """
        if n_steps is None:
            theta = self._problem.theta(theta)
            return self._model_at(theta).start_gradient(*self._law(theta))[:2]
        chain, (gain, bias, _, _) = self._discrete(theta, n_steps, scheme)
        return chain.start_gradient(gain, bias)

    def _reward_only_objective(self, theta: Array) -> float:
        return self._policy_objective(theta, reward_only=True).objective

    def _reward_only_gradient(self, theta: Array) -> Array:
        return self._policy_objective(theta, reward_only=True).gradient

    def _matching_gradient(self, theta: Array) -> Array:
        return self._policy_matching(theta).gradient

    def _cross_entropy_gradient(self, theta: Array) -> Array:
        return self._policy_cross_entropy(theta).gradient

    def _control_error(self, theta: Array) -> float:
        # Not by the regret identity: near the optimum its difference cancels.
        found = self._model_at(theta).control_error(*self._law(theta))
        return float(np.sqrt(found.value))

    def _law_of(self, mean: Array, covariance: Array) -> GaussianMixture:
        from sdebench.closed_form.gaussian_mixture import GaussianMixture

        if not np.any(covariance):
            raise NotExactError("X_0 is a point: it has no density")
        return GaussianMixture.normal(mean, covariance)

    def base_marginal(self, t: float) -> GaussianMixture:
        means, covariances = self._model.base_moments([t])
        return self._law_of(means[0], covariances[0])

    def tilted_marginal(self, t: float) -> GaussianMixture:
        model = self._model_at(self._problem.theta_star)
        means, covariances = model.tilted_moments([t])
        return self._law_of(means[0], covariances[0])

    def error_bound(self, quantity: str, theta: Any = None) -> float:
        theta = self._problem.theta("optimum" if theta is None else theta)
        if quantity in ("objective", "gradient"):
            return float(self._policy_objective(theta).error_bound)
        if quantity in ("reward_only_objective", "reward_only_gradient"):
            return float(self._policy_objective(theta, reward_only=True).error_bound)
        if quantity == "matching_gradient":
            return float(self._policy_matching(theta).error_bound)
        if quantity == "cross_entropy_gradient":
            return float(self._policy_cross_entropy(theta).error_bound)
        if quantity == "control_error":
            found = self._model_at(theta).control_error(*self._law(theta))
            return float(found.error_bound)
        return 0.0
