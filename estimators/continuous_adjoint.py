r"""Continuous adjoint: optimise, then discretise.

The costate of continuous time and the gradient that goes with it,

    da/dt = -[ (d(b + sigma u)/dx)^T a + grad(f + 1/2 |u|^2) ],   a_T = -grad r(X_T)
    dg/dt = -(du/dtheta)^T (u + sigma^T a),                       g_T = 0,  result g_0,

are one system of ordinary differential equations along a path.  It is solved backward
by explicit Euler on the stored path, as an ODE solver would: the right-hand side of a
step is evaluated where the step begins, at its right end X_{n+1}, with the
coefficients that the simulation froze for that step,

    v_n = w_n(X_{n+1}) + G_n^T a_{n+1}
    a_n = (d base mean_n/dx)^T a_{n+1} + (dw_n/dx)^T v_n + grad f_n   at X_{n+1}
    g = sum_n (dw_n/dtheta)(X_{n+1})^T v_n.

The discrete adjoint (`pathwise`) is the same at X_n; the difference is of order O(h) in
mean, so that the result is no gradient of any simulated objective, yet consistent with
the gradient of J.  On an affine chain its expectation is exact: with the closed loop
B_n x + d_n and E[a_n | X_n = x] = S_n x + s_n,

    S_N = Q,  s_N = -q,   S_n = (B_n^T S_{n+1} + K_n^T K_n + F_n) B_n
    s_n = B_n^T s_{n+1} + (B_n^T S_{n+1} + K_n^T K_n + F_n) d_n + K_n^T k_n

and E g = sum_n E[(dK_n x + dk_n)^T ((K_n + G_n^T S_{n+1}) x + k_n + G_n^T s_{n+1})] at
x = X_{n+1}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.estimator import Array, Estimator
from sdebench.estimators._expectations import (
    apply,
    second_moments,
    step_products,
)
from sdebench.simulate import primitives
from sdebench.simulate.tile import clear, combine, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View


@path_kernel
def block_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a stored block."""
    N = W.shape[0]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    for n in range(N - 1, -1, -1):
        primitives.evaluate(prepared, work, n, X[n + 1], V, B)
        primitives.noise_transpose(prepared, work, n, A, NEXT, B)
        combine(1.0, V, 1.0, NEXT, V, B)
        primitives.adjoint(prepared, work, n, X[n + 1], A, V, NEXT, OUT, B)
        primitives.running_cost_gradient(prepared, work, n, X[n + 1], NEXT, B)
        A, NEXT = NEXT, A


@dataclass(frozen=True, kw_only=True)
class ContinuousAdjoint(Estimator):
    """Adjoint of continuous time, discretized backward: optimise, then discretise."""

    estimand: ClassVar[str] = "gradient"
    source: ClassVar[str] = (
        "continuous adjoint of Domingo-Enrich et al. 2024, arXiv:2409.08861, section "
        "5; Li et al. 2020, arXiv:2001.01328"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
a_N &= -\nabla r(X_N), \quad v_n = w_n(X_{n+1}) + G_n^\top a_{n+1} \\
a_n &= \left( \frac{\partial \mu_n}{\partial x}(X_{n+1}) \right)^\top a_{n+1}
  + \left( \frac{\partial w_n}{\partial x}(X_{n+1}) \right)^\top v_n
  + \nabla f_n(X_{n+1}) \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta}(X_{n+1}) \right)^\top v_n
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "its own discretization of the continuous adjoint equations, exact on affine "
        "chains; that differs from the gradient of J_N and from that of J by O(h)"
    )
    needs: ClassVar[frozenset[str]] = frozenset(
        {
            "drift_vjp",
            "control_vjp",
            "control_parameter_vjp",
            "running_cost_gradient",
            "reward_gradient",
        }
    )
    block_kernel = staticmethod(block_kernel)

    def target(self, policy: PolicyChain) -> Array | None:
        chain = policy.chain
        closed, drift = chain.closed_loop(policy.gain, policy.bias)
        n_steps, m, d = policy.gain.shape
        slope, shift = np.empty((n_steps, m, d)), np.empty((n_steps, m))
        S, s = (part[-1] for part in chain.adjoint(policy.gain, policy.bias))
        for n in reversed(range(n_steps)):
            K, k, B = policy.gain[n], policy.bias[n], closed[n]
            slope[n] = K + chain.noise[n].T @ S
            shift[n] = k + chain.noise[n].T @ s
            right_end = B.T @ S + K.T @ K + chain.running[n]
            S, s = right_end @ B, B.T @ s + right_end @ drift[n] + K.T @ k
        means, covariances = (
            part[1:] for part in chain.moments(policy.gain, policy.bias)
        )
        cross = slope @ second_moments(means, covariances)
        cross += shift[:, :, None] * means[:, None, :]
        return step_products(policy, cross, apply(slope, means) + shift).sum(0)

    def statistics(self, view: View) -> Tensor:
        states = view.rollout().states
        adjoint = -view.reward_gradient(states[-1])
        gradient = adjoint.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = states[n + 1]
            v = view.control(n, x) + view.noise_transpose(n, adjoint)
            gradient = gradient + view.control_parameter_vjp(n, x, v)
            adjoint = (
                view.base_vjp(n, x, adjoint)
                + view.control_vjp(n, x, v)
                + view.running_cost_gradient(n, x)
            )
        return gradient
