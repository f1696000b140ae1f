r"""Covariances of quadratic functions of the paths of an affine chain.

Every path of X_{n+1} = M_n X_n + c_n + G_n (v_n + z_n) with an affine feedback v is an
affine function of xi = (start noise, z_0, ..., z_{N-1}) ~ N(0, I).  Sums of products of
such functions are quadratic in xi, and

    Cov(a . xi + xi^T A xi, b . xi + xi^T B xi) = a . b + 2 tr(A B)

for symmetric A and B: exact, with matrices of the size of a whole path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .quartic import require_quadratic

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import AffineChain, PolicyChain

Array = NDArray[np.float64]
Real = NDArray[np.floating]


class Affine(NamedTuple):
    """Affine functions of xi, one per step: linear (N, r, D), constant (N, r)."""

    linear: Array
    constant: Array

    def map(self, matrices: Real, vectors: Real) -> Affine:
        """Return A_n f_n + b_n, A (N, s, r), b (N, s)."""
        constant = np.einsum("nij,nj->ni", matrices, self.constant) + vectors
        return Affine(matrices @ self.linear, constant)

    def plus(self, other: Affine, factor: float = 1.0) -> Affine:
        """Return f + factor g."""
        return Affine(
            self.linear + factor * other.linear,
            self.constant + factor * other.constant,
        )


class Quadratic(NamedTuple):
    """A quadratic function of xi up to its constant: xi^T A xi + a . xi."""

    matrix: Array
    vector: Array

    def plus(self, other: Quadratic) -> Quadratic:
        """Return the sum."""
        return Quadratic(self.matrix + other.matrix, self.vector + other.vector)


def product(f: Affine, g: Affine) -> Quadratic:
    """Return sum_n f_n . g_n."""
    left, right = (part.linear.reshape(-1, part.linear.shape[-1]) for part in (f, g))
    matrix = left.T @ right
    vector = left.T @ g.constant.ravel() + right.T @ f.constant.ravel()
    return Quadratic(0.5 * (matrix + matrix.T), vector)


def covariance(f: Quadratic, g: Quadratic) -> float:
    """Return Cov(f, g)."""
    return float(f.vector @ g.vector + 2.0 * np.sum(f.matrix * g.matrix))


def paths(chain: AffineChain, gain: Array, bias: Array) -> tuple[Affine, Affine]:
    """Return the states X_0, ..., X_N and the noises z_n under a feedback."""
    n_steps, dim, width = chain.noise.shape
    size = dim + n_steps * width
    values, vectors = np.linalg.eigh(chain.start_covariance)
    linear, constant = np.zeros((n_steps + 1, dim, size)), np.zeros((n_steps + 1, dim))
    linear[0, :, :dim] = vectors * np.sqrt(np.clip(values, 0.0, None))
    constant[0] = chain.start_mean
    noises = np.eye(size)[dim:].reshape(n_steps, width, size)
    for n, G in enumerate(chain.noise):
        closed = chain.transition[n] + G @ gain[n]
        linear[n + 1] = closed @ linear[n] + G @ noises[n]
        constant[n + 1] = closed @ constant[n] + chain.offset[n] + G @ bias[n]
    return Affine(linear, constant), Affine(noises, np.zeros((n_steps, width)))


def log_variance_gradient(policy: PolicyChain, gain: Array, bias: Array) -> Array:
    """Return the gradient (P,) of 1/2 Var(l) over paths of another feedback v.

    l = sum_n (w_n . (z_n + v_n) - 1/2 |w_n|^2 + f_n) - r(X_N) is the log-ratio of the
    policy's path law to the tilted one.

    Parameters
    ----------
    gain, bias : of v, (N, m, d) and (N, m).

    Raises
    ------
    NotExactError
        For a quartic reward.
    """
    chain = policy.chain
    require_quadratic(np.asarray(chain.reward_quartic))
    states, noises = paths(chain, gain, bias)
    x, end = (
        Affine(states.linear[part], states.constant[part])
        for part in (slice(None, -1), slice(-1, None))
    )
    base_noise = noises.plus(x.map(gain, bias))
    own = x.map(policy.gain, policy.bias)
    running = x.map(0.5 * chain.running, np.zeros_like(x.constant))
    reward = end.map(0.5 * chain.reward_quadratic[None], -chain.reward_linear[None])
    ratio = product(own, base_noise.plus(own, -0.5))
    ratio = ratio.plus(product(x, running)).plus(product(end, reward))
    residual = base_noise.plus(own, -1.0)
    slopes = zip(policy.gain_derivative, policy.bias_derivative, strict=True)
    return np.array(
        [covariance(ratio, product(x.map(*slope), residual)) for slope in slopes]
    )
