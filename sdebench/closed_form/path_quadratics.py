r"""Means and covariances of quadratic functions of the paths of an affine chain.

Every path of X_{n+1} = M_n X_n + c_n + G_n (v_n + z_n) with an affine feedback v is an
affine function of xi = (start noise, z_0, ..., z_{N-1}) ~ N(0, I).  Sums of products of
such functions are quadratic in xi, and

    Cov(a . xi + xi^T A xi, b . xi + xi^T B xi) = a . b + 2 tr(A B)

for symmetric A and B: exact, with matrices of the size of a whole path.  The law of xi
reweighted by e^{-s q}, q = xi^T A xi + a . xi, is normal with the precision I + 2 s A,
and does not exist where that has an eigenvalue of zero or less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import NotExactError

from .hamiltonian import symmetric
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
    """A quadratic function of xi: xi^T A xi + a . xi + c."""

    matrix: Array
    vector: Array
    constant: float

    def plus(self, other: Quadratic) -> Quadratic:
        """Return the sum."""
        matrix, vector = self.matrix + other.matrix, self.vector + other.vector
        return Quadratic(matrix, vector, self.constant + other.constant)

    @property
    def mean(self) -> float:
        """Return its expectation."""
        return float(np.trace(self.matrix)) + self.constant


def product(f: Affine, g: Affine) -> Quadratic:
    """Return sum_n f_n . g_n."""
    left, right = (part.linear.reshape(-1, part.linear.shape[-1]) for part in (f, g))
    matrix = left.T @ right
    vector = left.T @ g.constant.ravel() + right.T @ f.constant.ravel()
    constant = float(f.constant.ravel() @ g.constant.ravel())
    return Quadratic(symmetric(matrix), vector, constant)


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


def log_ratio(
    policy: PolicyChain, gain: Array, bias: Array
) -> tuple[Quadratic, list[Quadratic]]:
    """Return the log-ratio l and its gradient on paths of another feedback v.

    l = sum_n (w_n . (z_n + v_n) - 1/2 |w_n|^2 + f_n) - r(X_N) is the log-ratio of the
    policy's path law to the tilted one, less log Z; its gradient in theta, with the
    path held fixed, is the score of the policy.

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
    ratio = ratio._replace(constant=ratio.constant - chain.reward_constant)
    residual = base_noise.plus(own, -1.0)
    slopes = zip(policy.gain_derivative, policy.bias_derivative, strict=True)
    return ratio, [product(x.map(*slope), residual) for slope in slopes]


def log_variance_gradient(policy: PolicyChain, gain: Array, bias: Array) -> Array:
    """Return the gradient (P,) of 1/2 Var(l) over paths of v; see `log_ratio`."""
    ratio, scores = log_ratio(policy, gain, bias)
    return np.array([covariance(ratio, score) for score in scores])


def moment_gradient(
    policy: PolicyChain, gain: Array, bias: Array, value: float
) -> Array:
    """Return the gradient (P,) of 1/2 E[(l - value)^2] over paths of v."""
    ratio, scores = log_ratio(policy, gain, bias)
    means = np.array([score.mean for score in scores])
    fluctuation = np.array([covariance(ratio, score) for score in scores])
    return fluctuation + (ratio.mean - value) * means


def weight_tail_index(policy: PolicyChain, gain: Array, bias: Array) -> float:
    """Return the least s for which the weights e^{-l} have E_v[e^{-s l}] = infinity.

    Infinite where all moments exist: the tail index of the weights.
    """
    ratio, _ = log_ratio(policy, gain, bias)
    least = float(np.linalg.eigvalsh(ratio.matrix)[0])
    return np.inf if least >= 0.0 else -0.5 / least


def weight_variance_gradient(policy: PolicyChain, gain: Array, bias: Array) -> Array:
    """Return the gradient (P,) of 1/2 Var_v(e^{-l}) over (E_v e^{-l})^2.

    With the squared mean held fixed, where e^{-l} is the weight of the tilted path law
    to the policy's, times Z.

    Raises
    ------
    NotExactError
        Where the weights have no second moment, and for a quartic reward.
    """
    ratio, scores = log_ratio(policy, gain, bias)
    (first, once), (second, twice) = (
        _reweighted(ratio, scores, power) for power in (1.0, 2.0)
    )
    return once - np.exp(second - 2.0 * first) * twice


def _reweighted(
    ratio: Quadratic, functions: list[Quadratic], power: float
) -> tuple[float, Array]:
    """Return log E e^{-s l} and the means of functions under the law so reweighted."""
    precision = np.eye(len(ratio.vector)) + 2.0 * power * ratio.matrix
    values = np.linalg.eigvalsh(precision)
    if values[0] <= 0.0:
        raise NotExactError(
            f"the weights have no moment of order {power:g}: the law of the noise "
            f"reweighted by it would have a precision with the eigenvalue "
            f"{values[0]:.6g}"
        )
    covariance = np.linalg.inv(precision)
    mean = -power * covariance @ ratio.vector
    log_moment = -power * ratio.constant - 0.5 * np.sum(np.log(values))
    log_moment -= 0.5 * power * ratio.vector @ mean
    second = covariance + np.outer(mean, mean)
    found = [
        np.sum(f.matrix * second) + f.vector @ mean + f.constant for f in functions
    ]
    return float(log_moment), np.array(found)
