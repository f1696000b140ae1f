r"""AdjointDPM: reward gradient through the probability-flow ODE.

No step has noise; only the start is random.  The flow is solved forward by explicit
Euler,

    X_{n+1} = F_n(X_n),   F_n(x) = base mean_n(x) + G_n w_n(x),

and the sensitivity of -r(X_N) backward along it,

    a_N = -grad r(X_N),   g = sum_n (dw_n/dtheta)^T G_n^T a_{n+1}
    a_n = (dF_n/dx)^T a_{n+1}.

"stored" takes the Jacobians at the stored states X_n: the exact derivative of the
N-step flow.  "reconstructed" is the adjoint method, of constant memory: it stores X_N
alone and solves state, sensitivity and gradient backward as one system by explicit
Euler, all right-hand sides evaluated where the step begins,

    y_N = X_N,   y_n = 2 y_{n+1} - F_n(y_{n+1}),   Jacobians of step n at y_{n+1},

which is wrong by O(h) through the states' reversal error and the Euler steps of a.

On an affine chain every y_n and a_n is affine in X_N, and the expectation is exact.

The flow of velocity v + sigma u_theta / 2 has the terminal law p_theta of the SDE if
X_0 has the law p_theta,0.  Simulations start from the base's p_0 instead: the gradient
of the flow differs from that of the SDE by the memory of the start, of order alpha_0,
which is no discretization error.

References
----------
J. Pan, J. H. Liew, V. Y. F. Tan, J. Feng, H. Yan, "AdjointDPM: Adjoint sensitivity
method for gradient backpropagation of diffusion probabilistic models", ICLR 2024,
arXiv:2307.10711; it solves the flow in x / alpha over the noise-to-signal ratio
beta / alpha, which is another time grid of the same flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import unknown
from sdebench.estimator import Array, Estimator
from sdebench.estimators._expectations import (
    second_moments,
    step_products,
)
from sdebench.simulate import primitives
from sdebench.simulate.jit import kernel
from sdebench.simulate.tile import clear, combine

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View

STATES = ("reconstructed", "stored")


@kernel  # no `path_kernel`: it allocates
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    stored: bool,
    OUT: Any,
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a stored block."""
    N = W.shape[0]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    Y, STEPPED = np.empty_like(A), np.empty_like(A)
    unused = np.empty_like(totals)
    combine(1.0, X[N], 0.0, X[N], Y, B)
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, Y, A, B)
    combine(-1.0, A, 0.0, A, A, B)
    for n in range(N - 1, -1, -1):
        if stored:
            combine(1.0, X[n], 0.0, X[n], Y, B)
        primitives.evaluate(prepared, work, n, Y, V, B)
        if not stored:
            primitives.step(prepared, work, n, Y, V, Z[n], STEPPED, unused, B)
        primitives.noise_transpose(prepared, work, n, A, V, B)
        primitives.adjoint(prepared, work, n, Y, A, V, NEXT, OUT, B)
        if not stored:
            combine(2.0, Y, -1.0, STEPPED, Y, B)
        A, NEXT = NEXT, A


@dataclass(frozen=True, kw_only=True)
class AdjointDPM(Estimator):
    """Reward gradient by the adjoint method through the probability-flow ODE.

    Parameters
    ----------
    states : "reconstructed" backward from X_N (constant memory), or "stored".
    """

    estimand: ClassVar[str] = "reward_only_gradient"
    source: ClassVar[str] = "Pan et al. 2023, arXiv:2307.10711, section 3"
    formula: ClassVar[str] = r"""\begin{aligned}
F_n(x) &= \mu_n(x) + G_n w_n(x), \quad y_N = X_N, \quad
  y_n = 2 y_{n+1} - F_n(y_{n+1}) \\
a_N &= -\nabla r(X_N), \quad
  a_n = \left( \frac{\partial F_n}{\partial x}(y_{n+1}) \right)^\top a_{n+1} \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta}(y_{n+1}) \right)^\top
  G_n^\top a_{n+1}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "with stored states the gradient of -E r(X_N) of the N-step probability flow "
        "from the base's start; with reconstructed ones its own O(h) approximation of "
        "it, exact on affine chains"
    )
    needs: ClassVar[frozenset[str]] = frozenset(
        {"drift_vjp", "control_vjp", "control_parameter_vjp", "reward_gradient"}
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"states": "stored"})
    block_kernel = staticmethod(block_kernel)

    states: str = "reconstructed"

    def __post_init__(self) -> None:
        if self.states not in STATES:
            raise unknown("states", self.states, STATES)

    def noisy_steps(self, n_steps: int) -> Array | None:
        return np.zeros(n_steps)

    @property
    def _stored(self) -> bool:
        return self.states == "stored"

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (self._stored,)

    def target(self, policy: PolicyChain) -> Array | None:
        if self._stored:
            return policy.gradient(reward_only=True)
        chain = policy.chain
        closed, drift = chain.closed_loop(policy.gain, policy.bias)
        moments = chain.moments(policy.gain, policy.bias)
        means, covariances = (part[-1] for part in moments)
        second = second_moments(means, covariances)
        eye = np.eye(chain.dim)
        # y_n = U X_N + u and a_n = S X_N + s
        U, u = eye, np.zeros(chain.dim)
        S, s = (part[-1] for part in chain.adjoint(policy.gain, policy.bias))
        cross, mean = np.empty_like(policy.gain), np.empty_like(policy.bias)
        for n in reversed(range(chain.n_steps)):
            B, G = closed[n], chain.noise[n]
            state, adjoint = U @ means + u, S @ means + s
            product = S @ second @ U.T + np.outer(adjoint, u)
            product += np.outer(s, state - u)
            cross[n], mean[n] = G.T @ product, G.T @ adjoint
            U, u = (2.0 * eye - B) @ U, (2.0 * eye - B) @ u - drift[n]
            S, s = B.T @ S, B.T @ s
        return step_products(policy, cross, mean).sum(0)

    def statistics(self, view: View) -> Tensor:
        states = view.rollout().states
        y = states[-1]
        adjoint = -view.reward_gradient(y)
        gradient = adjoint.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            if self._stored:
                y = states[n]
            v = view.noise_transpose(n, adjoint)
            gradient = gradient + view.control_parameter_vjp(n, y, v)
            adjoint = view.base_vjp(n, y, adjoint) + view.control_vjp(n, y, v)
            if not self._stored:
                step = view.apply_noise(n, view.control(n, y))
                y = 2.0 * y - view.base_mean(n, y) - step
        return gradient
