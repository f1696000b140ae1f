r"""The linear-quadratic control problem with constant coefficients, in closed form.

    dX = (A X + a) dt + sigma (u dt + dW),      X_0 ~ N(m_0, S_0),   t in [0, T]
    minimise J(u) = E[ int (1/2 |u|^2 + 1/2 X^T F X) dt - r(X_T) ],
    r(x) = -1/2 x^T Q x + q^T x + c.

The value V(x, t) = 1/2 x^T P x + p^T x + rho solves, with Sigma = sigma sigma^T,

    -P'   = A^T P + P A - P Sigma P + F,               P(T) = Q,
    -p'   = (A - Sigma P)^T p + P a,                   p(T) = -q,
    -rho' = a^T p + 1/2 tr(Sigma P) - 1/2 p^T Sigma p,  rho(T) = -c,

and u* = -sigma^T (P x + p), h = exp(-V).  P, p, rho and the moments of the base and
of the optimally controlled process come from matrix exponentials of the Hamiltonian
(``hamiltonian.py``), without an ODE solver.  Any other linear feedback with smooth
time-dependent coefficients is evaluated by collocation (``collocation.py``).

A quartic term -1/4 sum_i c_i x_i^4 may be added to r; the answers for a given feedback
stay exact (``quartic.py``), and those that need V are refused.

Q and F may be indefinite; where the value function then becomes infinite the reward
cannot be tilted with, and ``ParameterError`` says when that happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from sdebench.errors import NumericalError, ParameterError

from .collocation import (
    Array,
    ClosedLoop,
    FeedbackEvaluation,
    MatrixFunction,
)
from .hamiltonian import (
    EscapeError,
    HamiltonianFlow,
    Step,
    Value,
    apply,
    log_expectation,
    symmetric,
)
from .quartic import check_quartic, require_quadratic
from .validation import check_array, check_covariance

_EPS = float(np.finfo(np.float64).eps)
# Panels grow with |A + sigma K| T: beyond this a feedback is a mistake or stiff.
_STIFFEST = 400.0


class PolicyObjective(NamedTuple):
    """The objective of a feedback, its gradient, and a bound on each one's error."""

    objective: float
    gradient: Array  # (P,)
    error_bound: float  # absolute, for the objective and every gradient component


class PolicyGradient(NamedTuple):
    """A vector over the parameters with a bound on the error of each component."""

    gradient: Array  # (P,)
    error_bound: float


class PolicyScalar(NamedTuple):
    """A number with a bound on its absolute error."""

    value: float
    error_bound: float


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearQuadratic:
    """The problem of the module docstring; every answer is exact to rounding.

    Parameters
    ----------
    drift_matrix : (d, d) A; need not be symmetric or stable.
    drift_offset : (d,) a.
    diffusion : (d, m) sigma; may be singular.
    running : (d, d) symmetric F, the running cost is 1/2 x^T F x.
    reward_quadratic : (d, d) symmetric Q.
    reward_linear : (d,) q.
    reward_constant : c.
    horizon : T > 0.
    start_mean : (d,) m_0.
    start_covariance : (d, d) S_0; zero for a fixed start.
    reward_quartic : (d,) c; default none.

    Raises
    ------
    ParameterError
        On wrong shapes or values, and from every method that needs a value function
        which does not exist.
    NotExactError
        From every method that needs a value function, with a quartic reward.
    """

    drift_matrix: Array
    drift_offset: Array
    diffusion: Array
    running: Array
    reward_quadratic: Array
    reward_linear: Array
    reward_constant: float
    horizon: float
    start_mean: Array
    start_covariance: Array
    reward_quartic: Array | None = None

    def __post_init__(self) -> None:
        d = len(np.atleast_1d(np.asarray(self.start_mean)))
        m = np.asarray(self.diffusion).shape[-1] if np.ndim(self.diffusion) else 0

        def store(name: str, shape: tuple[int, ...], symmetric: bool = False) -> None:
            array = check_array(name, getattr(self, name), shape, symmetric=symmetric)
            object.__setattr__(self, name, array)

        store("drift_matrix", (d, d))
        store("drift_offset", (d,))
        store("diffusion", (d, m))
        store("running", (d, d), symmetric=True)
        store("reward_quadratic", (d, d), symmetric=True)
        store("reward_linear", (d,))
        store("start_mean", (d,))
        start = check_covariance("start_covariance", self.start_covariance, d)
        object.__setattr__(self, "start_covariance", start)
        quartic = check_quartic(self.reward_quartic, d)
        object.__setattr__(self, "reward_quartic", quartic)
        object.__setattr__(self, "reward_constant", float(self.reward_constant))
        object.__setattr__(self, "horizon", float(self.horizon))
        if not (np.isfinite(self.horizon) and self.horizon > 0.0):
            raise ParameterError(f"horizon must be positive; {self.horizon} was given")
        if not np.isfinite(self.reward_constant):
            raise ParameterError("reward_constant must be finite")

    @property
    def dim(self) -> int:
        """Return d."""
        return len(self.start_mean)

    # ------------------------------------------------------------ value function

    @cached_property
    def _flow(self) -> HamiltonianFlow:
        noise = self.diffusion @ self.diffusion.T
        return HamiltonianFlow(
            self.drift_matrix, self.drift_offset, noise, self.running
        )

    @cached_property
    def _base_flow(self) -> HamiltonianFlow:
        noise, none = self.diffusion @ self.diffusion.T, np.zeros_like(self.running)
        return HamiltonianFlow(self.drift_matrix, self.drift_offset, noise, none)

    @cached_property
    def _values(self) -> dict[float, Value]:
        """Memory of ``riccati``: gain and bias of u* are asked for one by one."""
        return {}

    def _check_times(self, times: ArrayLike) -> Array:
        array = np.asarray(times, dtype=np.float64)
        # A grid's last point may exceed T by rounding.
        slack = 64.0 * _EPS * self.horizon
        if not np.all((array >= -slack) & (array <= self.horizon + slack)):
            raise ParameterError(
                f"times must lie in [0, {self.horizon}]; "
                f"[{np.min(array)}, {np.max(array)}] was given"
            )
        return np.clip(array, 0.0, self.horizon)

    def _plan(self, ascending: Array, flow: HamiltonianFlow) -> list[tuple[Step, int]]:
        """Return a step and a repeat count that lead to each time from the last.

        Widths are rounded to 2 ulp of T, so that a uniform grid needs two or three
        matrix exponentials; positions are carried along, so that the rounding does
        not add up.
        """
        quantum, position, plan = 2.0 * _EPS * self.horizon, 0.0, []
        for time in ascending:
            width = quantum * round((float(time) - position) / quantum)
            position += width
            plan.append(flow.steps(width))
        return plan

    def riccati_grid(self, times: ArrayLike) -> tuple[Array, Array, Array]:
        """Return P (n, d, d), p (n, d) and rho (n,) at ``times`` (n,), in any order.

        Raises
        ------
        ParameterError
            When the value function is infinite at or after one of the times.
        """
        require_quadratic(np.asarray(self.reward_quartic))
        array = self._check_times(times)
        remaining, where = np.unique(self.horizon - array.ravel(), return_inverse=True)
        value = Value(self.reward_quadratic, -self.reward_linear, -self.reward_constant)
        values, before = [], 0.0
        for time, (step, count) in zip(
            remaining, self._plan(remaining, self._flow), strict=True
        ):
            for i in range(count if time > before else 0):
                try:
                    value = apply(step, value)
                except EscapeError:
                    share = (time - before) / count
                    self._refuse(value, before + i * share, share)
            before = time
            values.append(value)
        shape = array.shape
        P, p, rho = (
            np.stack([np.asarray(v[i]) for v in values])[where] for i in range(3)
        )
        d = self.dim
        return P.reshape(*shape, d, d), p.reshape(*shape, d), rho.reshape(shape)

    def _refuse(self, value: Value, elapsed: float, width: float) -> None:
        """Raise the error for an escape within ``width`` before T - ``elapsed``."""
        error = EscapeError(np.nan)
        for _ in range(40):
            width *= 0.5
            step, count = self._flow.steps(width)
            try:
                for _ in range(count):
                    value = apply(step, value)
                elapsed += width
            except EscapeError as inner:
                error = inner
        lowest = float(np.linalg.eigvalsh(value.quadratic)[0])
        raise ParameterError(
            "the reward minus the running cost cannot be tilted with: the value "
            f"function is infinite for t <= {self.horizon - elapsed:.6g}, where the "
            f"smallest eigenvalue of P tends to minus infinity ({lowest:.3g} just "
            f"after, {error.eigenvalue:.3g} in I + G P); reduce the horizon or the "
            "positive curvature of the reward"
        )

    def riccati(self, time: float) -> Value:
        """Return P (d, d), p (d,) and rho of V = 1/2 x^T P x + p^T x + rho at ``time``.

        See ``riccati_grid`` for many times and for errors.
        """
        memory = self._values
        if time not in memory:
            if len(memory) >= 1024:
                memory.clear()
            P, p, rho = self.riccati_grid([time])
            memory[time] = Value(P[0], p[0], float(rho[0]))
        return memory[time]

    def value(self, x: Array, time: float) -> Array:
        """Return V(x, time) (...,) for x (..., d)."""
        P, p, rho = self.riccati(time)
        result: Array = 0.5 * np.einsum("...i,ij,...j->...", x, P, x) + x @ p + rho
        return result

    def log_h(self, x: Array, time: float) -> Array:
        """Return log E[exp(r(X_T) - int_time^T f) | X_time = x], (...,)."""
        return -self.value(x, time)

    def control(self, x: Array, time: float) -> Array:
        """Return u*(x, time) (..., m) for x (..., d)."""
        P, p, _ = self.riccati(time)
        result: Array = -(x @ P + p) @ self.diffusion
        return result

    def log_normalizer(self) -> float:
        """Return log Z = log E_{p_0} exp(-V(X_0, 0)).

        Raises
        ------
        ParameterError
            When Z is infinite, with the eigenvalue that shows it.
        """
        return log_expectation(
            self.riccati(0.0), self.start_mean, self.start_covariance
        )

    def optimal_cost(self) -> float:
        """Return J(u*) = E_{p_0} V(X_0, 0), at least -log Z."""
        P = self.riccati(0.0).quadratic
        spread = 0.5 * float(np.sum(P * self.start_covariance))
        return float(self.value(self.start_mean, 0.0)) + spread

    # ----------------------------------------------------------------- marginals

    def base_moments(self, times: ArrayLike) -> tuple[Array, Array]:
        """Return the mean (..., d) and covariance (..., d, d) of the base process."""
        return self._moments(times, self._base_flow, tilted=False)

    def tilted_moments(self, times: ArrayLike) -> tuple[Array, Array]:
        """Return mean (..., d) and covariance (..., d, d) of X_t under u*.

        The start law is p_0, which control does not change; unless X_0 is fixed or
        independent of X_T the law at T therefore is not p_T e^r / Z.
        """
        return self._moments(times, self._flow, tilted=True)

    def _moments(
        self, times: ArrayLike, flow: HamiltonianFlow, *, tilted: bool
    ) -> tuple[Array, Array]:
        array = self._check_times(times)
        ascending, where = np.unique(array.ravel(), return_inverse=True)
        plan = self._plan(ascending, flow)
        parts = [
            np.linspace(start, end, count + 1)[1:] if end > start else np.empty(0)
            for start, end, (_, count) in zip(
                np.append(0.0, ascending[:-1]), ascending, plan, strict=True
            )
        ]
        ends, d = np.concatenate(parts), self.dim
        if tilted and len(ends):
            P, p, _ = self.riccati_grid(ends)
        else:
            P, p = np.zeros((len(ends), d, d)), np.zeros((len(ends), d))
        mean, covariance = self.start_mean, self.start_covariance
        means, covariances, k = [], [], 0
        for (step, _), part in zip(plan, parts, strict=True):
            for _ in part:
                # N(E x + g, G) times exp(-V) is N(W (E x + g - G p), W G)
                W = np.linalg.inv(np.eye(d) + step.spread @ P[k])
                carry = W @ step.carry
                mean = W @ (step.carry @ mean + step.shift - step.spread @ p[k])
                covariance = symmetric(W @ step.spread + carry @ covariance @ carry.T)
                k += 1
            means.append(mean)
            covariances.append(covariance)
        shape = array.shape
        return (
            np.stack(means)[where].reshape(*shape, d),
            np.stack(covariances)[where].reshape(*shape, d, d),
        )

    # ------------------------------------------------------------- other feedback

    @cached_property
    def _loop(self) -> ClosedLoop:
        d = self.dim
        running, terminal = np.zeros((d + 1, d + 1)), np.empty((d + 1, d + 1))
        running[:d, :d] = self.running
        terminal[:d, :d] = self.reward_quadratic
        terminal[:d, d] = terminal[d, :d] = -self.reward_linear
        terminal[d, d] = -2.0 * self.reward_constant
        extended = np.append(self.start_mean, 1.0)
        start = np.outer(extended, extended)
        start[:d, :d] += self.start_covariance
        linear = np.column_stack((self.drift_matrix, self.drift_offset))
        quartic = np.asarray(self.reward_quartic)
        return ClosedLoop(linear, self.diffusion, running, terminal, start, quartic)

    def _refine(
        self,
        gain: MatrixFunction,
        bias: MatrixFunction,
        breaks: Sequence[float],
        answer: Callable[[FeedbackEvaluation], tuple[Array, Array]],
        cost_weight: float = 1.0,
    ) -> tuple[Array, float]:
        """Return ``answer`` on ever more panels, with a bound on its error.

        The bound is twice the change from the last but one resolution, which the
        finer one improves on by orders of magnitude where the feedback is smooth
        between the breaks, plus a running bound of the rounding error.
        """
        ends = np.unique([0.0, *self._check_times(list(breaks)), self.horizon])
        # sample inside: a feedback may jump at a break
        samples = (ends[:-1, None] + np.diff(ends)[:, None] * [0.01, 0.5, 0.99]).ravel()
        norm = max(
            float(
                np.linalg.norm(self.drift_matrix + self.diffusion @ gain(float(t)), 2)
            )
            for t in samples
        )
        if not norm * self.horizon <= _STIFFEST:
            raise NumericalError(
                "the exact objective needs a feedback of moderate size: "
                f"|A + sigma K| T = {norm * self.horizon:.3g}, at most "
                f"{_STIFFEST:g} is allowed; choose a theta closer to zero or to the "
                "optimum"
            )
        base = [max(1, int(np.ceil(0.5 * norm * w))) for w in np.diff(ends)]
        previous, value, bound = None, np.empty(0), np.inf
        for level in range(6):
            pieces = [
                np.linspace(start, end, n * 2**level + 1)[:-1]
                for start, end, n in zip(ends[:-1], ends[1:], base, strict=True)
            ]
            edges = np.append(np.concatenate(pieces), self.horizon)
            with np.errstate(over="ignore", invalid="ignore"):
                value, scale = answer(
                    FeedbackEvaluation(self._loop, gain, bias, edges, cost_weight)
                )
            rounding = 8.0 * _EPS * (self.dim + len(edges)) * float(np.max(scale))
            if previous is not None:
                change = float(np.max(np.abs(value - previous)))
                bound = 2.0 * change + rounding
                if change <= rounding:
                    break
            previous = value
        if not np.all(np.isfinite(value)):
            raise NumericalError(
                "the exact objective overflows under this feedback; choose a theta "
                "closer to zero or to the optimum"
            )
        return value, bound

    @staticmethod
    def _derivative(
        evaluation: FeedbackEvaluation,
        gain_derivative: MatrixFunction,
        bias_derivative: MatrixFunction,
    ) -> Array:
        return evaluation.at_nodes(
            lambda t: np.concatenate(
                (gain_derivative(t), np.asarray(bias_derivative(t))[..., None]), axis=-1
            )
        )

    def policy_objective(
        self,
        gain: MatrixFunction,
        bias: MatrixFunction,
        gain_derivative: MatrixFunction,
        bias_derivative: MatrixFunction,
        *,
        reward_only: bool = False,
        breaks: Sequence[float] = (),
    ) -> PolicyObjective:
        """Return J(theta) of u = K(t) x + k(t), its gradient and an error bound.

        Parameters
        ----------
        gain, bias : t -> K (m, d), k (m,).
        gain_derivative, bias_derivative : t -> dK/dtheta (P, m, d), dk/dtheta (P, m).
        reward_only : of -E r(X_T) instead, without control and running cost.
        breaks : times at which the feedback is not smooth.

        Returns
        -------
        objective, gradient (P,) and a bound on the absolute error of all of them.
        """

        def answer(evaluation: FeedbackEvaluation) -> tuple[Array, Array]:
            derivative = self._derivative(evaluation, gain_derivative, bias_derivative)
            gradient, size = evaluation.contract(evaluation.full_adjoint(), derivative)
            return (
                np.append(evaluation.objective(), gradient),
                np.append(evaluation.objective_scale(), size),
            )

        cost_weight = 0.0 if reward_only else 1.0
        values, bound = self._refine(gain, bias, breaks, answer, cost_weight)
        return PolicyObjective(float(values[0]), values[1:], bound)

    def matching_gradient(
        self,
        gain: MatrixFunction,
        bias: MatrixFunction,
        gain_derivative: MatrixFunction,
        bias_derivative: MatrixFunction,
        *,
        breaks: Sequence[float] = (),
    ) -> PolicyGradient:
        """Return the expected gradient of the adjoint-matching loss, and its bound.

        The loss is 1/2 E int |u_theta(X_t) + sigma^T a_t|^2 dt with the lean adjoint
        a' = -A^T a - F x, a_T = Q X_T - q; X and a are detached.  It vanishes at u*
        and is not the gradient of J elsewhere (Domingo-Enrich et al. 2024).  The
        arguments are those of ``policy_objective``.
        """

        def answer(evaluation: FeedbackEvaluation) -> tuple[Array, Array]:
            derivative = self._derivative(evaluation, gain_derivative, bias_derivative)
            return evaluation.contract(evaluation.lean_adjoint(), derivative)

        return PolicyGradient(*self._refine(gain, bias, breaks, answer))

    def cross_entropy_gradient(
        self,
        gain: MatrixFunction,
        bias: MatrixFunction,
        gain_derivative: MatrixFunction,
        bias_derivative: MatrixFunction,
        *,
        breaks: Sequence[float] = (),
    ) -> PolicyGradient:
        """Return the gradient of KL(P* || law of the feedback), and its bound.

        E* int (du)^T (u - u*) dt, where P* is the base law times exp(r - int f) / Z:
        paths under u* from the tilted start.  The law of X_0 under the feedback is
        kept.  The arguments are those of ``policy_objective``.
        """
        self.log_normalizer()  # says so where it is infinite
        mean, covariance = self.tilted_start()
        tilted = replace(self, start_mean=mean, start_covariance=covariance)

        def best_gain(t: float) -> Array:
            return -self.diffusion.T @ self.riccati(t).quadratic

        def best_bias(t: float) -> Array:
            return -self.diffusion.T @ self.riccati(t).linear

        def answer(evaluation: FeedbackEvaluation) -> tuple[Array, Array]:
            derivative = self._derivative(evaluation, gain_derivative, bias_derivative)
            own = evaluation.at_nodes(lambda t: np.column_stack((gain(t), bias(t))))
            gap, size = (
                own - evaluation.control,
                np.abs(own) + np.abs(evaluation.control),
            )
            value, scale = (
                np.einsum("ns,nspua,nsub,nsba->p", evaluation.weights, *parts)
                for parts in (
                    (derivative, gap, evaluation.moments),
                    (np.abs(derivative), size, np.abs(evaluation.moments)),
                )
            )
            return value, scale

        return PolicyGradient(*tilted._refine(best_gain, best_bias, breaks, answer))

    def start_gradient(
        self,
        gain: MatrixFunction,
        bias: MatrixFunction,
        *,
        lean: bool = False,
        reward_only: bool = False,
        breaks: Sequence[float] = (),
    ) -> tuple[Array, Array, float]:
        """Return the gradient of J of a feedback in the law of X_0, and a bound.

        E lambda_0 (d,) and E lambda_0 (X_0 - m_0)^T (d, d) with the full adjoint: the
        gradients with respect to m_0 and, times L^-T, to a factor L of S_0.  With
        ``lean`` the same of the lean adjoint.  The other arguments are those of
        ``policy_objective``.
        """
        d = self.dim
        start = np.append(self.start_mean, 1.0)

        def answer(evaluation: FeedbackEvaluation) -> tuple[Array, Array]:
            if lean:
                evaluation.lean_adjoint()
            else:
                evaluation.full_adjoint()
            S = evaluation.start_adjoint[:d]
            values = np.append(S @ start, (S[:, :d] @ self.start_covariance).ravel())
            size = np.abs(S) @ (np.abs(start) + np.sqrt(np.max(self._loop.start)))
            return values, size

        cost_weight = 0.0 if reward_only else 1.0
        values, bound = self._refine(gain, bias, breaks, answer, cost_weight)
        return values[:d], values[d:].reshape(d, d), bound

    def tilted_start(self) -> tuple[Array, Array]:
        """Return mean (d,) and covariance (d, d) of the start law p_0 e^{-V} / Z.

        From it, the cost J(u*) plus the relative entropy to p_0 is -log Z: without
        initial-value bias.
        """
        P, p, _ = self.riccati(0.0)
        shrink = np.linalg.inv(np.eye(self.dim) + self.start_covariance @ P)
        mean = shrink @ (self.start_mean - self.start_covariance @ p)
        return mean, symmetric(shrink @ self.start_covariance)

    def frozen_costate(
        self, gain: ArrayLike, bias: ArrayLike, times: ArrayLike
    ) -> tuple[Array, Array]:
        """Return S (..., d, d), s (..., d) with E[lean adjoint_t | X_t = x] = S x + s.

        Under the constant feedback u = K x + k, differentiated at frozen control:
        -S' = A^T S + S (A + sigma K) + F, S(T) = Q, by a matrix exponential.

        Parameters
        ----------
        gain, bias : K (m, d) and k (m,).
        times : (...) in [0, T].
        """
        require_quadratic(np.asarray(self.reward_quartic))
        d, m = self.diffusion.shape
        control = np.column_stack(
            (check_array("gain", gain, (m, d)), check_array("bias", bias, (m,)))
        )
        # Sylvester's equation of (S, s): S(T - r) = (E11 S(T) + E12) E22^-1
        system = np.zeros((2 * d + 1, 2 * d + 1))
        system[:d, :d] = self.drift_matrix.T
        system[:d, d : 2 * d] = self.running
        linear = np.column_stack((self.drift_matrix, self.drift_offset))
        system[d : 2 * d, d:] = -(linear + self.diffusion @ control)
        terminal = np.column_stack((self.reward_quadratic, -self.reward_linear))
        remaining = self.horizon - self._check_times(times)
        flow = scipy.linalg.expm(remaining[..., None, None] * system)
        costate = flow[..., :d, :d] @ terminal + flow[..., :d, d:]
        costate = costate @ np.linalg.inv(flow[..., d:, d:])
        return costate[..., :d], costate[..., d]

    def control_error(
        self,
        gain: MatrixFunction,
        bias: MatrixFunction,
        *,
        breaks: Sequence[float] = (),
    ) -> PolicyScalar:
        """Return E_theta int |u_theta - u*|^2 dt under the feedback, and its bound.

        Half of it is J(theta) - J(u*).
        """

        def answer(evaluation: FeedbackEvaluation) -> tuple[Array, Array]:
            P, p, _ = self.riccati_grid(evaluation.times)
            optimal = -self.diffusion.T @ np.concatenate((P, p[..., None]), axis=-1)
            gap = evaluation.control - optimal
            size = np.abs(evaluation.control) + np.abs(optimal)
            terms = [
                np.einsum("ns,nsua,nsub,nsab->", evaluation.weights, g, g, m)
                for g, m in (
                    (gap, evaluation.moments),
                    (size, np.abs(evaluation.moments)),
                )
            ]
            return np.array(terms[:1]), np.array(terms[1:])

        value, bound = self._refine(gain, bias, breaks, answer)
        return PolicyScalar(float(value[0]), bound)
