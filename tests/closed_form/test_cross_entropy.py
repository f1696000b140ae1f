"""The gradient of KL(P* || P_theta) by second routes that share no algebra with it.

Of the N-step chain: finite differences of the relative entropy of two Gaussians in all
noises of a path at once.  In continuous time: class L by ordinary differential
equations, the tilting family by quadrature over time and state of
E* int (du/dtheta)^T (u_theta - u*) dt.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss
from scipy.integrate import solve_ivp
from test_affine_chain import small_chain, small_feedback

from sdebench import registry
from sdebench.closed_form.initial_law import relative_entropy
from sdebench.errors import NotExactError

LINEAR = ("damped_oscillator", "ou_linear:dim=2", "lq_oscillator")
ONE_DIMENSIONAL = (
    "two_modes",  # a normal start, which is not the base's marginal
    "two_modes:start=marginal",
    "gaussian_tilt",
    "gaussian_tilt:schedule=linear_flow,noise=constant",
    "follmer_mixture:dim=1",
)


def difference(function, theta):
    """Fourth-order difference quotients of a function of theta."""
    step, found = 2e-3, []
    for e in np.eye(len(theta)) * step:
        near = function(theta + e) - function(theta - e)
        far = function(theta + 2 * e) - function(theta - 2 * e)
        found.append((8.0 * near - far) / (12.0 * step))
    return np.array(found)


# ---- N steps -----------------------------------------------------------------------
def factor(chain):
    values, vectors = np.linalg.eigh(chain.start_covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def states_of_noises(chain, mean, root):
    """X_n = rows[n] (1, s, y_0, ..., y_{N-1}) with X_0 = mean + root s, no control."""
    n_steps, d, m = chain.noise.shape
    row = np.zeros((d, 1 + d + n_steps * m))
    row[:, 0], row[:, 1 : 1 + d] = mean, root
    rows = [row]
    for n in range(n_steps):
        row = chain.transition[n] @ row
        row[:, 0] += chain.offset[n]
        first = 1 + d + n * m
        row[:, first : first + m] += chain.noise[n]
        rows.append(row)
    return rows


def tilted_noises(chain, mean, root):
    """Mean and covariance of (s, y) under P*: the base N(0, I) times exp(r - f)."""
    rows = states_of_noises(chain, mean, root)
    precision, slope = np.eye(rows[0].shape[1] - 1), np.zeros(rows[0].shape[1] - 1)
    quadratics = [*chain.running, chain.reward_quadratic]
    for row, matrix in zip(rows, quadratics, strict=True):
        precision = precision + row[:, 1:].T @ matrix @ row[:, 1:]
        slope = slope - row[:, 1:].T @ matrix @ row[:, 0]
    slope = slope + rows[-1][:, 1:].T @ chain.reward_linear
    covariance = np.linalg.inv(precision)
    return covariance @ slope, covariance


def controlled_noises(chain, mean, root, gain, bias, start=None):
    """Mean and covariance of (s, y) with y_n = K_n X_n + k_n + own noise."""
    rows = states_of_noises(chain, mean, root)
    n_steps, d, m = chain.noise.shape
    # y - K X(s, y) - k = own noise, unit lower triangular in the steps
    size = d + n_steps * m
    matrix, shift = np.eye(size), np.zeros(size)
    own = np.eye(size)
    for n in range(n_steps):
        part = slice(d + n * m, d + (n + 1) * m)
        matrix[part] -= gain[n] @ rows[n][:, 1:]
        shift[part] = gain[n] @ rows[n][:, 0] + bias[n]
    if start is not None:
        shift[:d] = start[0]
        own[:d, :d] = start[1]
    inverse = np.linalg.inv(matrix)
    spread = inverse @ own
    return inverse @ shift, spread @ spread.T


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", [0, 3])
def test_chain_against_differences_of_the_dense_relative_entropy(seed, fixed):
    chain = small_chain(n_steps=5, dim=2, seed=seed, fixed=fixed)
    gain, bias, dK, dk = small_feedback(chain, seed=seed + 1)
    mean, root = chain.start_mean, factor(chain)
    tilted = tilted_noises(chain, mean, root)

    def entropy(move):
        feedback = gain + np.tensordot(move, dK, 1), bias + np.tensordot(move, dk, 1)
        law = controlled_noises(chain, mean, root, *feedback)
        return relative_entropy(*tilted, *law)

    mine = chain.cross_entropy_gradient(gain, bias, dK, dk)
    np.testing.assert_allclose(mine, difference(entropy, np.zeros(3)), atol=2e-9)
    # The states' moments, and not those of the best feedback with noise of size one.
    rows = states_of_noises(chain, mean, root)
    means, covariances = chain.tilted_moments()
    for row, m, c in zip(rows, means, covariances, strict=True):
        np.testing.assert_allclose(row[:, 1:] @ tilted[0] + row[:, 0], m, atol=1e-12)
        spread = row[:, 1:] @ tilted[1] @ row[:, 1:].T
        np.testing.assert_allclose(spread, c, atol=1e-12)
    loose = chain.moments(*chain.optimal_feedback())[1]
    assert np.max(np.abs(loose[-1] - covariances[-1])) > 0.01


def test_chain_with_start_parameters_against_differences():
    """The law of X_0 moves as well: minus its score under the tilted start."""
    problem = registry.problem("lq_oscillator", initial_law=True)
    theta, n_steps = problem.theta("halfway"), 4
    family = problem.initial_family
    tilted = None

    def entropy(parameters):
        nonlocal tilted
        chain, (gain, bias, _, _) = problem.truth._discrete(parameters, n_steps)
        root = family.factor
        if tilted is None:
            tilted = tilted_noises(chain, family.mean, root)
        start = family.split(problem.start_parameters(parameters))
        law = controlled_noises(chain, family.mean, root, gain, bias, start)
        return relative_entropy(*tilted, *law)

    mine = problem.truth.cross_entropy_gradient(theta, n_steps)
    np.testing.assert_allclose(mine, difference(entropy, theta), atol=2e-9)
    assert np.linalg.norm(mine[len(problem.profiles) :]) > 0.1


def test_chain_without_noise_in_a_step_is_refused():
    chain = dataclasses.replace(small_chain(), noisy=np.array([1.0, 1.0, 0.0, 1.0]))
    with pytest.raises(NotExactError, match="no noise"):
        chain.cross_entropy_gradient(*small_feedback(chain))


# ---- continuous time ---------------------------------------------------------------
@pytest.mark.parametrize("spec", [*LINEAR, "lq_oscillator:initial_law=true"])
def test_class_l_by_differential_equations(spec):
    """Riccati equation backward, moments under u* and the sum forward."""
    problem = registry.problem(spec)
    model, d = problem.model, problem.dim
    theta = problem.theta("zero") + np.linspace(-0.4, 0.6, problem.n_params)
    noise = model.diffusion @ model.diffusion.T
    A, a, F = model.drift_matrix, model.drift_offset, model.running
    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}

    def split(y):
        return y[: d * d].reshape(d, d), y[d * d : d * d + d]

    def backward(_, y):
        P, p = split(y)
        dP = -(A.T @ P + P @ A - P @ noise @ P + F)
        return np.concatenate([dP.ravel(), -((A - noise @ P).T @ p + P @ a)])

    final = np.concatenate([model.reward_quadratic.ravel(), -model.reward_linear])
    value = solve_ivp(
        backward, (model.horizon, 0.0), final, dense_output=True, **options
    ).sol

    P, p = split(value(0.0))
    if np.any(model.start_covariance):
        precision = np.linalg.inv(model.start_covariance)
        covariance = np.linalg.inv(precision + P)
        mean = covariance @ (precision @ model.start_mean - p)
    else:
        covariance, mean = model.start_covariance, model.start_mean

    def forward(t, y):
        C, m = split(y)
        P, p = split(value(t))
        K, k = -model.diffusion.T @ P, -model.diffusion.T @ p
        gains, biases = problem.feedback(np.array([t]))
        dK, dk = gains[:, 0], biases[:, 0]
        R = np.tensordot(theta, dK, 1) - K
        e = np.tensordot(theta, dk, 1) - k
        second = C + np.outer(m, m)
        slope = np.einsum("pij,ij->p", dK, R @ second + np.outer(e, m))
        slope += dk @ (R @ m + e)
        closed = A + model.diffusion @ K
        dC = closed @ C + C @ closed.T + noise
        drift = closed @ m + a + model.diffusion @ k
        return np.concatenate([dC.ravel(), drift, slope])

    first = np.concatenate([covariance.ravel(), mean, np.zeros(len(theta))])
    total = solve_ivp(forward, (0.0, model.horizon), first, **options).y[
        d * d + d :, -1
    ]
    if problem.has_start_parameters:
        family, count = problem.initial_family, len(problem.profiles)

        def entropy(parameters):
            m, L = family.moments(parameters)
            return relative_entropy(mean, covariance, m, L @ L.T)

        total[count:] += difference(entropy, theta[count:])
    mine = problem.truth.cross_entropy_gradient(theta)
    np.testing.assert_allclose(mine, total, atol=1e-9 * (1 + np.linalg.norm(total)))


def time_quadrature(problem, theta, panels=4, count=2001):
    """E* int (du/dtheta)^T (u_theta - u*) dt by Gauss rules in t, a grid in x."""
    truth, (start, end) = problem.truth, problem.time_span
    nodes, weights = leggauss(20)
    edges = np.linspace(start, end, panels + 1)
    total = np.zeros(problem.n_params)
    for a, b in itertools.pairwise(edges):
        for node, weight in zip(nodes, weights, strict=True):
            t = a + 0.5 * (b - a) * (node + 1.0)
            base = truth.base_marginal(t)
            center, width = base.mean()[0], np.sqrt(base.covariance()[0, 0])
            x = (center + 14.0 * width * np.linspace(-1, 1, count))[:, None]
            log_density = base.log_density(x) - truth.value(x, t)
            density = np.exp(log_density - np.max(log_density))
            density /= density.sum()
            gap = truth.policy(x, t, theta) - truth.control(x, t)
            slopes = difference(lambda v, x=x, t=t: truth.policy(x, t, v), theta)
            part = np.einsum("pnd,nd,n->p", slopes, gap, density)
            total += 0.5 * (b - a) * weight * part
    return total


@pytest.mark.parametrize("spec", ONE_DIMENSIONAL)
def test_tilting_family_by_quadrature_over_time(spec):
    problem = registry.problem(spec)
    theta = problem.theta("halfway") + 0.1
    mine = problem.truth.cross_entropy_gradient(theta)
    other = time_quadrature(problem, theta)
    np.testing.assert_allclose(mine, other, atol=1e-7 * np.linalg.norm(mine))
    bound = problem.truth.error_bound("cross_entropy_gradient", theta)
    assert 0.0 <= bound < 1e-9


@pytest.mark.parametrize("spec", [*LINEAR, *ONE_DIMENSIONAL, "nine_modes"])
def test_it_vanishes_at_the_optimum_and_points_uphill(spec):
    problem = registry.problem(spec)
    truth, best = problem.truth, problem.theta_star
    assert np.linalg.norm(truth.cross_entropy_gradient("optimum")) < 1e-12
    for point in ("zero", "halfway", "overshoot"):
        gradient = truth.cross_entropy_gradient(point)
        assert gradient @ (problem.theta(point) - best) > 0.0
        assert np.linalg.norm(gradient - truth.gradient(point)) > 1e-3 * (
            np.linalg.norm(gradient)
        )


@pytest.mark.parametrize("spec", [*LINEAR, "gaussian_tilt", "ddpm_chain"])
def test_the_chain_tends_to_continuous_time_at_order_one(spec):
    truth = registry.problem(spec).truth
    exact = truth.cross_entropy_gradient("halfway")
    coarse, fine = (
        np.linalg.norm(truth.cross_entropy_gradient("halfway", n) - exact)
        for n in (256, 512)
    )
    assert np.log2(coarse / fine) == pytest.approx(1.0, abs=0.07)


@pytest.mark.parametrize("name", ["cubic_costate", "stochastic_pendulum"])
def test_where_it_is_not_exact_it_says_so(name):
    truth = registry.problem(name).truth
    for n_steps in (None, 4):
        with pytest.raises(NotExactError):
            truth.cross_entropy_gradient("zero", n_steps)
        assert truth.answer("cross_entropy_gradient", "zero", n_steps) is None
