r"""Conditional means of the labels of SOC Matching on an affine chain.

Where the states after step n are shifted by psi_k, psi_{k+1} = R_k psi_k, the labels of
`sdebench.estimators.soc_matching` are, with D_k = (R_k - M_k)^T G_k^{-T},

    plain   a_k = R_k^T a_{k+1} + F_k X_k + D_k (z_k + v_k)
    work    a_k = p_k + C_k b_k,   p_k = R_k^T p_{k+1} + F_k X_k,
            b_k = R_k^T b_{k+1} - D_k z_k,   C_k = 1/2 X_k^T F_k X_k + C_{k+1}

from a_N = p_N = -grad r, b_N = 0, C_N = -r.  Their means given X_k = x are affine:
E[C z] = E[dC/dz] turns C_k b_k into products with the derivative lambda of the mean of
C, which is transported by the closed loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .quartic import require_quadratic

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import AffineChain, PolicyChain

Array = NDArray[np.float64]


def conditional_label(
    chain: AffineChain,
    gain: Array,
    bias: Array,
    *,
    work: bool = False,
    decay: float | None = 1.0,
) -> tuple[Array, Array]:
    """Return S (N + 1, d, d), s (N + 1, d) with E[a_k | X_k = x] = S x + s.

    With a quartic reward S x + s is the best affine fit.

    Parameters
    ----------
    gain, bias : K (N, m, d) and k (N, m) of the control v of the paths.
    work : the labels of the loss "work" instead of "plain".
    decay : R_k = decay I; None: the Jacobian of the base, R_k = M_k.
    """
    Q, q, _ = chain._terminal(gain, bias)

    def given(n: int, S: Array, s: Array) -> tuple[Array, Array]:
        return gain[n], bias[n]

    return _backward(chain, (Q, -q), given, work, decay)


def fixed_feedback(
    chain: AffineChain, *, work: bool = False, decay: float | None = 1.0
) -> tuple[Array, Array]:
    """Return K (N, m, d), k (N, m) with w_n = -G_n^T E[a_{n+1} | X_n] on its own paths.

    Where training on the labels of its own paths stops.  The arguments are those of
    `conditional_label`.
    """
    require_quadratic(np.asarray(chain.reward_quartic))
    n_steps, d, m = chain.noise.shape
    K, k = np.empty((n_steps, m, d)), np.empty((n_steps, m))

    def best(n: int, S: Array, s: Array) -> tuple[Array, Array]:
        G = chain.noise[n]
        right = np.column_stack(
            (S @ chain.transition[n], S @ np.asarray(chain.offset[n]) + s)
        )
        found = -np.linalg.solve(np.eye(m) + G.T @ S @ G, G.T @ right)
        K[n], k[n] = found[:, :d], found[:, d]
        return K[n], k[n]

    terminal = np.asarray(chain.reward_quadratic), -np.asarray(chain.reward_linear)
    _backward(chain, terminal, best, work, decay)
    return K, k


def _backward(
    chain: AffineChain,
    terminal: tuple[Array, Array],
    feedback: Callable[[int, Array, Array], tuple[Array, Array]],
    work: bool,
    decay: float | None,
) -> tuple[Array, Array]:
    """Return S, s of `conditional_label`; ``feedback`` sees those of the next step."""
    d, n_steps = chain.dim, chain.n_steps
    S, s = np.empty((n_steps + 1, d, d)), np.empty((n_steps + 1, d))
    S[-1], s[-1] = slope, level = terminal  # also of lambda
    for n in reversed(range(n_steps)):
        K, k = feedback(n, S[n + 1], s[n + 1])
        M, F, G = chain.transition[n], chain.running[n], chain.noise[n]
        B, b = M + G @ K, chain.offset[n] + G @ k
        R = M if decay is None else decay * np.eye(d)
        S[n] = R.T @ S[n + 1] @ B + F
        s[n] = R.T @ (S[n + 1] @ b + s[n + 1])
        if decay is None:
            continue
        if work:
            S[n] -= (R - M).T @ slope @ B
            s[n] -= (R - M).T @ (slope @ b + level)
            slope, level = B.T @ slope @ B + F, B.T @ (slope @ b + level)
        else:
            D = (R - M).T @ np.linalg.inv(G).T
            S[n] += D @ K
            s[n] += D @ k
    return S, s


def label_gradient(
    policy: PolicyChain, gain: Array, bias: Array, label: tuple[Array, Array]
) -> Array:
    """Return sum_n E_v[(dw_n)^T (w_n + G_n^T a_{n+1})], (P,).

    Parameters
    ----------
    gain, bias : of the control v of the paths.
    label : from `conditional_label`.
    """
    chain = policy.chain
    closed, drift = chain.closed_loop(gain, bias)
    S, s = label[0][1:], label[1][1:]
    transposed = np.swapaxes(chain.noise, 1, 2)
    level = np.einsum("nij,nj->ni", S, drift) + s
    residual = (
        policy.gain + transposed @ S @ closed,
        policy.bias + np.einsum("nij,nj->ni", transposed, level),
    )
    return chain._project(
        policy.gain_derivative,
        policy.bias_derivative,
        residual,
        chain.moments(gain, bias),
    )
