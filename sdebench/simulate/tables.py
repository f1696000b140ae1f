"""Coefficient tables: all that a simulation backend needs to know of a problem.

A problem fills one of the tables on a time grid of ``n_steps`` steps; the numba
kernels and the torch functions evaluate the same table.  One step of any of them
is written with the control in **noise units**, w, the shift of the standard normal z:

    X_{n+1} = base mean(X_n) + G_n(X_n) (w_n(X_n) + z_n),      z_n ~ N(0, I)

where G_n depends on the state in some `SeparableTables` only, see ``variance``, so
that, whatever the scheme, the path's control cost is sum 1/2 |w_n|^2 (the
relative entropy of the transition), its likelihood ratio against the base chain is
exp(sum w_n . z_n + 1/2 |w_n|^2), and the score of the policy is
sum (dw_n/dtheta)^T z_n.  For Euler-Maruyama w = sqrt(h) u.

A step whose ``noisy`` is 0 has no noise, z_n = 0, while the control still acts:
mixed ODE-SDE sampling.  An empty ``noisy`` stands for noise in every step.
``denoiser`` holds (p, q, s, alpha, beta): the denoised prediction E[X_N | X_n = x]
under the current control is p x + q base mean(x) + s w_n(x), with G_n = (s / q) I, and
its noising is X_n = alpha X_N + beta z.  Empty where the process has no such closed
form.

All arrays are C-contiguous and float64; backends cast them.  N = n_steps, d = dim,
P = n_params.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]

TINY = 1e-30
"""Added to |x|^2 where its powers are singular at the origin."""


class LinearTables(NamedTuple):
    """Linear base, linear feedback, quadratic costs (class L).

    base mean(x) = M_n x + c_n;   w_n(x) = K_n x + k_n;
    running cost of step n: 1/2 x^T F_n x (the step length is inside F_n);
    reward r(x) = -1/2 x^T Q x + q^T x + r0 - 1/4 sum_i c_i x_i^4;
    X_0 = m + L z.

    The control is linear in theta and factorised over S spatial maps:
    dw_n/dtheta_p (x) = sum_s basis[p, s, n] (E_{s,n} x + e_{s,n}).

    Where theta moves the law of X_0 as well, X_0 = m_0 + L_0 (mu + (I + T) z) with mu
    and T among the parameters, ``start_mean_derivative`` and
    ``start_factor_derivative`` are those of m and L; the relative entropy of the law
    to N(m_0, L_0 L_0^T) is part of the objective.  Empty where it does not.
    """

    transition: Array  # (N, d, d)  M_n
    offset: Array  # (N, d)     c_n
    noise: Array  # (N, d, d)  G_n
    gain: Array  # (N, d, d)  K_n
    bias: Array  # (N, d)     k_n
    feature_gain: Array  # (S, N, d, d) E_{s,n}
    feature_bias: Array  # (S, N, d)    e_{s,n}
    basis: Array  # (P, S, N)
    running: Array  # (N, d, d) F_n, symmetric
    reward_quadratic: Array  # (d, d) Q, symmetric
    reward_linear: Array  # (d,)   q
    reward_constant: Array  # (1,)   r0
    start_mean: Array  # (d,)   m
    start_factor: Array  # (d, d) L; zero for a fixed start
    noisy: Array = np.zeros(0)  # (N,) or empty
    denoiser: Array = np.zeros((0, 5))  # (N, 5) or empty
    reward_quartic: Array = np.zeros(0)  # (d,) c, or empty for none
    start_mean_derivative: Array = np.zeros((0, 0))  # (P, d) dm/dtheta, or empty
    start_factor_derivative: Array = np.zeros((0, 0, 0))  # (P, d, d) dL/dtheta
    start_cost_gradient: Array = np.zeros(0)  # (P,) of the relative entropy, or empty
    start_cost: Array = np.zeros(1)  # (1,) the relative entropy


class MixtureTables(NamedTuple):
    """Linear plus mixture-score base, tilted-mixture control (classes G and F).

    Every function is the gradient or value of log-sum-exp of K diagonal quadratics
    l_k(x) = sum_j lin_kj x_j + quad_kj x_j^2 + const_k, stored as one row
    ``[lin (d), quad (d), const]``; s_i = grad log sum_k exp l_ik.

    base mean(x) = a_n * x + c_n + b_n s_0(x);   w_n(x) = e_n (s_1(x) - s_0(x));
    G_n = g_n I;   no running cost;   reward r(x) = log sum_k exp l_k(x), minus the
    same of ``reward_below`` where it has rows: the log-probability of a classifier.
    s_0 = 0 when the base is Gaussian (K0 = 0: the score is inside a_n, c_n).
    ``tilted_derivative[p]`` is the derivative of ``tilted`` with respect to theta_p.
    X_0 ~ sum_k weight_k N(start_mean_k, diag(start_scale_k^2)).
    ``density`` are the rows of the marginal densities p_t of the base process, at all
    times of the grid; log p_t = log sum_k exp l_k, constants included.  They are those
    of X_0 ~ p_{t_0}, see `starts_from_density`.  Empty where there are none.
    The tilted law p_T e^r / Z is sum_k weight_k N(end_mean_k, diag(end_scale_k^2)).
    """

    scale: Array  # (N, d)  a_n
    offset: Array  # (N, d)  c_n
    base_gain: Array  # (N,)    b_n
    noise: Array  # (N,)    g_n
    control_gain: Array  # (N,)    e_n
    base: Array  # (N, K0, 2d + 1)
    tilted: Array  # (N, K1, 2d + 1)
    tilted_derivative: Array  # (P, N, K1, 2d + 1)
    reward: Array  # (Kr, 2d + 1)
    start_cumulative: Array  # (Ks,)   cumulative weights, last entry 1
    start_mean: Array  # (Ks, d)
    start_scale: Array  # (Ks, d)
    noisy: Array = np.zeros(0)  # (N,) or empty
    denoiser: Array = np.zeros((0, 5))  # (N, 5) or empty
    density: Array = np.zeros((0, 0, 0))  # (N + 1, Kp, 2d + 1) or empty
    end_cumulative: Array = np.zeros(0)  # (Ke,) like start_cumulative, or empty
    end_mean: Array = np.zeros((0, 0))  # (Ke, d)
    end_scale: Array = np.zeros((0, 0))  # (Ke, d)
    reward_below: Array = np.zeros((0, 0))  # (Kb, 2d + 1), or empty


class SineTables(NamedTuple):
    """Linear functions plus sines of linear functions (class N).

    With the extended state y(x) = (x, sin(A x + b)), K sines, D = d + K:

    base mean(x) = M_n y + c_n;   w_n(x) = K_n y + k_n;
    running cost of step n: 1/2 x^T F_n x + f_n^T y + f0_n (the step length is inside);
    reward r(x) = -1/2 x^T Q x + q^T y + r0;   X_0 = m_0 + L_0 z.

    The control is linear in theta: dw_n/dtheta_p (x) = E_{p,n} y + e_{p,n}.
    """

    direction: Array  # (K, d)  A
    phase: Array  # (K,)    b
    transition: Array  # (N, d, D) M_n
    offset: Array  # (N, d)     c_n
    noise: Array  # (N, d, d)  G_n
    gain: Array  # (N, d, D)  K_n
    bias: Array  # (N, d)     k_n
    gain_derivative: Array  # (P, N, d, D) E_{p,n}
    bias_derivative: Array  # (P, N, d)    e_{p,n}
    running_quadratic: Array  # (N, d, d) F_n, symmetric
    running_linear: Array  # (N, D) f_n
    running_constant: Array  # (N,)   f0_n
    reward_quadratic: Array  # (d, d) Q, symmetric
    reward_linear: Array  # (D,)   q
    reward_constant: Array  # (1,)   r0
    start_mean: Array  # (d,)   m_0
    start_factor: Array  # (d, d) L_0; zero for a fixed start
    noisy: Array = np.zeros(0)  # (N,) or empty
    denoiser: Array = np.zeros((0, 5))  # (N, 5) or empty


class SeparableTables(NamedTuple):
    """Polynomials of every coordinate, and functions of |x|^2 (classes N, M and P).

    With y_i = min(max(x_i, -reach), reach) and s = |x|^2,

    base mean_i(x) = sum_j M_nij y_i^j + m_ni (x_i - y_i);
    w_ni(x) = sum_j K_nij y_i^j;   G_n = diag(g_n);
    running cost of step n: sum_ij F_nij y_i^j + the wave's;
    reward r(x) = sum_ij q_ij y_i^j + e sum_i log(sum_j p_ij y_i^j)
                  - c log(1 + s) + a sin(s^b) - 1/2 f e^{-x_0} (s - x_0^2);
    X_0 = m_0 + L_0 z.

    Beyond the reach the force of a polynomial potential is constant: with a cubic
    force the moments of the Euler-Maruyama chain would tend to infinity (Hutzenthaler,
    Jentzen and Kloeden 2011).

    The wave is what a value function sin((tau + s)^b) needs of the Hamilton-Jacobi-
    Bellman equation: with q = tau_n + s and psi(q) = sin(q^b), a step costs
    c_n1 psi' + s (c_n2 psi'' + c_n3 psi'^2); a row of ``wave`` is (tau, c1, c2, c3).

    The control is linear in theta: dw_ni/dtheta_p (x) = sum_j E_pnij y_i^j.

    Pearson diffusions have rows (v_0, v_1, v_2) of ``variance``: with the factor
    s_i(x) = max(v_i0 + v_i1 x_i + v_i2 x_i^2, 0)^(1/2),

    G_n(x) = diag(g_ni s_i(x)),   w_ni(x) = s_i(x)^k sum_j K_nij y_i^j

    with k = ``control_power``, 0 or 1, and the same factor in dw/dtheta.  Where the
    variance would be negative a step has no noise, and s_i the derivative 0; the drift
    stays as it is (partial truncation: Lord, Koekkoek and van Dijk 2010).
    """

    reach: Array  # (1,)
    base: Array  # (N, d, J)  M_n
    beyond: Array  # (N, d)     m_n
    noise: Array  # (N, d)     g_n
    gain: Array  # (N, d, J)  K_n
    gain_derivative: Array  # (P, N, d, J) E_{p,n}
    running: Array  # (N, d, J) F_n, the step length inside; (N, 0, 0) for none
    start_mean: Array  # (d,)   m_0
    start_factor: Array  # (d, d) L_0; zero for a fixed start
    reward: Array = np.zeros((0, 0))  # (d, J)     q; (0, 0) for none
    reward_factor: Array = np.zeros((0, 0))  # (d, J) p, each positive; or (0, 0)
    reward_power: Array = np.ones(1)  # (1,)   e
    reward_log: Array = np.zeros(1)  # (1,)   c
    reward_wave: Array = np.zeros(1)  # (1,)   a
    wave_power: Array = np.zeros(1)  # (1,)   b
    wave: Array = np.zeros((0, 4))  # (N, 4), or (0, 4) for none
    variance: Array = np.zeros((0, 3))  # (d, 3) v; (0, 3) for s = 1
    control_power: Array = np.zeros(1)  # (1,)   k
    reward_funnel: Array = np.zeros(1)  # (1,)   f
    noisy: Array = np.zeros(0)  # (N,) or empty
    denoiser: Array = np.zeros((0, 5))  # (N, 5) or empty

    @property
    def offset(self) -> Array:
        """The constants of the base mean, (N, d)."""
        return np.ascontiguousarray(self.base[:, :, 0])


ONLY_TORCH = (
    "the problem is made of torch functions, which the numba kernels cannot call; use "
    "backend torch"
)


class StepFunctions(Protocol):
    """What `FunctionTables` simulate, functions of torch tensors x (n, d) and a time.

    They must be differentiable where an estimator asks for derivatives.
    """

    def drift_function(self, x: Tensor, t: float) -> Tensor:
        """Return the base drift (n, d)."""

    def control_features(self, x: Tensor, t: float) -> Tensor:
        """Return the derivatives of the control u in theta, (P, n, d)."""

    def running_cost_function(self, x: Tensor, t: float) -> Tensor:
        """Return the running cost f (n,)."""

    def reward_function(self, x: Tensor) -> Tensor:
        """Return the reward (n,)."""


class FunctionTables(NamedTuple):
    """Functions instead of coefficients, for torch alone (class M).

    base mean(x) = x + h_n b(x, t_n);   w_n(x) = sqrt(h_n) sum_p theta_p psi_p(x, t_n);
    running cost of step n: h_n f(x, t_n);   X_0 = m_0 + L_0 z.
    """

    functions: StepFunctions
    theta: Array  # (P,)
    times: Array  # (N + 1,)
    noise: Array  # (N, d, d)  G_n
    start_mean: Array  # (d,)   m_0
    start_factor: Array  # (d, d) L_0; zero for a fixed start
    noisy: Array = np.zeros(0)  # (N,) or empty
    denoiser: Array = np.zeros((0, 5))  # (N, 5) or empty

    @property
    def offset(self) -> Array:
        """An array of one row per step, (N, d), as the other tables have it."""
        return np.zeros(self.noise.shape[:2])


Tables = LinearTables | MixtureTables | SineTables | SeparableTables | FunctionTables


def noise_mask(tables: Tables) -> Array:
    """Return 1 for the steps with noise and 0 for the others, (N,)."""
    n_steps = len(tables.offset)
    return tables.noisy if len(tables.noisy) else np.ones(n_steps)


def noise_depends_on_state(tables: Tables) -> bool:
    """Return whether G_n is a function of X_n."""
    return isinstance(tables, SeparableTables) and len(tables.variance) > 0


def noise_is_invertible(tables: Tables) -> bool:
    """Return whether the noise of every step reaches every direction."""
    noise = tables.noise
    if noise_depends_on_state(tables):  # it vanishes somewhere
        return False
    if isinstance(tables, LinearTables | SineTables | FunctionTables):
        return bool(np.all(np.linalg.matrix_rank(noise) == noise.shape[-1]))
    return bool(np.all(noise != 0.0))


def has_density(tables: Tables) -> bool:
    """Return whether the tables hold the densities of the base process."""
    return isinstance(tables, MixtureTables) and len(tables.density) > 0


def starts_from_density(tables: Tables) -> bool:
    """Return whether X_0 has the density of the first time, component by component."""
    if not has_density(tables):
        return False
    assert isinstance(tables, MixtureTables)
    weight = np.diff(tables.start_cumulative, prepend=0.0)
    mean, variance = tables.start_mean, tables.start_scale**2
    square = np.sum(np.log(2.0 * np.pi * variance) + mean**2 / variance, axis=1)
    constant = np.log(weight) - 0.5 * square
    rows = np.hstack([mean / variance, -0.5 / variance, constant[:, None]])
    density = tables.density[0]
    return rows.shape == density.shape and np.allclose(rows, density, 1e-9, 1e-9)


def has_start_parameters(tables: Tables) -> bool:
    """Return whether theta moves the law of X_0."""
    return isinstance(tables, LinearTables) and len(tables.start_cost_gradient) > 0


def reference_start(
    mean: Array, mean_derivative: Array, cost_gradient: Array
) -> tuple[Array, Array]:
    """Return m_0 and L_0 L_0^T of the law that the relative entropy refers to.

    The derivatives of the mean in mu are the columns of L_0, and those of the
    relative entropy are mu.
    """
    covariance = mean_derivative.T @ mean_derivative
    return mean - cost_gradient @ mean_derivative, covariance


class StartLaw(NamedTuple):
    """What the products with derivatives of X_0 and its density need.

    With z = inverse (x - m) and the moves (1, z) -> derivative[p] (1, z) of X_0,
    the score of the density is z . whitened[p] (1, z) - trace[p], and the gradient of
    its log-ratio to the reference law is ratio x + ratio_shift.
    """

    inverse: Array  # (d, d) L^-1
    derivative: Array  # (P, d, d + 1) of m, then of L
    whitened: Array  # (P, d, d + 1) L^-1 derivative
    trace: Array  # (P,) of L^-1 dL/dtheta_p
    ratio: Array  # (d, d)
    ratio_shift: Array  # (d,)


def start_law(tables: LinearTables) -> StartLaw:
    """Return the `StartLaw` of tables, empty without start parameters."""
    if not has_start_parameters(tables):
        matrix, vector, stack = np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0, 1))
        return StartLaw(matrix, stack, stack, vector, matrix, vector)
    mean, moved = tables.start_mean, tables.start_mean_derivative
    inverse = np.linalg.inv(tables.start_factor)
    derivative = np.concatenate(
        [moved[:, :, None], tables.start_factor_derivative], axis=2
    )
    whitened = inverse @ derivative
    trace = np.trace(whitened[:, :, 1:], axis1=1, axis2=2)
    start, covariance = reference_start(mean, moved, tables.start_cost_gradient)
    precision, own = np.linalg.inv(covariance), inverse.T @ inverse
    return StartLaw(
        inverse,
        derivative,
        whitened,
        trace,
        precision - own,
        own @ mean - precision @ start,
    )


def start_log_ratio(tables: Tables, states: Array) -> Array:
    """Return the log-ratio (n,) of the density of X_0 (d, n) to the reference one."""
    assert isinstance(tables, LinearTables)
    law = start_law(tables)
    constant = -np.linalg.slogdet(tables.start_factor)[1]
    moved = tables.start_mean_derivative
    mean, covariance = reference_start(
        tables.start_mean, moved, tables.start_cost_gradient
    )
    constant += 0.5 * np.linalg.slogdet(covariance)[1]
    z = law.inverse @ (states - tables.start_mean[:, None])
    gap = states - mean[:, None]
    square = np.sum(gap * np.linalg.solve(covariance, gap), axis=0)
    return constant + 0.5 * (square - np.sum(z * z, axis=0))


def start_states(tables: Tables, normals: Array, uniforms: Array) -> Array:
    """Return X_0 (d, n) from normals (d, n) and uniforms (n,) in (0, 1)."""
    if not isinstance(tables, MixtureTables):
        return tables.start_mean[:, None] + tables.start_factor @ normals
    index = np.searchsorted(tables.start_cumulative, uniforms, side="right")
    index = np.minimum(index, len(tables.start_cumulative) - 1)
    return tables.start_mean[index].T + tables.start_scale[index].T * normals
