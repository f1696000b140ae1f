r"""Reinforce adjoint matching: control labels from one reward per path, no gradients.

x_1 = X_N is the end of a path of the model itself, noised again to every time of the
grid with one normal xi per path, x_n = alpha_n x_1 + beta_n xi.  With the model's
denoised prediction D_n(x) = E[X_N | X_n = x], which is linear in the control with the
factor s_n, the label of the control in noise units is

    r(x_1) (x_1 - D_n(x_n)) / s_n,   gradient = sum_n (dw_n)^T (w_n - label_n).

The label's conditional mean is that of D_ref + Cov_model(r, x_1 | x_n): one implicit
Euler step of the tilt in place of the integral over all tilts in between.  So the
method stops beside the tilted law, for Gaussians known in closed form
(`sdebench.closed_form.reinforce_adjoint`); a linear reward is met exactly.  Adding a
constant to the reward changes nothing in mean, as the model denoises its own samples,
up to the time step.

References
----------
"Reinforce adjoint matching", arXiv:2605.10759, the loss without its correction for the
path cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.estimator import Array, Estimator
from sdebench.estimators._expectations import apply, second_moments, step_products
from sdebench.simulate import primitives
from sdebench.simulate.tile import (
    block_loop,
    clear,
    combine,
    lanes,
    load,
    path_kernel,
    store,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View


@block_loop
def subtract_label(totals, END, DENOISED, scale, V, B):  # type: ignore[no-untyped-def]
    """V = V - scale r (END - DENOISED), r the rewards in row 3 of ``totals``."""
    for p in range(0, B, lanes(V)):
        reward = scale * load(totals, 3, p)
        for i in range(V.shape[0]):
            gap = load(END, i, p) - load(DENOISED, i, p)
            store(V, i, p, load(V, i, p) - reward * gap)


@path_kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    OWN: Any,
    OUT: Any,
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a stored block."""
    N = W.shape[0]
    Y, V, D = work.adjoint, work.direction, work.adjoint_next
    clear(OUT, B)
    for n in range(N):
        row = prepared.denoiser[n]
        p, q, s = row[0], row[1], row[2]
        combine(row[3], X[N], row[4], OWN[0], Y, B)
        primitives.base_mean(prepared, work, n, Y, D, B)
        combine(p, Y, q, D, D, B)
        primitives.evaluate(prepared, work, n, Y, V, B)
        combine(1.0, D, s, V, D, B)
        subtract_label(totals, X[N], D, 1.0 / s, V, B)
        primitives.control_parameter_vjp(prepared, work, n, Y, V, OUT, 0, B)


@dataclass(frozen=True, kw_only=True)
class ReinforceAdjointMatching(Estimator):
    """Adjoint matching without gradients: rewards times the denoiser's residual."""

    estimand: ClassVar[str] = "matching_gradient"
    source: ClassVar[str] = (
        "Reinforce adjoint matching, arXiv:2605.10759, without the path-cost correction"
    )
    formula: ClassVar[str] = r"""\begin{aligned}
x_n &= \alpha_n X_N + \beta_n \xi, \quad D_n(x) = E[X_N \mid X_n = x] \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n - \frac{r(X_N)}{s_n} (X_N - D_n(x_n)) \right), \quad
  s_n = \frac{\partial D_n}{\partial w_n}
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "the stated sum with the law of X_N of the simulated chain; it vanishes at an "
        "implicit Euler step of the tilt, up to the time step, and not at the optimum"
    )
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    block_kernel = staticmethod(block_kernel)

    @property
    def needs_denoiser(self) -> bool:
        return True

    def own_normals(self, n_steps: int) -> int:
        return 1

    def target(self, policy: PolicyChain) -> Array:
        chain, dim = policy.chain, policy.chain.dim
        mean, covariance = (
            part[-1] for part in chain.moments(policy.gain, policy.bias)
        )
        x, x_x, cross, v = [], [], [], []
        for n, (p, q, s, alpha, beta) in enumerate(np.asarray(chain.denoiser)):
            slope = p * np.eye(dim) + q * chain.transition[n] + s * policy.gain[n]
            shift = q * chain.offset[n] + s * policy.bias[n]
            # the joint law of y = (x_n, x_1)
            center = np.concatenate([alpha * mean, mean])
            spread = np.kron([[alpha**2, alpha], [alpha, 1.0]], covariance)
            spread[:dim, :dim] += beta**2 * np.eye(dim)
            state = np.eye(dim, 2 * dim)
            residual = np.hstack([-slope, np.eye(dim)]) / s
            gap = residual @ center - shift / s
            label, label_x = _reward_moments(
                policy, mean, (center, spread), (residual, gap), state
            )
            x.append(state @ center)
            x_x.append(second_moments(x[-1], spread[:dim, :dim]))
            v.append(label)
            cross.append(label_x)
        states, second = np.array(x), np.array(x_x)
        control = apply(policy.gain, states) + policy.bias
        control_x = policy.gain @ second + policy.bias[:, :, None] * states[:, None, :]
        terms = step_products(
            policy, control_x - np.array(cross), control - np.array(v)
        )
        return terms.sum(0)

    def statistics(self, view: View) -> Tensor:
        paths, xi = view.rollout(), view.noise(view.n_steps)
        data, reward = paths.states[-1], paths.reward[:, None]
        gradient = data.new_zeros(view.n_paths, view.n_params)
        for n, (p, q, s, alpha, beta) in enumerate(view.denoiser.tolist()):
            x = alpha * data + beta * xi
            w = view.control(n, x)
            denoised = p * x + q * view.base_mean(n, x) + s * w
            residual = w - reward * (data - denoised) / s
            gradient = gradient + view.control_parameter_vjp(n, x, residual)
        return gradient


def _reward_moments(
    policy: PolicyChain,
    end: Array,
    law: tuple[Array, Array],
    residual: tuple[Array, Array],
    state: Array,
) -> tuple[Array, Array]:
    """Return E[r u] and E[r u x^T] of u = A y + a, x = S y, y Gaussian.

    r is quadratic in the last coordinates of y: by the covariance of two quadratics.

    Parameters
    ----------
    end : mean of those coordinates.
    law : mean and covariance of y.
    residual : A, and the mean of u.
    state : S.
    """
    chain, dim = policy.chain, policy.chain.dim
    (center, spread), (A, gap) = law, residual
    Q, q = np.asarray(chain.reward_quadratic), np.asarray(chain.reward_linear)
    slope = np.concatenate([np.zeros(dim), q - Q @ end])
    hessian = np.zeros_like(spread)
    hessian[dim:, dim:] = -Q
    reward = q @ end - 0.5 * end @ Q @ end + chain.reward_constant
    reward += 0.5 * np.sum(hessian * spread)
    x = state @ center
    along, along_x = A @ spread @ slope, state @ spread @ slope
    product = reward * (A @ spread @ state.T + np.outer(gap, x))
    product += np.outer(along, x) + np.outer(gap, along_x)
    product += A @ spread @ hessian @ spread @ state.T
    return reward * gap + along, product
