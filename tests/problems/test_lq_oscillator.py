"""The linear-quadratic study: its Riccati matrix, and costates at a frozen policy."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import sdebench
from sdebench.closed_form.affine_chain import AffineChain
from sdebench.errors import ParameterError

PROBLEM = sdebench.problem("lq_oscillator")
GAIN = np.array([[0.0, 0.0], [-0.3, -0.7]])
BIAS = np.array([0.0, 0.2])
TIMES = (0.0, 1.3, 4.0)


def test_riccati_matrix_is_the_published_one():
    """Published with 4 digits, from a numerical solution: 3e-4 off the exact one."""
    exact = PROBLEM.model.riccati(0.0).quadratic
    published = [[1.8147, 0.4112], [0.4112, 1.2524]]
    assert np.max(np.abs(exact - published)) < 3e-4
    A, B = PROBLEM.model.drift_matrix, PROBLEM.model.diffusion

    def slope(t, y):
        G = y.reshape(2, 2)
        return (A.T @ G + G @ A - G @ B @ B.T @ G + np.eye(2)).ravel()

    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
    by_ode = solve_ivp(slope, (0.0, 4.0), np.eye(2).ravel(), **options).y[:, -1]
    np.testing.assert_allclose(exact.ravel(), by_ode, rtol=0, atol=1e-10)


def test_frozen_costate_by_an_ode():
    """-S' = A^T S + S (A + sigma K) + F: the base's A on the left."""
    model = PROBLEM.model
    A, closed = model.drift_matrix, model.drift_matrix + model.diffusion @ GAIN
    drift = model.diffusion @ BIAS

    def slope(t, y):
        S, s = y[:4].reshape(2, 2), y[4:]
        dS = A.T @ S + S @ closed + model.running
        return np.concatenate([dS.ravel(), A.T @ s + S @ drift])

    first = np.concatenate([np.eye(2).ravel(), np.zeros(2)])
    options = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13}
    flow = solve_ivp(slope, (0.0, 4.0), first, dense_output=True, **options).sol
    S, s = model.frozen_costate(GAIN, BIAS, TIMES)
    for k, t in enumerate(TIMES):
        np.testing.assert_allclose(S[k].ravel(), flow(4.0 - t)[:4], atol=1e-9)
        np.testing.assert_allclose(s[k], flow(4.0 - t)[4:], atol=1e-9)
    # transposed, or with the closed loop on both sides, it would be far off
    assert np.max(np.abs(S[0] - S[0].T)) > 0.1


def test_frozen_costate_is_the_limit_of_the_chain():
    def at(count):
        times = np.linspace(0.0, 4.0, count + 1)
        chain = AffineChain.euler_maruyama(PROBLEM.model, times)
        root = np.sqrt(4.0 / count)
        gain, bias = (
            np.tile(root * GAIN, (count, 1, 1)),
            np.tile(root * BIAS, (count, 1)),
        )
        S, s = chain.adjoint(gain, bias, lean=True)
        return np.append(S[0].ravel(), s[0])

    S, s = PROBLEM.model.frozen_costate(GAIN, BIAS, 0.0)
    exact = np.append(S.ravel(), s)
    coarse, fine = at(1000) - exact, at(2000) - exact
    np.testing.assert_allclose(coarse, 2.0 * fine, rtol=0.01, atol=1e-12)
    np.testing.assert_allclose(2.0 * fine - coarse, 0.0, atol=1e-4)


def test_the_control_acts_on_the_velocity_alone():
    tables = PROBLEM.tables(PROBLEM.theta("overshoot") + 0.3, PROBLEM.time_grid(5))
    assert not np.any(tables.gain[:, 0])
    assert np.all(tables.gain[:, 1] != 0.0)
    assert not np.any(tables.feature_gain[:, :, 0])


def test_wrong_parameters_are_refused():
    with pytest.raises(ParameterError, match="noise_level"):
        sdebench.problem("lq_oscillator", noise_level=0.0)
