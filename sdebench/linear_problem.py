"""Linear-quadratic problems with time-varying linear feedback as control family.

The control family spans the optimal feedback and offset, each with a constant and a
linear temporal profile, and a plain state feedback whose optimal coefficient is zero:

    u_theta(x, t) = -(theta_0 + theta_1 s) sigma^T P(t) x          feedback
                    -(theta_2 + theta_3 s) sigma^T p(t)            offset
                    - theta_4 R x,       s = 2 (t / T) - 1         state

without the terms whose P or p vanishes; R projects onto the directions that sigma
acts in, R = I for an invertible sigma.  At theta* = (1, 0, 1, 0, 0) it is u*.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from sdebench.closed_form.affine_chain import AffineChain, parameter_derivatives
from sdebench.closed_form.linear_quadratic import (
    LinearQuadratic,
    PolicyGradient,
    PolicyObjective,
)
from sdebench.errors import NotApplicableError, NotExactError
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
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(profile.name for profile in self.profiles)

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
            start_mean=model.start_mean,
            start_factor=_factor(model.start_covariance),
            reward_quartic=np.asarray(model.reward_quartic),
        )


@dataclass(frozen=True, kw_only=True)
class LinearProblem(LinearDynamics):
    """A problem given by a `LinearQuadratic` model with constant coefficients."""

    def __post_init__(self) -> None:
        # Build at once: a parameter out of range is refused where it is given.
        self.model.riccati(0.0)

    @property
    def problem_class(self) -> str:
        return "linear–quadratic"

    @cached_property
    def truth(self) -> LinearTruth:
        return LinearTruth(self)

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
        return np.array(
            [float(name in ("feedback", "offset")) for name in self.parameter_names]
        )

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
        self._model, self._feedback_at = problem.model, problem.feedback
        self._known: dict[float, tuple[Array, Array]] = {}
        self._objectives: dict[tuple[bytes, bool], PolicyObjective] = {}
        self._matchings: dict[bytes, PolicyGradient] = {}

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

    def _log_normalizer(self) -> float:
        return self._model.log_normalizer()

    def _optimal_cost(self) -> float:
        return self._model.optimal_cost()

    def _policy_objective(
        self, theta: Array, reward_only: bool = False
    ) -> PolicyObjective:
        key = theta.tobytes(), reward_only
        if key not in self._objectives:
            self._objectives[key] = self._model.policy_objective(
                *self._law(theta), self._dgain, self._dbias, reward_only=reward_only
            )
        return self._objectives[key]

    def _policy_matching(self, theta: Array) -> PolicyGradient:
        key = theta.tobytes()
        if key not in self._matchings:
            self._matchings[key] = self._model.matching_gradient(
                *self._law(theta), self._dgain, self._dbias
            )
        return self._matchings[key]

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
            law = self._law(self._problem.theta(theta))
            return self._model.start_gradient(*law)[:2]
        chain, (gain, bias, _, _) = self._discrete(theta, n_steps, scheme)
        return chain.start_gradient(gain, bias)

    def _reward_only_objective(self, theta: Array) -> float:
        return self._policy_objective(theta, reward_only=True).objective

    def _reward_only_gradient(self, theta: Array) -> Array:
        return self._policy_objective(theta, reward_only=True).gradient

    def _matching_gradient(self, theta: Array) -> Array:
        return self._policy_matching(theta).gradient

    def _control_error(self, theta: Array) -> float:
        # Not by the regret identity: near the optimum its difference cancels.
        return float(np.sqrt(self._model.control_error(*self._law(theta)).value))

    def _law_of(self, mean: Array, covariance: Array) -> GaussianMixture:
        from sdebench.closed_form.gaussian_mixture import GaussianMixture

        if not np.any(covariance):
            raise NotExactError("X_0 is a point: it has no density")
        return GaussianMixture.normal(mean, covariance)

    def base_marginal(self, t: float) -> GaussianMixture:
        means, covariances = self._model.base_moments([t])
        return self._law_of(means[0], covariances[0])

    def tilted_marginal(self, t: float) -> GaussianMixture:
        means, covariances = self._model.tilted_moments([t])
        return self._law_of(means[0], covariances[0])

    def error_bound(self, quantity: str, theta: Any = None) -> float:
        theta = self._problem.theta("optimum" if theta is None else theta)
        if quantity in ("objective", "gradient"):
            return float(self._policy_objective(theta).error_bound)
        if quantity in ("reward_only_objective", "reward_only_gradient"):
            return float(self._policy_objective(theta, reward_only=True).error_bound)
        if quantity == "matching_gradient":
            return float(self._policy_matching(theta).error_bound)
        if quantity == "control_error":
            return float(self._model.control_error(*self._law(theta)).error_bound)
        return 0.0
