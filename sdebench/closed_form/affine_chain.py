r"""The linear-quadratic control problem in discrete time, in closed form.

    X_{n+1} = M_n X_n + c_n + G_n (w_n + z_n),    z_n ~ N(0, I),   X_0 ~ N(m_0, S_0)
    minimise J_N = E[ sum_n (1/2 |w_n|^2 + 1/2 X_n^T F_n X_n) - r(X_N) ],
    r(x) = -1/2 x^T Q x + q^T x + r0 - 1/4 sum_i c_i x_i^4,

with the control in noise units and the step length inside F_n, as in
``simulate.tables.LinearTables``; every coefficient may depend on n.  This is exactly
what a simulation computes, so J_N(theta) and its gradient separate the error of the
time discretization from an estimator's own bias.  For Euler-Maruyama
M = I + h A, c = h a, G = sqrt(h) sigma, F_n = h F and w = sqrt(h) u.

The best feedback w = K_n x + k_n, its value 1/2 x^T P_n x + p_n^T x + rho_n, and the
value -log E_base[exp(r - sum 1/2 x^T F x) | X_n = x] of the tilted chain share P_n
and p_n; one pays 1/2 tr(G^T P G) for the noise of a step and the other
1/2 log det(I + G^T P G), so J_N exceeds -log Z even at the best feedback.

With a quartic reward (c not zero) the answers for a given feedback stay exact, see
`sdebench.closed_form.quartic`; those that need the value function are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdebench.errors import NotExactError, ParameterError
from sdebench.simulate.tables import (
    LinearTables,
    has_start_parameters,
    noise_mask,
    reference_start,
)

from .hamiltonian import Value, log_expectation, symmetric
from .initial_law import expected_score
from .linear_quadratic import LinearQuadratic
from .quartic import check_quartic, require_quadratic, stein_quadratic
from .validation import check_array, check_covariance

Array = NDArray[np.float64]


def parameter_derivatives(tables: LinearTables) -> tuple[Array, Array]:
    """Return dK_n/dtheta_p (P, N, d, d) and dk_n/dtheta_p (P, N, d) of the tables."""
    gain = np.einsum("psn,snij->pnij", tables.basis, tables.feature_gain)
    bias = np.einsum("psn,snj->pnj", tables.basis, tables.feature_bias)
    return gain, bias


class StartParameters(NamedTuple):
    """How theta moves X_0 = m + L xi, and what that costs.

    factor : (d, d) L.
    mean_derivative, factor_derivative : (P, d) of m and (P, d, d) of L.
    cost, cost_gradient : relative entropy to the reference law, its gradient (P,).
    """

    factor: Array
    mean_derivative: Array
    factor_derivative: Array
    cost: float
    cost_gradient: Array


@dataclass(frozen=True, eq=False, kw_only=True)
class AffineChain:
    """The chain of the module docstring; every answer is exact to rounding.

    Parameters
    ----------
    transition : (N, d, d) M_n.
    offset : (N, d) c_n.
    noise : (N, d, m) G_n.
    running : (N, d, d) symmetric F_n, with the step length inside.
    reward_quadratic : (d, d) symmetric Q.
    reward_linear : (d,) q.
    reward_constant : r0.
    start_mean : (d,) m_0.
    start_covariance : (d, d) S_0; zero for a fixed start.
    noisy : (N,) 0 for steps without noise, z_n = 0, else 1; default all 1.
    reward_quartic : (d,) c; default none.
    denoiser : (N, 5) or empty, of the tables; no answer here needs it.
    start_parameters : how theta moves the law of X_0; default not at all.  The
        objective then holds the relative entropy to the reference law, gradients the
        derivatives in X_0, and the optimum is one over start laws as well.

    Raises
    ------
    ParameterError
        On wrong shapes or values, and from the methods that need a value function
        when the reward's curvature makes it infinite.
    """

    transition: NDArray[np.floating]
    offset: NDArray[np.floating]
    noise: NDArray[np.floating]
    running: NDArray[np.floating]
    reward_quadratic: NDArray[np.floating]
    reward_linear: NDArray[np.floating]
    reward_constant: float
    start_mean: NDArray[np.floating]
    start_covariance: NDArray[np.floating]
    noisy: NDArray[np.floating] | None = None
    reward_quartic: NDArray[np.floating] | None = None
    denoiser: NDArray[np.floating] = field(default_factory=lambda: np.zeros((0, 5)))
    start_parameters: StartParameters | None = None

    def __post_init__(self) -> None:
        d, n = len(np.atleast_1d(np.asarray(self.start_mean))), len(self.transition)
        m = np.shape(self.noise)[-1]
        shapes = {
            "transition": (n, d, d),
            "offset": (n, d),
            "noise": (n, d, m),
            "running": (n, d, d),
            "reward_quadratic": (d, d),
            "reward_linear": (d,),
            "start_mean": (d,),
        }
        for name, shape in shapes.items():
            flat = name in ("running", "reward_quadratic")
            array = check_array(name, getattr(self, name), shape, symmetric=flat)
            object.__setattr__(self, name, array)
        start = check_covariance("start_covariance", self.start_covariance, d)
        object.__setattr__(self, "start_covariance", start)
        object.__setattr__(self, "reward_constant", float(self.reward_constant))
        noisy = np.ones(n) if self.noisy is None else self.noisy
        object.__setattr__(self, "noisy", check_array("noisy", noisy, (n,)))
        quartic = check_quartic(self.reward_quartic, d)
        object.__setattr__(self, "reward_quartic", quartic)

    @classmethod
    def from_tables(cls, tables: LinearTables) -> AffineChain:
        """Return the chain that a simulation of ``tables`` runs."""
        factor = np.asarray(tables.start_factor, dtype=np.float64)
        start = None
        if has_start_parameters(tables):
            start = StartParameters(
                factor,
                tables.start_mean_derivative,
                tables.start_factor_derivative,
                float(tables.start_cost[0]),
                tables.start_cost_gradient,
            )
        return cls(
            transition=tables.transition,
            offset=tables.offset,
            noise=tables.noise,
            running=tables.running,
            reward_quadratic=tables.reward_quadratic,
            reward_linear=tables.reward_linear,
            reward_constant=float(np.asarray(tables.reward_constant).reshape(())),
            start_mean=tables.start_mean,
            start_covariance=factor @ factor.T,
            noisy=noise_mask(tables),
            reward_quartic=tables.reward_quartic,
            denoiser=tables.denoiser,
            start_parameters=start,
        )

    @classmethod
    def euler_maruyama(cls, problem: LinearQuadratic, times: ArrayLike) -> AffineChain:
        """Return the Euler-Maruyama chain of ``problem`` on ``times`` (N + 1,)."""
        widths = np.diff(np.asarray(times, dtype=np.float64))
        if not np.all(widths > 0.0):
            raise ParameterError("times must increase strictly")
        h = widths[:, None, None]
        return cls(
            transition=np.eye(problem.dim) + h * problem.drift_matrix,
            offset=widths[:, None] * problem.drift_offset,
            noise=np.sqrt(h) * problem.diffusion,
            running=h * problem.running,
            reward_quadratic=problem.reward_quadratic,
            reward_linear=problem.reward_linear,
            reward_constant=problem.reward_constant,
            start_mean=problem.start_mean,
            start_covariance=problem.start_covariance,
            reward_quartic=problem.reward_quartic,
        )

    @property
    def n_steps(self) -> int:
        """Return N."""
        return len(self.transition)

    @property
    def dim(self) -> int:
        """Return d."""
        return len(self.start_mean)

    # ------------------------------------------------------------ value function

    def _recursion(
        self, *, log_determinant: bool
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Return P, p, rho (N + 1 each) and the best K, k (N each)."""
        require_quadratic(np.asarray(self.reward_quartic))
        n_steps, d, m = self.noise.shape
        P, p = np.empty((n_steps + 1, d, d)), np.empty((n_steps + 1, d))
        rho = np.empty(n_steps + 1)
        K, k = np.empty((n_steps, m, d)), np.empty((n_steps, m))
        P[-1], p[-1] = self.reward_quadratic, -self.reward_linear
        rho[-1] = -self.reward_constant
        for n in reversed(range(n_steps)):
            M, c, G = self.transition[n], self.offset[n], self.noise[n]
            curvature = symmetric(G.T @ P[n + 1] @ G)
            values = np.linalg.eigvalsh(curvature)
            if values[0] <= -1.0:
                raise ParameterError(
                    "the reward minus the running cost cannot be tilted with: at "
                    f"step {n} of {n_steps} the matrix I + G^T P G has the "
                    f"eigenvalue {1.0 + values[0]:.6g}; reduce the positive "
                    "curvature of the reward or the horizon"
                )
            target = np.column_stack((P[n + 1] @ M, P[n + 1] @ c + p[n + 1]))
            feedback = -np.linalg.solve(np.eye(m) + curvature, G.T @ target)
            K[n], k[n] = feedback[:, :d], feedback[:, d]
            closed, drift = M + G @ K[n], c + G @ k[n]
            # Joseph form: a sum of squares where F and Q are positive semi-definite
            P[n] = symmetric(
                self.running[n] + closed.T @ P[n + 1] @ closed + K[n].T @ K[n]
            )
            p[n] = closed.T @ (P[n + 1] @ drift + p[n + 1]) + K[n].T @ k[n]
            noise = np.sum(np.log1p(values)) if log_determinant else np.sum(values)
            rho[n] = rho[n + 1] + p[n + 1] @ drift
            rho[n] += 0.5 * (drift @ P[n + 1] @ drift + k[n] @ k[n] + noise)
        return P, p, rho, K, k

    def optimal_feedback(self) -> tuple[Array, Array]:
        """Return K (N, m, d), k (N, m) of the feedback that minimizes J_N."""
        return self._recursion(log_determinant=False)[3:]

    def value_coefficients(self, *, tilted: bool = False) -> tuple[Array, Array, Array]:
        """Return P (N + 1, d, d), p (N + 1, d), rho (N + 1,) of the value function.

        Of J_N, or with ``tilted`` of -log E_base[exp(r - running cost) | X_n = x].
        """
        return self._recursion(log_determinant=tilted)[:3]

    def _reference_start(self) -> tuple[Array, Array]:
        """Return mean and covariance of X_0 under the base process."""
        start = self.start_parameters
        if start is None:
            return np.asarray(self.start_mean), np.asarray(self.start_covariance)
        return reference_start(
            self.start_mean, start.mean_derivative, start.cost_gradient
        )

    def optimal_cost(self) -> float:
        """Return the minimum of J_N over feedback controls, and start laws if free."""
        P, p, rho = (part[0] for part in self.value_coefficients())
        if self.start_parameters is not None:
            return -log_expectation(Value(P, p, float(rho)), *self._reference_start())
        m = self.start_mean
        spread = float(np.sum(P * self.start_covariance))
        return float(0.5 * (m @ P @ m + spread) + p @ m + rho)

    def log_normalizer(self) -> float:
        """Return log E_base exp(r(X_N) - sum_n 1/2 X_n^T F_n X_n).

        Raises
        ------
        ParameterError
            When it is infinite, with the eigenvalue that shows it.
        """
        P, p, rho = (part[0] for part in self.value_coefficients(tilted=True))
        value = Value(P, p, float(rho))
        return log_expectation(value, *self._reference_start())

    def tilted_moments(self) -> tuple[Array, Array]:
        """Return means (N + 1, d) and covariances (N + 1, d, d) of the tilted chain P*.

        P* is the base chain times exp(r - sum_n 1/2 X_n^T F_n X_n) / Z.  X_0 is tilted
        by h_0; the noise of a step given X_n is N(K_n X_n + k_n, (I + G^T P G)^-1)
        with the best feedback: no control gives this chain its smaller noise.

        Raises
        ------
        NotExactError
            With steps without noise, whose density under a control does not exist.
        """
        if not np.all(np.asarray(self.noisy) > 0.0):
            raise NotExactError(
                "the tilted chain has no density with respect to a controlled one "
                "where steps have no noise"
            )
        P, p, _, K, k = self._recursion(log_determinant=True)
        self.log_normalizer()  # says so where it is infinite
        mean, covariance = self._reference_start()
        shrink = np.linalg.inv(np.eye(self.dim) + covariance @ P[0])
        means, covariances = np.empty_like(p), np.empty_like(P)
        means[0] = shrink @ (mean - covariance @ p[0])
        covariances[0] = symmetric(shrink @ covariance)
        closed, drift = self.closed_loop(K, k)
        for n, (B, G) in enumerate(zip(closed, self.noise, strict=True)):
            narrowed = np.eye(G.shape[1]) + G.T @ P[n + 1] @ G
            means[n + 1] = B @ means[n] + drift[n]
            covariances[n + 1] = symmetric(
                B @ covariances[n] @ B.T + G @ np.linalg.solve(narrowed, G.T)
            )
        return means, covariances

    # ------------------------------------------------------------- one feedback

    def moments(self, gain: Array, bias: Array) -> tuple[Array, Array]:
        """Return means (N + 1, d) and covariances (N + 1, d, d) under a feedback.

        Parameters
        ----------
        gain, bias : K (N, m, d) and k (N, m) of w_n = K_n x + k_n.
        """
        gain, bias = self._check_feedback(gain, bias)
        d = self.dim
        means = np.empty((self.n_steps + 1, d))
        covariances = np.empty((self.n_steps + 1, d, d))
        means[0], covariances[0] = self.start_mean, self.start_covariance
        closed, drift = self.closed_loop(gain, bias)
        noise = self.noise @ np.swapaxes(self.noise, 1, 2)
        noise *= np.asarray(self.noisy)[:, None, None]
        for n, B in enumerate(closed):
            means[n + 1] = B @ means[n] + drift[n]
            covariances[n + 1] = symmetric(B @ covariances[n] @ B.T + noise[n])
        return means, covariances

    def _check_feedback(self, gain: Array, bias: Array) -> tuple[Array, Array]:
        n, d, m = self.noise.shape
        return check_array("gain", gain, (n, m, d)), check_array("bias", bias, (n, m))

    def closed_loop(self, gain: Array, bias: Array) -> tuple[Array, Array]:
        """Return B (N, d, d), b (N, d) with E[X_{n+1} | X_n = x] = B_n x + b_n."""
        closed = self.transition + self.noise @ gain
        drift = self.offset + np.einsum("ndm,nm->nd", self.noise, bias)
        return closed, drift

    def objective(self, gain: Array, bias: Array) -> float:
        """Return J_N of the feedback K (N, m, d), k (N, m)."""
        gain, bias = self._check_feedback(gain, bias)
        means, covariances = self.moments(gain, bias)
        second = covariances + means[:, :, None] * means[:, None, :]
        cost = _square(gain, bias, means[:-1], covariances[:-1])
        cost += np.sum(self.running * second[:-1])
        start = 0.0 if self.start_parameters is None else self.start_parameters.cost
        return 0.5 * cost + start + self.reward_only_objective(gain, bias)

    def reward_only_objective(self, gain: Array, bias: Array) -> float:
        """Return -E r(X_N) under the feedback K (N, m, d), k (N, m)."""
        Q, q, r0 = self._terminal(gain, bias)
        means, covariances = (part[-1] for part in self.moments(gain, bias))
        second = covariances + np.outer(means, means)
        return 0.5 * float(np.sum(Q * second)) - float(q @ means) - r0

    def _terminal(self, gain: Array, bias: Array) -> tuple[Array, Array, float]:
        """Return Q, q, r0 of the reward, quartic terms by Stein's lemma."""
        Q, q = np.asarray(self.reward_quadratic), np.asarray(self.reward_linear)
        quartic = np.asarray(self.reward_quartic)
        if not np.any(quartic):
            return Q, q, self.reward_constant
        means, covariances = self.moments(gain, bias)
        more = stein_quadratic(quartic, means[-1], np.diag(covariances[-1]))
        return Q + np.diag(more[0]), q + more[1], self.reward_constant + more[2]

    def gradient(
        self,
        gain: Array,
        bias: Array,
        gain_derivative: Array,
        bias_derivative: Array,
        *,
        reward_only: bool = False,
        step_weights: Array | None = None,
    ) -> Array:
        """Return the gradient (P,) of ``objective``.

        It is a sum over steps, sum_n E[(dw_n/dtheta)^T (w_n + G_n^T lambda_{n+1})] with
        the pathwise derivative lambda of the cost to go; ``step_weights`` weights the
        terms, as estimators do that leave steps out.

        Parameters
        ----------
        gain, bias : K (N, m, d), k (N, m).
        gain_derivative, bias_derivative : dK/dtheta (P, N, m, d), dk/dtheta (P, N, m).
        reward_only : of -E r(X_N) instead, without control and running cost.
        step_weights : (N,), default all 1.
        """
        if step_weights is not None:
            weights = check_array("step_weights", step_weights, (self.n_steps,))
            gain_derivative = gain_derivative * weights[:, None, None]
            bias_derivative = bias_derivative * weights[:, None]
        adjoint = self.adjoint(gain, bias, reward_only=reward_only)
        own = 0.0 if reward_only else 1.0
        return self._contract(
            gain, bias, gain_derivative, bias_derivative, adjoint, own
        )

    def matching_gradient(
        self, gain: Array, bias: Array, gain_derivative: Array, bias_derivative: Array
    ) -> Array:
        """Return the expectation (P,) of the adjoint-matching gradient of the chain.

        Per path it is sum_n (dw_n)^T (w_n + G_n^T a_{n+1}) with the lean adjoint
        a_N = Q X_N - q, a_n = M_n^T a_{n+1} + F_n X_n.  It is zero at the feedback
        that minimizes J_N and differs from ``gradient``, whose arguments it takes,
        elsewhere.
        """
        adjoint = self.adjoint(gain, bias, lean=True)
        return self._contract(gain, bias, gain_derivative, bias_derivative, adjoint)

    def cross_entropy_gradient(
        self, gain: Array, bias: Array, gain_derivative: Array, bias_derivative: Array
    ) -> Array:
        """Return the gradient (P,) of KL(P* || law of the feedback).

        P* is the law of ``tilted_moments``.  It is E* sum_n (dw_n)^T (w_n - w*_n) with
        the best feedback w*_n, and minus the expected score of the law of X_0 with
        start parameters.  The arguments are those of ``gradient``.
        """
        gain, bias = self._check_feedback(gain, bias)
        best_gain, best_bias = self.optimal_feedback()
        means, covariances = self.tilted_moments()
        result = self._project(
            gain_derivative,
            bias_derivative,
            (gain - best_gain, bias - best_bias),
            (means, covariances),
        )
        start = self.start_parameters
        if start is None:
            return result
        derivatives = start.mean_derivative, start.factor_derivative
        law = np.asarray(self.start_mean), start.factor
        return result - expected_score(*law, derivatives, means[0], covariances[0])

    def adjoint(
        self, gain: Array, bias: Array, *, lean: bool = False, reward_only: bool = False
    ) -> tuple[Array, Array]:
        """Return S (N + 1, d, d), s (N + 1, d) with E[adjoint_n | X_n = x] = S x + s.

        The full adjoint is the pathwise derivative of the cost,
        a_n = M^T a_{n+1} + K^T (w_n + G^T a_{n+1}) + F_n X_n; the lean one drops
        the terms of the feedback, and ``reward_only`` those of the costs w_n and F_n.
        With a quartic reward S x + s is the best affine fit of the conditional mean.
        """
        gain, bias = self._check_feedback(gain, bias)
        d = self.dim
        S, s = np.empty((self.n_steps + 1, d, d)), np.empty((self.n_steps + 1, d))
        Q, q, _ = self._terminal(gain, bias)
        S[-1], s[-1] = Q, -q
        closed, drift = self.closed_loop(gain, bias)
        left = self.transition if lean else closed
        for n in reversed(range(self.n_steps)):
            S[n] = left[n].T @ S[n + 1] @ closed[n]
            s[n] = left[n].T @ (S[n + 1] @ drift[n] + s[n + 1])
            if not reward_only:
                S[n] += self.running[n]
            if not (lean or reward_only):
                S[n] += gain[n].T @ gain[n]
                s[n] += gain[n].T @ bias[n]
        return S, s

    def _contract(
        self,
        gain: Array,
        bias: Array,
        gain_derivative: Array,
        bias_derivative: Array,
        adjoint: tuple[Array, Array],
        own: float = 1.0,
    ) -> Array:
        """Return sum_n E[(dw_n)^T (own w_n + G_n^T adjoint_{n+1})].

        And, with start parameters, E[(dX_0)^T adjoint_0 + own d(relative entropy)].
        """
        closed, drift = self.closed_loop(gain, bias)
        S, s = adjoint[0][1:], adjoint[1][1:]
        transposed = np.swapaxes(self.noise, 1, 2)
        # own w_n + G^T E[adjoint_{n+1} | X_n = x] = R x + e
        R = own * gain + transposed @ S @ closed
        e = own * bias + np.einsum("nmd,nd->nm", transposed, _apply(S, drift) + s)
        law = self.moments(gain, bias)
        result = self._project(gain_derivative, bias_derivative, (R, e), law)
        return result + self._start_part(adjoint[0][0], adjoint[1][0], own)

    def _project(
        self,
        gain_derivative: Array,
        bias_derivative: Array,
        label: tuple[Array, Array],
        law: tuple[Array, Array],
    ) -> Array:
        """Return sum_n E[(dw_n)^T (R_n X_n + e_n)], (P,).

        Parameters
        ----------
        gain_derivative, bias_derivative : as in ``gradient``.
        label : R (N, m, d) and e (N, m).
        law : means (N + 1, d) and covariances (N + 1, d, d) of the states.
        """
        n_params = len(gain_derivative)
        n, d, m = self.noise.shape
        dK = check_array("gain_derivative", gain_derivative, (n_params, n, m, d))
        dk = check_array("bias_derivative", bias_derivative, (n_params, n, m))
        (R, e), means = label, law[0][:-1]
        second = law[1][:-1] + means[:, :, None] * means[:, None, :]
        in_gain = R @ second + e[:, :, None] * means[:, None, :]
        in_bias = _apply(R, means) + e
        result: Array = np.einsum("pnmd,nmd->p", dK, in_gain)
        return result + np.einsum("pnm,nm->p", dk, in_bias)

    def _start_part(self, S: Array, s: Array, own: float) -> Array | float:
        """Return E[(dX_0/dtheta)^T (S X_0 + s)] + own d(relative entropy)/dtheta."""
        start = self.start_parameters
        if start is None:
            return 0.0
        in_mean, in_factor = S @ self.start_mean + s, S @ start.factor
        result: Array = start.mean_derivative @ in_mean
        result = result + np.einsum("pij,ij->p", start.factor_derivative, in_factor)
        return result + own * start.cost_gradient

    def start_gradient(
        self, gain: Array, bias: Array, *, reward_only: bool = False
    ) -> tuple[Array, Array]:
        """Return E lambda_0 (d,) and E lambda_0 (X_0 - m_0)^T (d, d), full adjoint.

        The gradients of ``objective`` with respect to m_0 and, times L^-T, to a
        factor L of S_0.
        """
        S, s = self.adjoint(gain, bias, reward_only=reward_only)
        return S[0] @ self.start_mean + s[0], S[0] @ self.start_covariance

    def costate_gradient(
        self,
        gain: Array,
        bias: Array,
        gain_derivative: Array,
        bias_derivative: Array,
        costate: tuple[Array, Array],
    ) -> Array:
        """Return sum_n E[(dw_n)^T (w_n + G_n^T phi_{n+1}(X_{n+1}))], (P,).

        Parameters
        ----------
        gain, bias, gain_derivative, bias_derivative : as in ``gradient``.
        costate : S (N + 1, d, d), s (N + 1, d) of phi_n(x) = S_n x + s_n.
        """
        return self._contract(gain, bias, gain_derivative, bias_derivative, costate)

    def control_distance(
        self, gain: Array, bias: Array, other_gain: Array, other_bias: Array
    ) -> float:
        """Return E sum_n |w_n - w'_n|^2 with paths under the first feedback.

        It is not twice the regret: J_N - min J_N is
        1/2 E sum (w - w*)^T (I + G^T P_{n+1} G) (w - w*), which differs by O(h).
        """
        gain, bias = self._check_feedback(gain, bias)
        means, covariances = self.moments(gain, bias)
        other_gain, other_bias = self._check_feedback(other_gain, other_bias)
        return _square(
            gain - other_gain, bias - other_bias, means[:-1], covariances[:-1]
        )


class PolicyChain(NamedTuple):
    """A chain with the feedback K_n x + k_n of a policy, and that of u*.

    gain (N, m, d), bias (N, m), their derivatives (P, ...) in theta (P,).
    at : the same for other parameters.
    """

    chain: AffineChain
    gain: Array
    bias: Array
    gain_derivative: Array
    bias_derivative: Array
    optimal_gain: Array
    optimal_bias: Array
    theta: Array
    at: Callable[[Array], PolicyChain]

    def objective(self, *, reward_only: bool = False) -> float:
        """Return J_N of this policy, or -E r(X_N)."""
        if reward_only:
            return self.chain.reward_only_objective(self.gain, self.bias)
        return self.chain.objective(self.gain, self.bias)

    def gradient(
        self, *, reward_only: bool = False, step_weights: Array | None = None
    ) -> Array:
        """Return the gradient (P,) of `AffineChain.gradient` for this policy."""
        return self.chain.gradient(
            self.gain,
            self.bias,
            self.gain_derivative,
            self.bias_derivative,
            reward_only=reward_only,
            step_weights=step_weights,
        )

    def cross_entropy_gradient(self) -> Array:
        """Return `AffineChain.cross_entropy_gradient` for this policy."""
        return self.chain.cross_entropy_gradient(
            self.gain, self.bias, self.gain_derivative, self.bias_derivative
        )

    def costate_gradient(self, costate: tuple[Array, Array]) -> Array:
        """Return `AffineChain.costate_gradient` for this policy."""
        return self.chain.costate_gradient(
            self.gain,
            self.bias,
            self.gain_derivative,
            self.bias_derivative,
            costate,
        )

    def distillation_gradient(self, *, detached: bool) -> Array:
        """Return the gradient (P,) of E sum_n 1/2 |w_n - w*_n|^2, w* the control u*.

        It is the control problem of the chain under u* without any costs but those of
        the control w - w*, and its lean adjoint vanishes.

        Parameters
        ----------
        detached : with the states held fixed, sum_n E[(dw_n)^T (w_n - w*_n)].
        """
        chain = self.chain
        freed = replace(
            chain,
            transition=chain.transition + chain.noise @ self.optimal_gain,
            offset=chain.offset
            + np.einsum("nij,nj->ni", chain.noise, self.optimal_bias),
            running=np.zeros_like(chain.running),
            reward_quadratic=np.zeros_like(chain.reward_quadratic),
            reward_linear=np.zeros_like(chain.reward_linear),
            reward_quartic=None,
        )
        gradient = freed.matching_gradient if detached else freed.gradient
        return gradient(
            self.gain - self.optimal_gain,
            self.bias - self.optimal_bias,
            self.gain_derivative,
            self.bias_derivative,
        )

    def sampled_feedback(self, sampling: str) -> tuple[Array, Array]:
        """Return K, k of the control of paths: "current", "optimal" (u*) or "base"."""
        if sampling == "current":
            return self.gain, self.bias
        used = float(sampling == "optimal")
        return used * self.optimal_gain, used * self.optimal_bias

    def log_variance_gradient(self, sampling: str) -> Array:
        """Return `path_quadratics.log_variance_gradient` for paths of a control.

        ``sampling`` : see `sampled_feedback`.
        """
        from .path_quadratics import log_variance_gradient

        return log_variance_gradient(self, *self.sampled_feedback(sampling))

    def moment_gradient(self, sampling: str, value: float) -> Array:
        """Return `path_quadratics.moment_gradient` for paths of a control."""
        from .path_quadratics import moment_gradient

        return moment_gradient(self, *self.sampled_feedback(sampling), value)

    def weight_variance_gradient(self, sampling: str) -> Array:
        """Return `path_quadratics.weight_variance_gradient` for paths of a control."""
        from .path_quadratics import weight_variance_gradient

        return weight_variance_gradient(self, *self.sampled_feedback(sampling))


def _apply(matrices: Array, vectors: Array) -> Array:
    result: Array = np.einsum("nij,nj->ni", matrices, vectors)
    return result


def _square(gain: Array, bias: Array, means: Array, covariances: Array) -> float:
    """Return sum_n E |K_n X_n + k_n|^2 for Gaussian X_n."""
    at_mean = _apply(gain, means) + bias
    return float(
        np.sum(at_mean**2) + np.einsum("nij,nik,njk->", gain, gain, covariances)
    )
