"""The tilting family: exact controls, objectives and gradients far from the optimum.

With features phi and rewards r_theta = r_ref + theta^T phi + c, the control is the
optimal control of the *wrong* reward, u_theta = sigma grad log h_theta, and the reward
is r = r_{theta*}.  Let h_theta(x, t) =
E[exp r_theta(X_T) | X_t = x] under the base, and E^theta the expectation under the
controlled law, where X_T | X_t = x has density proportional to p(x_T | x) e^{r_theta}.
For any start law p_0,

    J(theta)      = E_{p_0}[ (theta - theta*)^T E^theta[phi(X_T) | X_0]
                             - log h_theta(X_0, t_0) ]
    grad J(theta) = E_{p_0}[ Cov^theta(phi, phi | X_0) ] (theta - theta*)
    log Z         = log E_{p_0} h_{theta*}(X_0, t_0).

Every inner expectation is closed; the outer one is a Gauss-Hermite quadrature over
p_0 with an error bound from a second, coarser rule, exact when the start is a point,
or when base and tilt are Gaussian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from scipy.special import logsumexp

from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.base_process import BaseProcess
from sdebench.closed_form.log_quadratics import Array
from sdebench.errors import NotExactError, NumericalError


@dataclass(frozen=True)
class StartLaw:
    """A mixture of diagonal Gaussians; scale 0 is a point.

    weights (K,), means (K, d), scales (K, d) >= 0.
    """

    weights: Array
    means: Array
    scales: Array

    @property
    def is_point(self) -> bool:
        """Whether X_0 is deterministic."""
        return len(self.weights) == 1 and not np.any(self.scales)

    def nodes(self, order: int) -> tuple[Array, Array]:
        """Return tensor Gauss-Hermite nodes (n, d) and weights (n,) of this law."""
        dim = self.means.shape[1]
        points, point_weights = hermegauss(order)
        point_weights = point_weights / point_weights.sum()
        grids = np.meshgrid(*([points] * dim), indexing="ij")
        cube = np.stack([g.ravel() for g in grids], axis=-1)
        grids = np.meshgrid(*([point_weights] * dim), indexing="ij")
        cube_weights = np.prod([g.ravel() for g in grids], axis=0)
        x = self.means[:, None, :] + self.scales[:, None, :] * cube
        w = self.weights[:, None] * cube_weights
        return x.reshape(-1, dim), w.ravel()

    def cubature(self) -> tuple[Array, Array]:
        """Return 2 d nodes per component, exact for polynomials of degree three."""
        dim = self.means.shape[1]
        signs = np.concatenate([np.eye(dim), -np.eye(dim)]) * np.sqrt(dim)
        x = self.means[:, None, :] + self.scales[:, None, :] * signs
        w = np.repeat(self.weights / (2 * dim), 2 * dim)
        return x.reshape(-1, dim), w


@dataclass(frozen=True, eq=False)
class TiltingFamily:
    """Exact algebra of the tilting family on one base process.

    Parameters
    ----------
    base : the base process.
    features : (P, 2d + 1) rows of phi_p, each one quadratic.
    reference : (K, 2d + 1) rows of exp r_ref; one zero row for r_ref = 0.
    constant : c in r_theta.
    theta_star : (P,) the parameters of the reward.
    start : law of X_0 at ``base.start_time``.
    """

    base: BaseProcess
    features: Array
    reference: Array
    constant: float
    theta_star: Array
    start: StartLaw
    start_is_marginal: bool = False
    tolerance: float = 1e-13

    # ---- rows -----------------------------------------------------------------
    def reward_rows(self, theta: Array) -> Array:
        """Return the rows of exp r_theta, (K, 2d + 1)."""
        shift = np.asarray(theta, float) @ self.features
        rows = self.reference + shift
        rows[:, -1] += self.constant
        return rows

    @property
    def affine(self) -> bool:
        """Whether base and tilt are Gaussian, so that the control is affine."""
        return self.base.gaussian and len(self.reference) == 1

    def _terminal_rows(self, theta: Array) -> Array:
        """Return the rows of p_T e^{r_theta}, base-major pairs of components."""
        pairs = self.base.terminal[:, None, :] + self.reward_rows(theta)[None]
        return pairs.reshape(-1, pairs.shape[-1])

    def tilt_rows(self, theta: Array, t: float) -> tuple[Array, Array, Array]:
        """Return (base rows, tilted rows, derivative rows (P, K, 2d + 1)) at t.

        log h_theta = log_value(tilted) - log_value(base); the base rows are empty
        for a Gaussian base, whose tilted rows are h_theta itself.
        """
        tilted, (gain, shift, variance) = self._tilted(theta, t)
        derivative = lq.expectation_rows(self.features, gain, shift, variance)
        width = self.features.shape[1]
        rows = np.zeros((0, width)) if self.base.gaussian else self.base.marginal(t)
        return rows, tilted, derivative

    def _tilted(
        self, theta: Array, t: float
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        """Return tilted rows and the law of X_T given X_t = x and the component."""
        if self.base.gaussian:
            scale, offset, variance = self.base.forward(t, self.base.horizon)
            return lq.integrate_gaussian(
                self.reward_rows(theta), scale, offset, variance
            )
        masses, means, variances = lq.gaussian_parameters(self._terminal_rows(theta))
        scale, offset, noise = self.base.backward(t, self.base.horizon)
        spread = scale**2 * variances + noise
        centre = scale * means + offset
        gain = scale * variances / spread
        conditional = (gain, means - gain * centre, variances * noise / spread)
        return lq.gaussian_rows(masses, centre, spread), conditional

    # ---- pointwise ------------------------------------------------------------
    def log_h(self, x: Array, t: float, theta: Array) -> Array:
        """Return log h_theta(x, t), shape (...), for x (..., d)."""
        base, tilted, _ = self.tilt_rows(theta, t)
        value = lq.log_value(tilted, x)
        return value if self.base.gaussian else value - lq.log_value(base, x)

    def control(self, x: Array, t: float, theta: Array) -> Array:
        """Return u_theta(x, t) = sigma_t grad log h_theta, shape (..., d)."""
        base, tilted, _ = self.tilt_rows(theta, t)
        slope = lq.gradient(tilted, x)
        if not self.base.gaussian:
            slope = slope - lq.gradient(base, x)
        return self.base.sigma(t) * slope

    def log_h_hessian(self, x: Array, t: float, theta: Array) -> Array:
        """Return the Hessian of log h_theta in x, (..., d, d)."""
        base, tilted, _ = self.tilt_rows(theta, t)
        value = lq.hessian(tilted, x)
        return value if self.base.gaussian else value - lq.hessian(base, x)

    # ---- expectations over the start -------------------------------------------
    def _expect(
        self, function: Callable[[Array], Array], law: StartLaw | None = None
    ) -> tuple[Array, float]:
        """Return E of a function of x (n, d) -> (n, ...) and an error bound.

        Of x from ``law``, by default that of the start.
        """
        if law is None:
            law = self.start
            if self.affine and not law.is_point:
                # Every integrand is a polynomial of degree two in x.
                x, w = law.cubature()
                return np.tensordot(w, function(x), axes=1), 0.0
        if law.is_point:
            return function(law.means)[0], 0.0
        dim = law.means.shape[1]
        if dim > 3:
            raise NotExactError(
                f"the answer needs quadrature in {dim} dimensions, which is done up to "
                "3; use a fixed start or a Gaussian base"
            )
        previous: Array | None = None
        gap = np.inf
        for order in (8, 12, 16, 24, 32, 48, 64, 96, 128):
            if order**dim * len(law.weights) > 2_000_000:
                break
            x, w = law.nodes(order)
            value = np.tensordot(w, function(x), axes=1)
            if previous is not None:
                gap = float(np.max(np.abs(value - previous)))
                if gap <= self.tolerance * max(1.0, float(np.max(np.abs(value)))):
                    return value, gap
            previous = value
        assert previous is not None
        return previous, gap

    def _posterior(self, x: Array, theta: Array) -> tuple[Array, Array, Array]:
        """Return weights (n, K), means (n, K, d), variances (K, d) of X_T | X_0 = x."""
        rows, (gain, shift, variance) = self._tilted(theta, self.base.start_time)
        gamma = lq.weights(rows, x)
        return gamma, gain * x[:, None, :] + shift, variance

    def feature_moments(self, x: Array, theta: Array) -> tuple[Array, Array]:
        """Return E^theta of phi(X_T) given X_0 = x (n, d), (n, P), and covariances."""
        return lq.feature_covariance(self.features, *self._posterior(x, theta))

    def objective_and_gradient(
        self, theta: Array, *, reward_only: bool = False
    ) -> tuple[float, Array, float, float]:
        """Return J, grad J (P,) and an absolute error bound for each.

        With ``reward_only`` of -E r(X_T) under the control u_theta instead.
        """
        theta = np.asarray(theta, float)
        delta = -self.theta_star if reward_only else theta - self.theta_star
        start = self.base.start_time

        def integrand(x: Array) -> Array:
            mean, covariance = self.feature_moments(x, theta)
            rest = self.constant if reward_only else self.log_h(x, start, theta)
            value = mean @ delta - rest
            return np.concatenate([value[:, None], covariance @ delta], axis=1)

        with np.errstate(over="ignore", invalid="ignore"):
            if reward_only and np.any(self.reference):
                value, error = self._reward_by_quadrature(theta)
            else:
                value, error = self._expect(integrand)
        if not np.all(np.isfinite(value)):
            raise NumericalError(
                f"the exact objective overflows at theta = {theta.tolist()}; choose "
                "a theta closer to zero or to the optimum"
            )
        rounding = 1e-14 * float(np.max(np.abs(value)))
        bound = error + 16 * rounding
        return float(value[0]), value[1:], bound, bound

    def _reward_by_quadrature(self, theta: Array) -> tuple[Array, float]:
        """Return -E r(X_T), its gradient and an error bound; r need not be quadratic.

        The gradient is -Cov(phi, r) under the law of X_T, since h_theta is known up to
        a constant from a fixed start.
        """
        if not self.start.is_point:
            raise NotExactError(
                "the expected reward has no closed form for a random start and a "
                "reward that is not quadratic"
            )
        weights, means, variances = self._posterior(self.start.means, theta)
        law = StartLaw(weights[0], means[0], np.sqrt(variances))
        rows = self.reward_rows(self.theta_star)
        count = len(self.features)

        def integrand(x: Array) -> Array:
            phi = lq.terms(self.features, x)
            reward = lq.log_value(rows, x)[:, None]
            return np.concatenate([reward, phi, phi * reward], axis=1)

        value, error = self._expect(integrand, law)
        mean, phi, product = value[0], value[1 : count + 1], value[count + 1 :]
        bound = error * (1.0 + float(np.max(np.abs(value))))
        return np.append(-mean, phi * mean - product), 2.0 * bound

    def start_feature_law(self, theta: Array) -> tuple[Array, Array]:
        """Return E_{p_0} of mean (P,) and covariance (P, P) of phi(X_T) given X_0."""
        count = len(self.features)

        def integrand(x: Array) -> Array:
            mean, covariance = self.feature_moments(x, theta)
            return np.concatenate([mean, covariance.reshape(len(x), -1)], axis=1)

        value, _ = self._expect(integrand)
        return value[:count], value[count:].reshape(count, count)

    def log_normalizer(self, theta: Array | None = None) -> tuple[float, float]:
        """Return log E_{p_0} h_theta(X_0, t_0) and an error bound."""
        theta = self.theta_star if theta is None else np.asarray(theta, float)
        start = self.base.start_time
        _, tilted, _ = self.tilt_rows(theta, start)
        if self.start.is_point:
            return float(self.log_h(self.start.means, start, theta)[0]), 0.0
        if self.base.gaussian:
            # sum_k exp l_k integrated against each Gaussian of the start law.
            logs = []
            for w, m, s in zip(
                self.start.weights, self.start.means, self.start.scales, strict=True
            ):
                rows, _ = lq.integrate_gaussian(tilted, 0.0, m, s**2)
                logs.append(np.log(w) + logsumexp(rows[:, -1]))
            return float(logsumexp(logs)), 0.0
        if self.start_is_marginal:
            return float(logsumexp(lq.gaussian_parameters(tilted)[0])), 0.0
        peak = float(np.max(self.log_h(self.start.nodes(8)[0], start, theta)))
        value, error = self._expect(
            lambda x: np.exp(self.log_h(x, start, theta) - peak)[:, None]
        )
        return float(np.log(value[0]) + peak), error / float(value[0])

    # ---- laws -----------------------------------------------------------------
    def memoryless_log_normalizer(self, theta: Array | None = None) -> float:
        """Return log E_{p_T} exp r_theta: log Z when X_0 and X_T are independent."""
        theta = self.theta_star if theta is None else np.asarray(theta, float)
        return float(logsumexp(lq.gaussian_parameters(self._terminal_rows(theta))[0]))

    def ideal_law(self, theta: Array) -> tuple[Array, Array, Array]:
        """Return weights, means and variances of p_T e^{r_theta} / Z."""
        masses, means, variances = lq.gaussian_parameters(self._terminal_rows(theta))
        return np.exp(masses - logsumexp(masses)), means, variances

    def transition(
        self, x: Array, t: float, theta: Array | None
    ) -> tuple[Array, Array, Array, Array]:
        """Return the law of X_t given X_0 = x (n, d) under u_theta (None: the base).

        Returns weights (n, K), means (n, K, d), variances (K, d), gain (K, d).
        """
        start = self.base.start_time
        if self.base.gaussian:
            if theta is None:
                rows = np.zeros((1, self.features.shape[1]))
            else:
                rows, _ = self._tilted(theta, t)
            scale, offset, variance = self.base.forward(start, t)
            rows, (gain, shift, spread) = lq.integrate_gaussian(
                rows, scale, offset, variance
            )
        else:
            source = (
                self.base.marginal(t) if theta is None else self._tilted(theta, t)[0]
            )
            masses, means, variances = lq.gaussian_parameters(source)
            scale, offset, noise = self.base.backward(start, t)
            total = scale**2 * variances + noise
            centre = scale * means + offset
            rows = lq.gaussian_rows(masses, centre, total)
            gain = scale * variances / total
            shift, spread = means - gain * centre, variances * noise / total
        gamma = lq.weights(rows, x)
        return gamma, gain * x[:, None, :] + shift, spread, gain

    def marginal(
        self, t: float, theta: Array | None
    ) -> tuple[Array, Array, Array, float]:
        """Return weights, means, variances of the law of X_t, and an error bound.

        theta None is the base process.  Exact for a point start, a Gaussian base and
        tilt, or the base itself from its own marginal; otherwise the start law is
        replaced by Gauss-Hermite nodes and the bound is the change of the first two
        moments against a coarser rule.
        """
        if theta is None and (self.start_is_marginal and not self.base.gaussian):
            masses, means, variances = lq.gaussian_parameters(self.base.marginal(t))
            return np.exp(masses), means, variances, 0.0
        if t <= self.base.start_time:
            return self.start.weights, self.start.means, self.start.scales**2, 0.0
        if self.start.is_point or self.affine or (theta is None and self.base.gaussian):
            gamma, means, spread, gain = self.transition(self.start.means, t, theta)
            scales = self.start.scales
            weights = (self.start.weights[:, None] * gamma).ravel()
            variances = spread[None] + (gain[None] * scales[:, None, :]) ** 2
            return (
                weights,
                means.reshape(-1, means.shape[-1]),
                variances.reshape(-1, means.shape[-1]),
                0.0,
            )

        def law(order: int) -> tuple[Array, Array, Array]:
            x, w = self.start.nodes(order)
            gamma, means, spread, _ = self.transition(x, t, theta)
            dim = means.shape[-1]
            variances = np.broadcast_to(spread, means.shape)
            return (
                (w[:, None] * gamma).ravel(),
                means.reshape(-1, dim),
                variances.reshape(-1, dim),
            )

        def moments(w: Array, m: Array, v: Array) -> Array:
            return np.concatenate([w @ m, w @ (m**2 + v)])

        previous = moments(*law(6))
        for order in (9, 12, 16, 24, 32, 48, 64):
            current = law(order)
            values = moments(*current)
            gap = float(np.max(np.abs(values - previous)))
            if gap < 1e-13 * max(1.0, float(np.max(np.abs(values)))):
                break
            previous = values
        return (*current, gap)

    # ---- cross-entropy ---------------------------------------------------------
    def _tilted_start(self) -> StartLaw | None:
        """Return the law p_0 h / Z of X_0 under the tilted paths; None: not closed."""
        if self.start.is_point:
            return self.start
        rows = self.tilt_rows(self.theta_star, self.base.start_time)[1]
        if self.base.gaussian:
            start = self.start
            densities = lq.gaussian_rows(
                np.log(start.weights), start.means, start.scales**2
            )
            rows = (densities[:, None] + rows).reshape(-1, rows.shape[-1])
        elif not self.start_is_marginal:
            return None
        masses, means, variances = lq.gaussian_parameters(rows)
        return StartLaw(np.exp(masses - logsumexp(masses)), means, np.sqrt(variances))

    def cross_entropy_gradient(self, theta: Array) -> tuple[Array, float]:
        """Return the gradient (P,) of KL(P* || P_theta) and an error bound.

        The densities to the base are e^r / Z and e^{r_theta} / h_theta(X_0), and under
        P* the law of X_T given X_0 is that of theta*, so that the gradient is

            E*[ E^theta[phi(X_T) | X_0] - E^{theta*}[phi(X_T) | X_0] ],

        X_0 with the tilted density p_0 h / Z: by quadrature where it is not Gaussian.
        """
        theta, law = np.asarray(theta, float), self._tilted_start()
        start, log_z = self.base.start_time, self.log_normalizer()[0]

        def integrand(x: Array) -> Array:
            own, best = (
                self.feature_moments(x, parameters)[0]
                for parameters in (theta, self.theta_star)
            )
            if law is not None:
                return own - best
            ratio = np.exp(self.log_h(x, start, self.theta_star) - log_z)
            return ratio[:, None] * (own - best)

        if self.affine:  # polynomials of degree two in x
            assert law is not None
            x, w = law.cubature()
            value, error = w @ integrand(x), 0.0
        else:
            value, error = self._expect(integrand, law)
        return value, error + 1e-14 * float(np.max(np.abs(value)))

    # ---- lean adjoint ------------------------------------------------------------
    def matching_gradient(self, theta: Array) -> tuple[Array, float]:
        """Return the gradient of the adjoint-matching loss 1/2 E int |u + sigma a|^2.

        Affine case: the lean adjoint is a_t = -Phi(T, t) grad r(X_T), X_T | X_t is
        Gaussian, and the time integral is a Gauss-Legendre rule whose error is
        bounded by a finer one.  At theta* it is zero for every problem.
        """
        theta = np.asarray(theta, float)
        if np.array_equal(theta, self.theta_star):
            return np.zeros(len(theta)), 0.0
        if not self.affine:
            raise NotExactError(
                "the matching gradient is exact on Gaussian problems and at the "
                "optimum only: off the optimum the lean adjoint of a mixture has no "
                "closed conditional mean"
            )
        lin_r, quad_r, _ = lq.split(self.reward_rows(self.theta_star)[0])
        base = self.base

        def integrand(t: float) -> Array:
            _, tilted, derivative = self.tilt_rows(theta, t)
            _, (gain, shift, _) = self._tilted(theta, t)
            lin, quad, _ = lq.split(tilted[0])
            dlin, dquad, _ = lq.split(derivative[:, 0])
            weights, means, variances, _ = self.marginal(t, theta)
            growth = base.forward(t, base.horizon)[0]
            slope = 2.0 * quad - growth * 2.0 * quad_r * gain[0]
            level = lin - growth * (lin_r + 2.0 * quad_r * shift[0])
            first = weights @ means
            second = weights @ (means**2 + variances)
            product = (
                dlin * level
                + (dlin * slope + 2.0 * dquad * level) * first
                + 2.0 * dquad * slope * second
            )
            return np.asarray(base.sigma(t) ** 2 * product.sum(axis=1))

        def rule(panels: int) -> Array:
            nodes, weights = leggauss(24)
            edges = np.linspace(base.start_time, base.horizon, panels + 1)
            total = np.zeros(len(theta))
            for a, b in pairwise(edges):
                for node, weight in zip(nodes, weights, strict=True):
                    t = a + 0.5 * (b - a) * (node + 1.0)
                    total += 0.5 * (b - a) * weight * integrand(t)
            return total

        coarse, fine = rule(3), rule(5)
        error = float(np.max(np.abs(fine - coarse)))
        return fine, error + 1e-14 * float(np.max(np.abs(fine)))
