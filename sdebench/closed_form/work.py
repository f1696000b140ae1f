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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from sdebench.closed_form.affine_chain import AffineChain
from sdebench.errors import NotExactError, ParameterError

Array = NDArray[np.float64]


class Quadratics(NamedTuple):
    """Functions -1/2 x^T A_n x + b_n^T x + c_n, or Gaussian densities as their logs."""

    precision: Array  # (n, d, d)
    linear: Array  # (n, d)
    constant: Array  # (n,)

    def log_integrals(self) -> Array:
        """Return the logarithms of the integrals of the exponentials, (n,)."""
        mean = np.linalg.solve(self.precision, self.linear[:, :, None])[:, :, 0]
        found: Array = self.constant + 0.5 * np.einsum("ni,ni->n", self.linear, mean)
        d = self.linear.shape[1]
        spread = d * np.log(2.0 * np.pi) - np.linalg.slogdet(self.precision)[1]
        return found + 0.5 * spread

    def expected(self, n: int, functions: Quadratics, m: int) -> float:
        """Return the mean of ``functions`` number m under the density number n."""
        covariance = np.linalg.inv(self.precision[n])
        mean = covariance @ self.linear[n]
        second = covariance + np.outer(mean, mean)
        value = functions.linear[m] @ mean
        value -= 0.5 * np.sum(functions.precision[m] * second)
        return float(value + functions.constant[m])


def riemann_work(chain: AffineChain, power: int) -> Quadratics:
    """Return h (lambda' r + lambda v . grad r) of every step n < N.

    Parameters
    ----------
    chain : the base chain, quadratic reward, with the ``denoiser`` of its tables.
    power : lambda_n = (n / N)^power, and 2 v = b + kappa x.
    """
    if not len(chain.denoiser) or np.any(np.asarray(chain.reward_quartic)):
        raise NotExactError("needs a memoryless denoising chain and a quadratic reward")
    n_steps, d = chain.n_steps, chain.dim
    Q, q = np.asarray(chain.reward_quadratic), np.asarray(chain.reward_linear)
    by_state, by_mean, _, alpha, _ = np.asarray(chain.denoiser).T
    growth = (1.0 / alpha - by_state) / by_mean - 1.0
    share = np.arange(n_steps) / n_steps
    level, rate = share**power, power * share ** (power - 1) / n_steps
    precision, linear = np.empty((n_steps, d, d)), np.empty((n_steps, d))
    constant = np.empty(n_steps)
    for n in range(n_steps):
        M, c = chain.transition[n], chain.offset[n]
        V, v = 0.5 * (M + (growth[n] - 1.0) * np.eye(d)), 0.5 * c  # h v(x) = V x + v
        cross = V.T @ Q
        precision[n] = rate[n] * Q + level[n] * (cross + cross.T)
        linear[n] = rate[n] * q + level[n] * (V.T @ q - Q @ v)
        constant[n] = rate[n] * chain.reward_constant + level[n] * (v @ q)
    return Quadratics(precision, linear, constant)


def log_mean_work(chain: AffineChain, power: int) -> float:
    """Return log E e^A, A = sum_n h (lambda' r + lambda v . grad r)(X_n).

    The chain runs under the control 1/2 g lambda grad r, with lambda_n = (n / N)^power.

    Parameters
    ----------
    chain, power : of `riemann_work`.
    """
    work = riemann_work(chain, power)
    n_steps, d = chain.n_steps, chain.dim
    Q, q = np.asarray(chain.reward_quadratic), np.asarray(chain.reward_linear)
    level = (np.arange(n_steps) / n_steps) ** power

    transition = np.zeros((n_steps, d + 1, d + 1))
    noise = np.zeros((n_steps, d + 1, chain.noise.shape[2]))
    running = np.zeros((n_steps, d + 1, d + 1))
    noise[:, :d] = chain.noise
    for n in range(n_steps):
        M, c, G = chain.transition[n], chain.offset[n], chain.noise[n]
        push = 0.5 * level[n] * G @ G.T
        transition[n, :d, :d], transition[n, :d, d] = M - push @ Q, c + push @ q
        transition[n, d, d] = 1.0
    running[:, :d, :d] = work.precision
    running[:, :d, d] = running[:, d, :d] = -work.linear
    covariance = np.zeros((d + 1, d + 1))
    covariance[:d, :d] = chain.start_covariance
    extended = AffineChain(
        transition=transition,
        offset=np.zeros((n_steps, d + 1)),
        noise=noise,
        running=running,
        reward_quadratic=np.zeros((d + 1, d + 1)),
        reward_linear=np.zeros(d + 1),
        reward_constant=float(work.constant.sum()),
        start_mean=np.append(chain.start_mean, 1.0),
        start_covariance=covariance,
    )
    try:
        return extended.log_normalizer()
    except ParameterError as error:
        raise NotExactError(f"the mean of e^A is infinite: {error}") from error


def expected_work(chain: AffineChain, power: int) -> float:
    """Return sum_n E_{rho_n}[h (lambda' r + lambda v . grad r)], see `riemann_work`."""
    count = chain.n_steps
    level = (np.arange(count + 1.0) / count) ** power
    work, path = riemann_work(chain, power), annealed_gaussians(chain, level)
    return sum(path.expected(n, work, n) for n in range(count))


def data_law(chain: AffineChain) -> tuple[Array, Array]:
    """Return mean (d,) and covariance (d, d) of X_T of a memoryless denoising process.

    By its denoiser E[X_T | X_n = x] = J x + j, J = alpha C (alpha^2 C + beta^2)^-1 and
    j = (I - alpha J) m, at the step where signal and noise are most alike.
    """
    if not len(chain.denoiser):
        raise NotExactError("needs a memoryless denoising chain")
    ratio = chain.denoiser[:, 3] * _terminal_scale(chain) / chain.denoiser[:, 4]
    n = int(np.argmin(np.abs(np.log(ratio))))
    by_state, by_mean, _, alpha, beta = np.asarray(chain.denoiser[n])
    eye = np.eye(chain.dim)
    slope = by_state * eye + by_mean * np.asarray(chain.transition[n])
    rest = eye - alpha * slope
    covariance = beta**2 / alpha * np.linalg.solve(rest, slope)
    return np.linalg.solve(rest, by_mean * np.asarray(chain.offset[n])), covariance


def _terminal_scale(chain: AffineChain) -> float:
    """Return the standard deviation of X_T, roughly: that of the first coordinate."""
    by_state, by_mean, _, alpha, beta = np.asarray(chain.denoiser[-1])
    slope = by_state + by_mean * np.asarray(chain.transition[-1])[0, 0]
    return float(np.sqrt(beta**2 * slope / (alpha * (1.0 - alpha * slope))))


def annealed_gaussians(
    chain: AffineChain, level: Array, path: str = "marginals"
) -> Quadratics:
    """Return the densities of `sdebench.estimators._annealing` on a Gaussian problem.

    Parameters
    ----------
    chain : the base chain, quadratic reward, with the ``denoiser`` of its tables.
    level : lambda_n, (N + 1,).
    path : "marginals" or "geometric".
    """
    if np.any(np.asarray(chain.reward_quartic)):
        raise NotExactError("needs a quadratic reward")
    mean, covariance = data_law(chain)
    d = chain.dim
    alpha = np.append(chain.denoiser[:, 3], 1.0)[:, None, None]
    beta = np.append(chain.denoiser[:, 4], 0.0)[:, None, None]
    spread = alpha**2 * covariance + beta**2 * np.eye(d)
    precision: Array = np.asarray(np.linalg.inv(spread), np.float64)
    linear = np.einsum("nij,nj->ni", precision, alpha[:, :, 0] * mean)
    constant = -0.5 * np.einsum("ni,nj,nij->n", linear, linear, spread)
    constant -= 0.5 * (d * np.log(2.0 * np.pi) + np.linalg.slogdet(spread)[1])
    own = Quadratics(precision, linear, constant)
    reward = (
        np.asarray(chain.reward_quadratic),
        np.asarray(chain.reward_linear),
        np.asarray(chain.reward_constant),
    )

    def mixed(base: Array, tilt: Array) -> Array:
        shape = (-1,) + (1,) * (base.ndim - 1)
        ours = level.reshape(shape)
        if path == "geometric":
            base = (1.0 - ours) * base[:1] + ours * base[-1:]
        return base + ours * tilt

    return Quadratics(*(mixed(*pair) for pair in zip(own, reward, strict=True)))


def trapezoidal_log_ratio(path: Quadratics) -> float:
    """Return the trapezoidal rule for log int rho_N / rho_0 between neighbours.

    sum_n 1/2 (E_n + E_{n+1}) log rho_{n+1} / rho_n, E_n the mean under rho_n.
    """
    gaps = Quadratics(*(np.diff(part, axis=0) for part in path))
    return 0.5 * sum(
        path.expected(n, gaps, n) + path.expected(n + 1, gaps, n)
        for n in range(len(gaps.constant))
    )


def path_bounds(chain: AffineChain, gain: Array, bias: Array) -> tuple[float, float]:
    """Return the means of the log kernel ratio under the controlled and the tilted law.

    log W = log p_T(X_N) e^r(X_N) / p_0(X_0) + sum_n log B_n(X_{n+1}, X_n) / F_n, with
    the exact noising kernels B_n and the chain's F_n under a feedback.  They are
    log Z - KL(P || P*) and log Z + KL(P* || P).

    Parameters
    ----------
    chain : the base chain, quadratic reward, with the ``denoiser`` of its tables.
    gain, bias : of the feedback, (N, m, d) and (N, m).
    """
    path = annealed_gaussians(chain, np.linspace(0.0, 1.0, chain.n_steps + 1))
    closed, drift = chain.closed_loop(gain, bias)
    alpha, beta = np.append(chain.denoiser[:, 3:], [[1.0, 0.0]], axis=0).T
    shrink = alpha[:-1] / alpha[1:]
    back = beta[:-1] ** 2 - (shrink * beta[1:]) ** 2
    kernels = Kernels(closed, drift, np.asarray(chain.noise[:, 0, 0]), shrink, back)

    means, covariances = chain.moments(gain, bias)
    crossed = covariances[:-1] @ np.swapaxes(closed, 1, 2)
    lower = _mean_log_ratio(path, kernels, Neighbours(means, covariances, crossed))

    end, scale = np.linalg.inv(path.precision[-1]), alpha[:, None, None]
    noise = beta[:, None, None] ** 2 * np.eye(chain.dim)
    means, covariances = (
        alpha[:, None] * (end @ path.linear[-1]),
        scale**2 * end + noise,
    )
    crossed = shrink[:, None, None] * covariances[1:]
    upper = _mean_log_ratio(path, kernels, Neighbours(means, covariances, crossed))
    return lower, upper


class Kernels(NamedTuple):
    """F_n = N(M_n x + c_n, g_n^2 I) and B_n = N(a_n x', b_n I)."""

    matrix: Array  # (N, d, d)
    vector: Array  # (N, d)
    noise: Array  # (N,)
    shrink: Array  # (N,)
    back: Array  # (N,)


class Neighbours(NamedTuple):
    """Gaussian laws of X_n and of (X_n, X_{n+1})."""

    means: Array  # (N + 1, d)
    covariances: Array  # (N + 1, d, d)
    crossed: Array  # (N, d, d) Cov(X_n, X_{n+1})


def _mean_log_ratio(path: Quadratics, kernels: Kernels, law: Neighbours) -> float:
    """Return E log W of `path_bounds`; ``path`` begins with p_0, ends with p_T e^r."""
    count, d = law.crossed.shape[:2]
    total = _mean_quadratic(path, count, law) - _mean_quadratic(path, 0, law)
    for n, (M, c, g, a, b) in enumerate(zip(*kernels, strict=True)):
        mean, after = law.means[n], law.means[n + 1]
        here, ahead, crossed = (
            law.covariances[n],
            law.covariances[n + 1],
            law.crossed[n],
        )
        gap, back = after - M @ mean - c, mean - a * after
        forward = gap @ gap + np.trace(ahead + M @ here @ M.T - 2.0 * M @ crossed)
        backward = back @ back + np.trace(here + a**2 * ahead - 2.0 * a * crossed)
        total += 0.5 * (forward / g**2 - backward / b + d * np.log(g**2 / b))
    return float(total)


def _mean_quadratic(functions: Quadratics, n: int, law: Neighbours) -> float:
    """Return the mean of function number n of X_n."""
    mean = law.means[n]
    second = law.covariances[n] + np.outer(mean, mean)
    value = functions.linear[n] @ mean - 0.5 * np.sum(functions.precision[n] * second)
    return float(value + functions.constant[n])


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
