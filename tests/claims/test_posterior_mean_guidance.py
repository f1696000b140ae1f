"""Guidance by the posterior mean: its control, its closed form, and the decision."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from sdebench import claims
from sdebench.claims import posterior_mean_guidance as module

CLAIM = claims.claim("posterior_mean_guidance")
SETTINGS = {setting.name: setting for setting in module.settings()}
GAUSSIAN = [s for s in SETTINGS.values() if s.moment == "variance"]
MODES = [s for s in SETTINGS.values() if "mode" in s.moment]
X = np.linspace(-4.0, 4.0, 9)[:, None]


def named(settings):
    return pytest.mark.parametrize("setting", settings, ids=lambda s: s.name)


@named(GAUSSIAN)
@pytest.mark.parametrize("t", [0.0, 0.5, 0.9])
def test_guidance_is_too_strong_by_one_plus_k_s(setting, t):
    problem = setting.problem
    k, schedule = problem.theta_star[1], problem.family.base.schedule
    posterior = 1.0 / (1.0 + schedule.alpha(t) ** 2 / schedule.variance(t))
    best = problem.truth.control(X, t)
    guided = module.guidance(problem, X, t)
    np.testing.assert_allclose(guided, (1.0 + k * posterior) * best, rtol=1e-12)


def test_a_linear_reward_is_guided_optimally():
    problem = SETTINGS["one mode, r = x"].problem
    for t in (0.1, 0.8):
        best = problem.truth.control(X, t)
        np.testing.assert_allclose(module.guidance(problem, X, t), best, rtol=1e-12)


@named(MODES)
def test_guidance_of_a_mixture_is_the_derivative(setting):
    """sigma d/dx r(D_t(x)), the denoiser by quadrature over the data."""
    problem, t = setting.problem, 0.6
    schedule = problem.family.base.schedule
    alpha, variance = schedule.alpha(t), schedule.variance(t)
    data = problem.truth.base_marginal(1.0)

    def denoised(x):
        def part(power):
            def integrand(y):
                density = np.exp(data.log_density([[y]])[0])
                return (
                    y**power * density * np.exp(-0.5 * (x - alpha * y) ** 2 / variance)
                )

            return quad(integrand, -12.0, 12.0, points=[-3.0, 3.0], epsabs=1e-13)[0]

        return part(1) / part(0)

    def reward(x):
        return float(problem.reward([[denoised(x)]])[0])

    step = 1e-3
    for x in (-1.0, 0.2, 1.5):
        slope = (reward(x + step) - reward(x - step)) / (2.0 * step)
        found = module.guidance(problem, np.array([[x]]), t)[0, 0]
        assert found == pytest.approx(problem.family.base.sigma(t) * slope, rel=1e-4)


@named(GAUSSIAN)
def test_the_closed_form_by_the_equation_of_the_variance(setting):
    """dv = (2 a v + sigma^2) dt with the drift a x, from the law at time 0."""
    problem = setting.problem
    one = np.ones((1, 1))

    def slope(t, v):
        sigma = problem.family.base.sigma(t)
        a = problem.drift(one, t) + sigma * module.guidance(problem, one, t)
        return 2.0 * a[0, 0] * v + sigma**2

    # The start is independent of the end up to alpha_0^2 = 3e-4.
    found = solve_ivp(slope, (0.0, 1.0 - 1e-9), [1.0], rtol=1e-10, atol=1e-12).y[0, -1]
    exact = module.guided_variance(problem.theta_star[1])
    assert found == pytest.approx(exact, rel=2e-3)


def test_the_distance_from_the_optimum_of_one_mode():
    setting = SETTINGS["one mode, r = −1 x²/2"]
    schedule = setting.problem.family.base.schedule
    posterior = [
        1.0 / (1.0 + schedule.alpha(t) ** 2 / schedule.variance(t))
        for t in module.TIMES
    ]
    np.testing.assert_allclose(module.excess(setting.problem), posterior, rtol=1e-8)


@named(SETTINGS.values())
def test_numbers_of_the_tilted_law(setting):
    """By sampling it: a z-test at 1e-5 each."""
    law = setting.problem.truth.ideal_law()
    x = law.sample(np.random.default_rng(1), 400_000)[:, 0]
    values = setting.values(x)
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean() - setting.tilted()) < 4.42 * error


@pytest.mark.slow
def test_a_small_experiment(monkeypatch):
    """The closed form inside all intervals; guidance as good as u* is supported."""
    monkeypatch.setattr(module, "BLOCK", 1 << 13)
    monkeypatch.setattr(module, "N_BLOCKS", 1)
    monkeypatch.setattr(module, "N_PATHS", 1 << 13)
    evidence = CLAIM.experiment(3, lambda done, total: None)
    exact = evidence["closed_form"].notna()
    assert exact.sum() == 4
    inside = evidence["low"].le(evidence["closed_form"] + 0.3)
    inside &= evidence["high"].ge(evidence["closed_form"] - 0.3)
    assert inside[exact].all()
    assert CLAIM.decide(evidence).verdict == "refuted"
    assert all(axes.has_data() for axes in CLAIM.figure(evidence).axes)
    right = evidence.assign(value=100.0, low=99.0, high=101.0)
    assert CLAIM.decide(right).verdict == "supported"
    assert CLAIM.decide(right.assign(high=110.0)).verdict == "undecided"
