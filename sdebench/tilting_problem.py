"""Problems with a mixture base or target and the tilting family as control family."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.tilting import TiltingFamily
from sdebench.errors import NotExactError
from sdebench.problem import (
    EULER,
    Array,
    Problem,
    Truth,
    as_states,
    as_time,
    check_noisy,
    check_scheme,
)
from sdebench.simulate.tables import MixtureTables, noise_mask

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import AffineChain
    from sdebench.closed_form.gaussian_mixture import GaussianMixture


@dataclass(frozen=True, kw_only=True)
class TiltingProblem(Problem):
    """A problem given by a `TiltingFamily` (classes G and F)."""

    @abstractmethod
    def build(self) -> TiltingFamily:
        """Return the exact algebra for the current parameters."""

    @cached_property
    def family(self) -> TiltingFamily:
        """The exact algebra, built once."""
        return self.build()

    def __post_init__(self) -> None:
        # Build at once: a parameter out of range is refused where it is given, and so
        # is a tilt without a normalizable law, even where h is finite for given X_0.
        self.family.ideal_law(self.theta_star)
        self.family.tilt_rows(self.theta_star, self.time_span[0])

    @property
    def problem_class(self) -> str:
        if self.family.start.is_point:
            return "pinned start"
        return "Gaussian tilt" if self.family.affine else "mixture tilt"

    @property
    def dim(self) -> int:
        return self.family.base.dim

    @property
    def time_span(self) -> tuple[float, float]:
        return self.family.base.start_time, self.family.base.horizon

    @property
    def theta_star(self) -> Array:
        return self.family.theta_star

    @cached_property
    def truth(self) -> TiltingTruth:
        return TiltingTruth(self)

    def drift(self, x: Array, t: float) -> Array:
        return self.family.base.drift(
            as_states(x, self.dim), as_time(t, self.time_span)
        )

    def diffusion(self, t: float) -> Array:
        sigma = self.family.base.sigma(as_time(t, self.time_span))
        return sigma * np.eye(self.dim)

    def running_cost(self, x: Array, t: float) -> Array:
        return np.zeros(as_states(x, self.dim).shape[:-1])

    def reward(self, x: Array) -> Array:
        rows = self.family.reward_rows(self.theta_star)
        return lq.log_value(rows, as_states(x, self.dim))

    def tables(
        self,
        theta: Array | None,
        times: Array,
        scheme: str = EULER,
        noisy: Array | None = None,
    ) -> MixtureTables:
        check_scheme(scheme)
        check_noisy(noisy, len(times) - 1, scheme)
        family, base = self.family, self.family.base
        parameters = self.theta_star if theta is None else np.asarray(theta, float)
        mask = np.ones(len(times) - 1) if noisy is None else noisy
        steps = [
            base.step(s, t, scheme) if is_noisy else base.flow_step(s, t)
            for (s, t), is_noisy in zip(pairwise(times), mask, strict=True)
        ]
        rows = [family.tilt_rows(parameters, t) for t in times[:-1]]
        control = np.array([step.control_gain for step in steps])
        start = family.start
        end_weights, end_means, end_variances = family.ideal_law(self.theta_star)
        return MixtureTables(
            scale=np.array([np.full(self.dim, step.scale) for step in steps]),
            offset=np.array([step.offset for step in steps]),
            base_gain=np.array([step.base_gain for step in steps]),
            noise=np.array([step.noise for step in steps]),
            control_gain=np.zeros_like(control) if theta is None else control,
            base=np.array([row[0] for row in rows]),
            tilted=np.array([row[1] for row in rows]),
            tilted_derivative=np.array([row[2] for row in rows]).swapaxes(0, 1).copy(),
            **self._reward_tables(),
            start_cumulative=np.append(np.cumsum(start.weights)[:-1], 1.0),
            start_mean=np.ascontiguousarray(start.means),
            start_scale=np.ascontiguousarray(start.scales),
            noisy=np.asarray(mask, float),
            denoiser=self._denoiser(times, scheme),
            density=self._density(times),
            end_cumulative=np.append(np.cumsum(end_weights)[:-1], 1.0),
            end_mean=np.ascontiguousarray(end_means),
            end_scale=np.sqrt(end_variances) * np.ones_like(end_means),
        )

    def _reward_tables(self) -> dict[str, Array]:
        """Return the fields of the reward."""
        return {"reward": self.family.reward_rows(self.theta_star)}

    def _density(self, times: Array) -> Array:
        """Return the rows of p_t at all times (N + 1, K, 2d + 1), or none."""
        if self.family.start.is_point:
            return np.zeros((0, 0, 0))
        return np.array([self.family.base.marginal(t) for t in times])

    def _denoiser(self, times: Array, scheme: str) -> Array:
        """Return `BaseProcess.denoiser` of every step (N, 5), or (0, 5) if none."""
        rows = [self.family.base.denoiser(s, t) for s, t in pairwise(times)]
        if scheme != EULER or rows[0] is None:
            return np.zeros((0, 5))
        return np.array(rows)


def affine_chain(
    tables: MixtureTables,
) -> tuple[AffineChain, tuple[Array, Array, Array, Array]]:
    """Return the chain of one-component tables and its (K, k, dK, dk).

    The control gradient of log-quadratics with one component is affine, so the
    discretized problem is linear-quadratic and exact.
    """
    from sdebench.closed_form.affine_chain import AffineChain

    dim = tables.offset.shape[1]
    eye = np.eye(dim)
    lin, quad, _ = lq.split(tables.tilted[:, 0])
    dlin, dquad, _ = lq.split(tables.tilted_derivative[:, :, 0])
    gain = tables.control_gain[:, None]
    reward_lin, reward_quad, reward_const = lq.split(tables.reward[0])
    chain = AffineChain(
        transition=tables.scale[:, :, None] * eye,
        offset=tables.offset,
        noise=tables.noise[:, None, None] * eye,
        running=np.zeros((len(lin), dim, dim)),
        reward_quadratic=np.diag(-2.0 * reward_quad),
        reward_linear=reward_lin,
        reward_constant=float(reward_const),
        start_mean=tables.start_mean[0],
        start_covariance=np.diag(tables.start_scale[0] ** 2),
        noisy=noise_mask(tables),
        denoiser=tables.denoiser,
    )
    return chain, (
        (2.0 * gain * quad)[:, :, None] * eye,
        gain * lin,
        (2.0 * gain * dquad)[..., None] * eye,
        gain * dlin,
    )


class TiltingTruth(Truth):
    """Exact answers of a `TiltingProblem`."""

    def __init__(self, problem: TiltingProblem) -> None:
        super().__init__(problem)
        self._family = problem.family
        self._objectives: dict[
            tuple[bytes, bool], tuple[float, Array, float, float]
        ] = {}
        self._matchings: dict[bytes, tuple[Array, float]] = {}
        self._cross_entropies: dict[bytes, tuple[Array, float]] = {}

    def control(self, x: Array, t: float) -> Array:
        return self._family.control(*self._at(x, t), self._family.theta_star)

    def value(self, x: Array, t: float) -> Array:
        return -self._family.log_h(*self._at(x, t), self._family.theta_star)

    def policy(self, x: Array, t: float, theta: Any) -> Array:
        return self._family.control(*self._at(x, t), self._problem.theta(theta))

    def _chain(
        self, theta: Array, times: Array, scheme: str, noisy: Array | None = None
    ) -> tuple[AffineChain, tuple[Array, Array, Array, Array]]:
        if not self._family.affine:
            return super()._chain(theta, times, scheme, noisy)
        tables = self._problem.tables(theta, times, scheme, noisy)
        assert isinstance(tables, MixtureTables)
        return affine_chain(tables)

    def _log_normalizer(self) -> float:
        return self._family.log_normalizer()[0]

    def _policy_objective(
        self, theta: Array, reward_only: bool = False
    ) -> tuple[float, Array, float, float]:
        key = theta.tobytes(), reward_only
        if key not in self._objectives:
            self._objectives[key] = self._family.objective_and_gradient(
                theta, reward_only=reward_only
            )
        return self._objectives[key]

    def _policy_matching(self, theta: Array) -> tuple[Array, float]:
        key = theta.tobytes()
        if key not in self._matchings:
            self._matchings[key] = self._family.matching_gradient(theta)
        return self._matchings[key]

    def _policy_cross_entropy(self, theta: Array) -> tuple[Array, float]:
        key = theta.tobytes()
        if key not in self._cross_entropies:
            self._cross_entropies[key] = self._family.cross_entropy_gradient(theta)
        return self._cross_entropies[key]

    def _objective(self, theta: Array) -> float:
        return self._policy_objective(theta)[0]

    def _gradient(self, theta: Array) -> Array:
        return self._policy_objective(theta)[1].copy()

    def _reward_only_objective(self, theta: Array) -> float:
        return self._policy_objective(theta, reward_only=True)[0]

    def _reward_only_gradient(self, theta: Array) -> Array:
        return self._policy_objective(theta, reward_only=True)[1].copy()

    def _matching_gradient(self, theta: Array) -> Array:
        return self._policy_matching(theta)[0].copy()

    def _cross_entropy_gradient(self, theta: Array) -> Array:
        return self._policy_cross_entropy(theta)[0].copy()

    def initial_value_bias(self) -> float:
        """Return log Z minus its value for an independent start and end.

        Zero exactly when the base is memoryless or starts at a point; its size says
        how far the law of X_T under u* is from the tilted law.
        """
        return self.log_normalizer() - self._family.memoryless_log_normalizer()

    def _mixture(
        self, weights: Array, means: Array, variances: Array
    ) -> GaussianMixture:
        from sdebench.closed_form.gaussian_mixture import GaussianMixture

        if not np.all(variances > 0):
            raise NotExactError("X_0 is a point: it has no density")
        # Components whose weight underflows cannot matter.
        kept = weights > 0
        return GaussianMixture(np.log(weights[kept]), means[kept], variances[kept])

    def base_marginal(self, t: float) -> GaussianMixture:
        return self._mixture(*self._family.marginal(t, None)[:3])

    def tilted_marginal(self, t: float) -> GaussianMixture:
        return self._mixture(*self._family.marginal(t, self._family.theta_star)[:3])

    def policy_marginal(self, t: float, theta: Any) -> GaussianMixture:
        """Return the law of X_t under the control u_theta."""
        return self._mixture(*self._family.marginal(t, self._problem.theta(theta))[:3])

    def ideal_law(self) -> GaussianMixture:
        """Return the tilted base law p_T e^r / Z, the goal of fine-tuning."""
        return self._mixture(*self._family.ideal_law(self._family.theta_star))

    def error_bound(self, quantity: str, theta: Any = None) -> float:
        family = self._family
        if quantity == "log_normalizer":
            return family.log_normalizer()[1]
        theta = self._problem.theta("optimum" if theta is None else theta)
        if quantity == "matching_gradient":
            return self._policy_matching(theta)[1]
        if quantity == "cross_entropy_gradient":
            return self._policy_cross_entropy(theta)[1]
        if quantity in ("reward_only_objective", "reward_only_gradient"):
            return self._policy_objective(theta, reward_only=True)[2]
        if quantity in ("objective", "gradient"):
            return self._policy_objective(theta)[2]
        return 0.0
