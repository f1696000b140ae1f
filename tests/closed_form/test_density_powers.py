"""Paths of products of powers: every exact answer by a second route."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from sdebench.closed_form import density_powers as module
from sdebench.closed_form.density_powers import DensityPath
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.errors import ParameterError, UnknownNameError

A = GaussianMixture.isotropic([[-1.5], [1.0]], [0.2, 0.4], [0.3, 0.7])
C = GaussianMixture.isotropic([[-1.2], [1.4]], [0.3, 0.3], [0.6, 0.4])
NODES = np.linspace(-8.0, 8.0, 401)
PATHS = {
    "annealing": DensityPath([A], [0.5]),
    "square": DensityPath([A], [2.0]),
    "product": DensityPath([A, C], [1.0, 1.0]),
    "guidance": DensityPath([A, C], [2.0, -1.0]),
    "moving powers": DensityPath([A, C], [[1.0, 0.0], [0.6, 0.8]], rate=3.0),
    "knots": DensityPath([A], [[1.0], [0.7], [1.5]], [0.0, 0.4, 1.0], rate=2.0),
}
SMOOTH = {
    "annealing": PATHS["annealing"],
    "slow guidance": DensityPath([A, C], [2.0, -1.0], rate=2.0),
    "knots": PATHS["knots"],
}


def log_mass(path, t):
    return module.quadrature_moments(path, t, NODES).log_mass


# ---- the formula -------------------------------------------------------------------
@pytest.mark.parametrize("name", PATHS)
def test_the_mean_work_rate_is_the_slope_of_log_z(name):
    """d/dt log int rho_t = E_rho[dA/dt]: no simulation, exact at every time."""
    path, step = PATHS[name], 1e-5
    for t in (0.25, 0.7, 0.93):
        here = path.at(NODES[:, None], t)
        shares = np.exp(here.log_density - logsumexp(here.log_density))
        rate = path.work_rate(here) + path.rates_at(t) @ here.logs
        slope = (log_mass(path, t + step) - log_mass(path, t - step)) / (2.0 * step)
        assert shares @ rate == pytest.approx(slope, abs=2e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("n_steps", [1, 4, 11])
def test_kernel_ratios_have_the_exact_mean_at_any_number_of_steps(name, n_steps):
    path = PATHS[name]
    right = module.quadrature_moments(path, 1.0, NODES)
    found = module.weighted_ends(path, n_steps, "kernel_ratio", 1.0, NODES)
    assert found.log_mass == pytest.approx(right.log_mass, abs=1e-9)
    assert found.second == pytest.approx(right.second, abs=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_riemann_sums_are_off_by_the_order_of_a_step(name):
    path = SMOOTH[name]
    errors = [
        module.weighted_ends(path, n, "riemann", 1.0, NODES[::2]).log_mass
        - log_mass(path, 1.0)
        for n in (80, 160)
    ]
    assert 1e-4 < abs(errors[1]) < 0.02
    # halves, up to the next order
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.6)


# ---- answers by two routes -----------------------------------------------------------
@pytest.mark.parametrize(("name", "factors"), [("square", [A, A]), ("product", [A, C])])
def test_whole_powers_are_mixtures(name, factors):
    law = module.product(factors)
    found = module.quadrature_moments(PATHS[name], 1.0, NODES)
    assert law.log_mass() == pytest.approx(found.log_mass, abs=1e-12)
    second = law.weights @ (law.covariances.ravel() + law.means[:, 0] ** 2)
    assert second == pytest.approx(found.second, abs=1e-12)


@pytest.mark.parametrize("t", [0.2, 0.8, 1.0])
def test_guided_gaussians_in_closed_form(t):
    one = GaussianMixture.normal([0.7], 0.3)
    zero = GaussianMixture.normal([-0.4], 0.9)
    for powers in ([2.5, -1.5], [0.4, 0.3]):
        path = DensityPath([one, zero], powers, rate=2.0)
        found = module.gaussian_moments(path, t)
        right = module.quadrature_moments(path, t, np.linspace(-25.0, 25.0, 4001))
        np.testing.assert_allclose(found, right, rtol=1e-10)


def test_dimensions_multiply():
    """Isotropic factors that split: rates and logs add up over the coordinates."""
    wide = GaussianMixture.normal([0.7, -0.2], 0.3), GaussianMixture.normal([0, 1], 0.8)
    x, t = np.random.default_rng(0).standard_normal((5, 2)), 0.6
    path = DensityPath(wide, [2.0, -1.0], rate=2.0)
    here, y = path.at(x, t), x + 0.1
    parts = [
        DensityPath(
            [
                GaussianMixture.normal(f.means[0, i : i + 1], f.covariances[0])
                for f in wide
            ],
            [2.0, -1.0],
            rate=2.0,
        )
        for i in range(2)
    ]
    for value in (
        lambda p, s: p.at(s(x), t).log_density,
        lambda p, s: p.work_rate(p.at(s(x), t)),
        lambda p, s: p.log_kernel_ratio(
            s(x), s(y), p.at(s(x), t), p.at(s(y), 0.7), 0.1
        ),
        lambda p, s: p.log_start_weight(s(x)),
        lambda p, s: module.log_start_ratio(p, s(x)),
    ):
        whole = value(path, lambda z: z)
        split = [value(p, lambda z, i=i: z[:, i : i + 1]) for i, p in enumerate(parts)]
        np.testing.assert_allclose(whole, sum(split), rtol=1e-11)
    assert here.score.shape == (5, 2)
    whole, one = (
        module.gaussian_moments(path, 1.0),
        module.gaussian_moments(parts[0], 1),
    )
    other = module.gaussian_moments(parts[1], 1.0)
    assert whole.log_mass == pytest.approx(one.log_mass + other.log_mass)
    assert whole.second == pytest.approx(0.5 * (one.second + other.second))


@pytest.mark.parametrize("power", [0.4, 1.0, 1.7])
def test_the_factor_of_the_wrong_start_by_quadrature(power):
    path = DensityPath([A], [power], rate=0.8)
    z, mass = np.polynomial.hermite_e.hermegauss(150)
    x, alpha = np.array([[-1.0], [0.3], [2.0]]), path.alpha(0.0)
    before = alpha * x + np.sqrt(1.0 - alpha**2) * z
    ratio = np.exp(0.5 * before**2 * (power - 1.0)) / np.sqrt(power)
    right = ratio @ (mass / mass.sum())
    np.testing.assert_allclose(
        np.exp(module.log_start_ratio(path, x)), right, rtol=1e-8
    )


def test_the_wrong_start_agrees_with_the_chain():
    path = DensityPath([A], [0.5], rate=2.0)
    found = module.weighted_ends(path, 8, "kernel_ratio", 1.0, NODES, "standard")
    x = NODES[:, None]
    logs = path.at(x, 1.0).log_density + module.log_start_ratio(path, x)
    right = float(logsumexp(logs) + np.log(NODES[1] - NODES[0]))
    assert found.log_mass == pytest.approx(right, abs=1e-9)
    assert abs(found.log_mass - log_mass(path, 1.0)) > 0.1


def test_an_infinite_factor():
    path = DensityPath([A], [3.0], rate=8.0)
    assert np.all(np.isinf(module.log_start_ratio(path, np.zeros((2, 1)))))


# ---- which moments are finite -------------------------------------------------------
@pytest.mark.parametrize("weights", module.WEIGHTS)
@pytest.mark.parametrize("name", PATHS)
def test_a_moment_is_finite_where_a_wider_grid_changes_nothing(name, weights):
    path = PATHS[name]
    small, large = np.linspace(-8.0, 8.0, 161), np.linspace(-16.0, 16.0, 321)
    for n_steps, order in ((4, 1.0), (4, 2.0), (12, 2.0)):
        args = path, n_steps, weights, order
        few, many = (module.weighted_ends(*args, x).log_mass for x in (small, large))
        if module.finite_weight_moment(*args):
            assert abs(many - few) < 0.05
        else:
            assert many > few + 2.0


def test_twice_annealed_weights_have_no_variance():
    for name in ("square", "product"):
        for weights in module.WEIGHTS:
            args = PATHS[name], 100, weights
            assert module.finite_weight_moment(*args, 1.0)
            assert not module.finite_weight_moment(*args, 2.0)
    assert module.finite_weight_moment(PATHS["guidance"], 100, "riemann", 2.0)


# ---- refusals -----------------------------------------------------------------------
def test_a_density_that_stops_being_integrable_is_refused_with_the_time():
    """5/v(.4) - 4/v(.3) with v(c) = 1 + alpha^2 (c - 1) vanishes at a known time."""
    square = 1.0 / (5.0 * 0.7 - 4.0 * 0.6)  # 5 (1 - .7 a) = 4 (1 - .6 a), a = alpha^2
    time = 1.0 + np.log(square) / 8.0
    with pytest.raises(ParameterError, match=f"not integrable from t = {time:.4g} on"):
        DensityPath([A, C], [5.0, -4.0])
    assert DensityPath([A, C], [3.9, -2.9]).tail_precision(1.0) > 0.0
    with pytest.raises(ParameterError, match="from t = 0 on"):
        DensityPath([A], [-1.0])


@pytest.mark.parametrize(
    ("powers", "times", "reason"),
    [
        ([[1.0], [1.5], [2.0], [3.0]], [0.0, 0.5, 0.5, 1.0], r"jumps at t = 0\.5"),
        ([[1.0], [1.5], [2.0]], [0.0, 0.6, 0.5], "increase from 0 to 1"),
        ([[1.0], [2.0]], [0.0, 0.9], "increase from 0 to 1"),
        ([[1.0], [np.nan]], [0.0, 1.0], "must be finite"),
        ([1.0, 2.0], [0.0, 1.0], "one for each of 1 densities at each of 2 times"),
    ],
)
def test_paths_that_are_not_absolutely_continuous_are_refused(powers, times, reason):
    with pytest.raises(ParameterError, match=reason):
        DensityPath([A], powers, times)


def test_other_bad_input():
    full = GaussianMixture.normal([0.0, 0.0], np.diag([1.0, 2.0]))
    for factors in ([full], [A, GaussianMixture.normal([0.0, 0.0], 1.0)]):
        with pytest.raises(ParameterError, match="isotropic components of one"):
            DensityPath(factors, np.ones(len(factors)))
    with pytest.raises(ParameterError, match="rate -1"):
        DensityPath([A], [1.0], rate=-1.0)
    with pytest.raises(UnknownNameError, match="unknown start 'wrong'"):
        PATHS["square"].start_scale("wrong")
    with pytest.raises(UnknownNameError, match="unknown weights 'left'"):
        module.weighted_ends(PATHS["square"], 2, "left", 1.0, NODES)
