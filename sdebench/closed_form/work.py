r"""Exact means of work weights along rho_t = p_t e^{lambda_t r}.

On a Gaussian problem the Riemann-sum work of a chain with control
w = 1/2 g lambda grad r is a quadratic function of Gaussian states, so that its
exponential mean is the normalizer of an affine chain with running costs: of one more
coordinate, constantly 1, which turns linear terms into quadratic ones.

In one dimension, for any process, the moments of a weight that is a product over steps
are iterated integrals: the trapezoidal rule on equidistant nodes has exponentially
small errors for smooth integrands that vanish at the ends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from sdebench.closed_form.affine_chain import AffineChain
from sdebench.errors import NotExactError, ParameterError

Array = NDArray[np.float64]


def log_mean_work(chain: AffineChain, power: int) -> float:
    """Return log E e^A, A = sum_n h (lambda' r + lambda v . grad r)(X_n).

    The chain runs under the control 1/2 g lambda grad r, with lambda_n = (n / N)^power
    and 2 v = b + kappa x of a memoryless denoising process.

    Parameters
    ----------
    chain : the base chain, quadratic reward, with the ``denoiser`` of its tables.
    """
    if not len(chain.denoiser) or np.any(np.asarray(chain.reward_quartic)):
        raise NotExactError("needs a memoryless denoising chain and a quadratic reward")
    n_steps, d = chain.n_steps, chain.dim
    Q, q = np.asarray(chain.reward_quadratic), np.asarray(chain.reward_linear)
    by_state, by_mean, _, alpha, _ = np.asarray(chain.denoiser).T
    growth = (1.0 / alpha - by_state) / by_mean - 1.0
    share = np.arange(n_steps) / n_steps
    level, rate = share**power, power * share ** (power - 1) / n_steps

    transition = np.zeros((n_steps, d + 1, d + 1))
    noise = np.zeros((n_steps, d + 1, chain.noise.shape[2]))
    running = np.zeros((n_steps, d + 1, d + 1))
    noise[:, :d] = chain.noise
    constant = 0.0
    for n in range(n_steps):
        M, c, G = chain.transition[n], chain.offset[n], chain.noise[n]
        push = 0.5 * level[n] * G @ G.T
        transition[n, :d, :d], transition[n, :d, d] = M - push @ Q, c + push @ q
        transition[n, d, d] = 1.0
        V, v = 0.5 * (M + (growth[n] - 1.0) * np.eye(d)), 0.5 * c  # h v(x) = V x + v
        cross = V.T @ Q
        running[n, :d, :d] = rate[n] * Q + level[n] * (cross + cross.T)
        slope = rate[n] * q + level[n] * (V.T @ q - Q @ v)
        running[n, :d, d] = running[n, d, :d] = -slope
        constant += rate[n] * chain.reward_constant + level[n] * (v @ q)
    covariance = np.zeros((d + 1, d + 1))
    covariance[:d, :d] = chain.start_covariance
    extended = AffineChain(
        transition=transition,
        offset=np.zeros((n_steps, d + 1)),
        noise=noise,
        running=running,
        reward_quadratic=np.zeros((d + 1, d + 1)),
        reward_linear=np.zeros(d + 1),
        reward_constant=constant,
        start_mean=np.append(chain.start_mean, 1.0),
        start_covariance=covariance,
    )
    try:
        return extended.log_normalizer()
    except ParameterError as error:
        raise NotExactError(f"the mean of e^A is infinite: {error}") from error


def log_weight_moments(
    nodes: Array,
    log_start: Array,
    means: Array,
    noises: Array,
    log_weight: Callable[[int], Array],
    orders: tuple[float, ...] = (1.0, 2.0),
) -> list[float]:
    """Return log E W^m of W = prod_n w_n(X_n, X_{n+1}) for every order m.

    X_{n+1} = mean_n(X_n) + noise_n z in one dimension.

    Parameters
    ----------
    nodes : (k,) equidistant, as far as every integrand reaches.
    log_start : (k,) log density of X_0.
    means, noises : (N, k) and (N,).
    log_weight : log w_n at the nodes, n -> (k, k) or (k, 1) for one of X_n alone.
    """
    found = []
    step = np.log(nodes[1] - nodes[0])
    for order in orders:
        ahead = np.zeros(len(nodes))
        for n in reversed(range(len(noises))):
            z = (nodes[None, :] - means[n][:, None]) / noises[n]
            kernel = step - 0.5 * z * z - np.log(np.sqrt(2.0 * np.pi) * noises[n])
            ahead = logsumexp(kernel + order * log_weight(n) + ahead, axis=1)
        found.append(float(logsumexp(log_start + ahead) + step))
    return found
