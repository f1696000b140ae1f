"""The published numbers and equations of `hjb_log` and `manufactured_sine`."""

from __future__ import annotations

import numpy as np
import pytest

import sdebench
from sdebench.errors import NotApplicableError, NotExactError, ParameterError

HJB = sdebench.problem("hjb_log")
SINE = sdebench.problem("manufactured_sine")


def test_the_published_value_at_the_origin():
    """4.59016172 to all digits; the literature's Monte Carlo value is 4.5901."""
    origin = np.zeros((1, 100))
    assert HJB.dim == 100
    assert HJB.truth.value(origin, 0.0)[0] == pytest.approx(4.59016172, abs=5e-9)
    assert HJB.truth.optimal_cost() == pytest.approx(4.59016172, abs=5e-9)
    # a factor of two in sigma^2, or in the control cost, would show
    half = sdebench.problem("hjb_log:horizon=0.5")
    assert abs(half.truth.optimal_cost() - 4.59016172) > 0.1


def test_value_by_plain_simulation_of_the_published_formula():
    """-ln E exp(-g(x + root(2) W_{T - t})); 3 comparisons at 4.9: 3e-6."""
    rng = np.random.default_rng(6)
    x = 0.3 * rng.normal(size=100)
    for t in (0.0, 0.4, 0.9):
        y = x + np.sqrt(2.0 * (1.0 - t)) * rng.normal(size=(40_000, 100))
        h = 2.0 / (1.0 + np.sum(y**2, axis=1))
        exact = np.exp(-HJB.truth.value(x, t))
        assert abs(h.mean() - exact) < 4.9 * h.std() / 200.0


def test_the_published_equation_of_the_sine():
    """y = -V / 2 solves y_t + |grad y|^2 + 1/2 Laplacian y = the same of psi."""
    rng = np.random.default_rng(3)
    x, t, h = rng.normal(size=100), 0.3, 1e-3

    def psi(x, t):
        return np.sin((1.0 - t + x @ x) ** 0.4)

    assert SINE.truth.value(x, t) == pytest.approx(-2.0 * psi(x, t), rel=1e-14)
    in_time = (psi(x, t + h) - psi(x, t - h)) / (2.0 * h)
    slopes = [(psi(x + h * e, t) - psi(x - h * e, t)) / (2 * h) for e in np.eye(100)]
    bends = [psi(x + h * e, t) + psi(x - h * e, t) - 2 * psi(x, t) for e in np.eye(100)]
    slopes = np.array(slopes)
    source = in_time + slopes @ slopes + 0.5 * np.sum(bends) / h**2
    assert SINE.running_cost(x, t) == pytest.approx(2.0 * source, rel=1e-6)
    np.testing.assert_allclose(SINE.truth.control(x, t), 2.0 * slopes, atol=1e-7)


def test_linear_feedback_is_nearly_optimal_for_a_concentrated_norm():
    """The share of the regret that the family leaves falls with the dimension."""
    shares = []
    for dim in (10, 100, 1000):
        truth = sdebench.problem("hjb_log", dim=dim).truth
        left = truth.objective("optimum") - truth.optimal_cost()
        shares.append(left / (truth.objective("zero") - truth.optimal_cost()))
    assert shares[0] > 5.0 * shares[1] > 25.0 * shares[2] > 0.0


@pytest.mark.parametrize("problem", [HJB, SINE], ids=lambda p: p.name)
def test_answers_that_do_not_exist(problem):
    truth = problem.truth
    for call in (
        lambda: truth.optimal_cost(5),
        lambda: truth.control_error("zero", 5),
        lambda: truth.policy_chain("zero", 5),
        lambda: truth.tilted_marginal(0.5),
    ):
        with pytest.raises(NotExactError):
            call()
    with pytest.raises(NotApplicableError, match="probability flow"):
        problem.tables(None, problem.time_grid(2), noisy=np.zeros(2))
    law = truth.base_marginal(0.5)
    wanted = 0.5 * problem.sigma**2 * np.eye(100)
    np.testing.assert_allclose(law.covariance(), wanted, rtol=1e-12)


def test_refusals():
    for spec in (
        "hjb_log:dim=0",
        "hjb_log:horizon=0",
        "manufactured_sine:power=1.5",
        "manufactured_sine:amplitude=0",
        "manufactured_sine:horizon=-1",
    ):
        name = spec.partition(":")[2].partition("=")[0]
        with pytest.raises(ParameterError, match=name):
            sdebench.problem(spec)
