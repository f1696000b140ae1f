"""The linear-Gaussian denoising chain: published numbers and its default steps."""

import numpy as np
import pytest

import sdebench
from sdebench.errors import ParameterError


def test_gradient_in_the_factor():
    """Of E x_0^2 with 4 steps, factor 0.9, sigma 0.7 and start 1.2: 9.557."""
    problem = sdebench.problem("ddpm_chain")
    in_state = problem.truth.reward_only_gradient("zero", 4)
    state = problem.parameter_names.index("state")
    factor = -in_state[state] / problem.noise_level
    assert factor == pytest.approx(9.557, abs=5e-4)
    # by hand: E x_N^2 = a^2N m^2 + s^2 sum a^2k

    def second_moment(a, count=4):
        powers = a ** (2 * np.arange(count))
        return a ** (2 * count) * 1.2**2 + 0.7**2 * powers.sum()

    step = 1e-5
    numeric = (second_moment(0.9 + step) - second_moment(0.9 - step)) / (2 * step)
    assert factor == pytest.approx(numeric, rel=1e-8)


@pytest.mark.parametrize("n_steps", [1, 4, 10])
def test_default_steps_have_length_one(n_steps):
    problem = sdebench.problem("ddpm_chain", n_steps=n_steps, dim=2)
    assert problem.default_steps == n_steps
    np.testing.assert_array_equal(np.diff(problem.time_grid()), 1.0)
    tables = problem.tables(None, problem.time_grid())
    np.testing.assert_allclose(tables.transition[0], 0.9 * np.eye(2), rtol=1e-15)
    np.testing.assert_allclose(tables.noise[0], 0.7 * np.eye(2), rtol=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "n_steps 0"),
        ({"dim": 0}, "dim 0"),
        ({"noise_level": 0.0}, "noise_level"),
        ({"curvature": -5.0}, "curvature"),
    ],
)
def test_wrong_parameters_are_refused(settings, message):
    with pytest.raises(ParameterError, match=message):
        sdebench.problem("ddpm_chain", **settings)
