"""CMCD and NETS: exact fields, gradients of the losses, weights that stay unbiased."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from _log_weights import (
    is_quadratic,
    log_mean,
    quadratic,
    quadratic_form,
    view_at,
)
from _replicates import make_rows, make_settings

from sdebench import registry
from sdebench.errors import NumericalError, ParameterError, UnknownNameError
from sdebench.estimators import cmcd, nets
from sdebench.estimators._escort import EscortedTerms, EscortedWeights, Half
from sdebench.measure import measure
from sdebench.measure.cell import make_request, refusal
from sdebench.measure.workers import _LENT as LENT
from sdebench.measure.workers import GRID_SHIFT, BlockRunner, CompositeWorker

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIGMAS = 4.5
"""Standard errors; three dozen comparisons fail by chance with 3e-4."""
GAUSSIAN = (
    "gaussian_tilt:mean=0.4,rate=3.0",
    "gaussian_tilt:dim=2,mean=0.7,slope=0.5,rate=4.0",
    "gaussian_tilt:schedule=linear_flow,start_time=0.2",
)


def grid(problem, n_steps, power=1.3):
    """A grid that is not uniform: mixing up steps would show."""
    start, end = problem.time_span
    return problem.time_grid(
        start + (end - start) * np.linspace(0, 1, n_steps + 1) ** power
    )


def some_field(n_steps, dim, seed=2, size=0.1):
    return size * np.random.default_rng(seed).standard_normal((n_steps, 2, dim))


@pytest.fixture
def runner():
    """A maker of runners of one block, which live as long as the test."""
    workers = []

    def make(problem, n_steps, n_paths, backend="numba"):
        estimator = registry.estimator("nets")
        settings = make_settings(
            problem, point="zero", n_steps=n_steps, n_paths=n_paths, backend=backend
        )
        worker = CompositeWorker(problem, [estimator], settings)
        workers.append(worker)
        LENT[id(worker)] = worker._simulations
        return BlockRunner(id(worker), 0, n_steps << GRID_SHIFT, n_paths)

    return make


# ---- the exact field on Gaussian problems --------------------------------------------
def annealed_law(problem, share):
    """Mean and variance of rho at a share of the time, quadratic annealing."""
    start, end = problem.time_span
    schedule = problem.family.base.schedule
    t = start + share * (end - start)
    alpha, noise = schedule.alpha(t), schedule.variance(t)
    q, level = alpha**2 * problem.variance + noise, share**2
    precision = 1.0 / q + level * problem.curvature
    mean = alpha * problem.mean / q + level * problem.slope
    return mean / precision, 1.0 / precision


def transport(problem, share, step=1e-4):
    """a and b of w(x) = m' + C'/(2C) (x - m) - v(x), per share of the time."""
    laws = [annealed_law(problem, share + k * step) for k in (-2, -1, 1, 2)]
    mean_slope, slope = (
        (8.0 * (c - b) - (d - a)) / (12.0 * step)
        for a, b, c, d in zip(*laws, strict=True)
    )
    start, end = problem.time_span
    schedule = problem.family.base.schedule
    t, length = start + share * (end - start), end - start
    alpha = schedule.alpha(t)
    q = alpha**2 * problem.variance + schedule.variance(t)
    kappa, eta = length * schedule.kappa(t), length * schedule.eta(t)
    mean, variance = annealed_law(problem, share)
    bend = 0.5 * slope / variance
    return mean_slope - bend * mean - eta * alpha * problem.mean / q, bend - (
        kappa - eta / q
    )


@pytest.mark.parametrize("spec", GAUSSIAN)
def test_nets_finds_the_transport_exactly(spec, runner):
    """At every step, for any law of the paths: the second round changes nothing."""
    problem, n_steps = registry.problem(spec), 12
    exact = np.array([transport(problem, n / n_steps) for n in range(1, n_steps)])
    assert np.max(np.abs(exact)) > 0.3
    for rounds in (1, 2):
        estimator = registry.estimator("nets", rounds=rounds)
        block = runner(problem, n_steps, 60)
        fields, _ = estimator.fitted(block, Half(0, block.noise()))
        for i in range(problem.dim):
            mine = n_steps * fields[1:, :, i]
            np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "loss", ["log_variance", pytest.param("kl", marks=pytest.mark.slow)]
)
def test_cmcd_tends_to_the_transport(loss, runner):
    """Its error falls like the step, and the weights' variance with it."""
    problem = registry.problem(GAUSSIAN[0])
    estimator = registry.estimator("cmcd", loss=loss, degree=3, rounds=4)
    errors, spread = [], []
    for n_steps in (16, 64, 256):
        block = runner(problem, n_steps, 2000)
        fields = estimator.fit(block, Half(0, block.noise()))
        middle = (np.arange(n_steps) + 0.5) / n_steps
        exact = np.array([transport(problem, share) for share in middle])
        gap = n_steps * fields[:, :, 0] - exact
        errors.append(np.sqrt(np.mean(gap**2)))
        spread.append(estimator.run(block)[0].var())
    plain = make_rows(
        problem,
        registry.estimator("crooks"),
        make_settings(problem, n_steps=256, n_paths=2000),
    )[0, 0].var()
    assert np.sqrt(np.mean(exact**2)) > 0.2
    assert spread[0] > 3.0 * spread[1] > 6.0 * spread[2]
    assert spread[2] < 0.25 * plain
    if loss == "log_variance":  # the other one's noise does not fall with the step
        assert errors[0] > 2.0 * errors[1] > 4.0 * errors[2]
        assert errors[2] < 0.03


# ---- weights under any field ---------------------------------------------------------
@pytest.mark.parametrize("n_steps", [1, 2, 6])
@pytest.mark.parametrize("spec", GAUSSIAN)
def test_weights_are_unbiased_under_any_field(spec, n_steps):
    """By a determinant, against log Z of continuous time; no sampling."""
    problem = registry.problem(spec)
    times, exact = grid(problem, n_steps), problem.truth.log_normalizer()
    for size in (0.0, 0.05):
        inner = EscortedWeights(
            fields=some_field(n_steps, problem.dim, size=size),
            profile=np.zeros((0, n_steps)),
        )
        assert is_quadratic(problem, inner, times)
        assert log_mean(*quadratic(problem, inner, times)) == pytest.approx(
            exact, abs=1e-9
        )


def test_without_a_field_the_weights_are_those_of_crooks():
    problem = registry.problem("four_modes")
    settings = make_settings(problem, n_steps=7, n_paths=64)
    inner = EscortedWeights(fields=np.zeros((7, 2, 2)), profile=np.zeros((0, 7)))
    mine = make_rows(problem, inner, settings)
    crooks = make_rows(problem, registry.estimator("crooks"), settings)
    np.testing.assert_allclose(mine, crooks, rtol=0, atol=1e-12)


def path_densities(problem, times, states, fields):
    """sum log F_n and sum log B_n of states (N + 1, n), one dimension, by hand."""
    schedule, n_steps = problem.family.base.schedule, len(times) - 1
    forward = backward = 0.0
    level = (np.arange(n_steps + 1) / n_steps) ** 2
    for n, (s, t) in enumerate(itertools.pairwise(times)):
        x, y = states[n], states[n + 1]
        h, g2 = t - s, 2.0 * (t - s) * schedule.eta(s)
        drift = problem.drift(x[:, None], s)[:, 0]
        slope_x, slope_y = (problem.slope - problem.curvature * z for z in (x, y))
        shift = fields[n, 0, 0] + fields[n, 1, 0] * x
        mean = x + h * drift + 0.5 * g2 * level[n] * slope_x + shift
        forward = forward - 0.5 * ((y - mean) ** 2 / g2 + np.log(2 * np.pi * g2))
        a = schedule.alpha(s) / schedule.alpha(t)
        b = schedule.variance(s) - a**2 * schedule.variance(t)
        shift = fields[n, 0, 0] + fields[n, 1, 0] * y
        mean = a * y + 0.5 * b * level[n + 1] * slope_y - shift
        backward = backward - 0.5 * ((x - mean) ** 2 / b + np.log(2 * np.pi * b))
    return forward, backward


def fields_of(coefficients, profile):
    """(N, 2, 1) from coefficients (J, 2), as `cmcd` orders them."""
    return np.einsum("jn,jk->nk", profile, coefficients.reshape(-1, 2))[:, :, None]


def states_of(problem, times, points, fields):
    """States (N + 1, n) of paths with given normals under a field."""
    count = len(points)
    view = view_at(problem, times, points)
    schedule, n_steps = problem.family.base.schedule, len(times) - 1
    x = view.start()[:, 0].numpy()
    states = [x]
    for n in range(n_steps):
        h = times[n + 1] - times[n]
        g2 = 2.0 * h * schedule.eta(times[n])
        push = 0.5 * g2 * (n / n_steps) ** 2 * (problem.slope - problem.curvature * x)
        move = fields[n, 0, 0] + fields[n, 1, 0] * x
        drift = problem.drift(x.reshape(count, 1), times[n])[:, 0]
        x = x + h * drift + push + move + np.sqrt(g2) * points[:, n + 1]
        states.append(x)
    return np.array(states)


N_STEPS, DEGREE = 3, 1


class Case:
    """A Gaussian problem, a grid and coefficients off the optimum."""

    problem = registry.problem("gaussian_tilt", mean=0.4, rate=3.0)
    times = grid(problem, N_STEPS)
    profile = cmcd.profiles(DEGREE, N_STEPS)
    theta = np.array([0.4, -0.3, 0.2, 0.1])

    def rows(self, points):
        inner = EscortedWeights(
            fields=fields_of(self.theta, self.profile), profile=self.profile
        )
        view = view_at(self.problem, self.times, points)
        return inner.statistics(view).numpy()

    def log_weight(self, points, theta, moved):
        """log W of the field ``theta`` on states of the field ``moved``, by hand."""
        fields, own = (fields_of(value, self.profile) for value in (theta, moved))
        states = states_of(self.problem, self.times, points, own)
        parts = path_densities(self.problem, self.times, states, fields)
        view = view_at(self.problem, self.times, points)
        first, last = (torch.tensor(states[n][:, None]) for n in (0, -1))
        ends = view.base_log_density(N_STEPS, last) + view.reward(last)
        ends = ends - view.base_log_density(0, first)
        return ends.numpy() + parts[1] - parts[0]


@pytest.fixture(scope="module")
def case():
    return Case()


def test_scores_are_derivatives_of_the_path_densities(case):
    """Central differences, exact for quadratics, with the states held fixed."""
    points = np.random.default_rng(5).standard_normal((6, N_STEPS + 1))
    rows, own = case.rows(points), fields_of(case.theta, case.profile)
    states = states_of(case.problem, case.times, points, own)
    np.testing.assert_allclose(
        rows[:, 0], case.log_weight(points, case.theta, case.theta), atol=1e-10
    )
    for p, direction in enumerate(np.eye(4)):
        up, down = (
            path_densities(
                case.problem,
                case.times,
                states,
                fields_of(case.theta + sign * direction, case.profile),
            )
            for sign in (1.0, -1.0)
        )
        for kind in (0, 1):
            slope = 0.5 * (up[kind] - down[kind])
            np.testing.assert_allclose(rows[:, 1 + 4 * kind + p], slope, atol=1e-9)


def exact_gradients(case):
    """Gradients of the two losses on a Gaussian problem, from quadratic forms."""
    size, step = N_STEPS + 1, 1e-4

    def form(theta, moved):
        def function(points):
            return -case.log_weight(points, theta, moved)

        return quadratic_form(function, size)

    def mean(theta):  # of the loss on its own paths
        A, _, c = form(theta, theta)
        return c + 0.5 * np.trace(A)

    def half_variance(theta):  # with the states of case.theta
        A, b, _ = form(theta, case.theta)
        return 0.5 * (b @ b + 0.5 * np.sum(A * A))

    def slopes(loss):
        return np.array(
            [
                (loss(case.theta + step * e) - loss(case.theta - step * e)) / (2 * step)
                for e in np.eye(4)
            ]
        )

    return {"kl": slopes(mean), "log_variance": slopes(half_variance)}


def expected_gradients(case):
    """Expectations of what `loss_gradient` averages, from quadratic forms as well."""
    size = N_STEPS + 1
    forms = [
        quadratic_form(lambda points, k=k: case.rows(points)[:, k], size)
        for k in range(9)
    ]

    def covariance(f, g):
        return f[1] @ g[1] + 0.5 * np.sum(f[0] * g[0])

    def mean(f):
        return f[2] + 0.5 * np.trace(f[0])

    ratio, forward, backward = forms[0], forms[1:5], forms[5:]
    pairs = list(zip(forward, backward, strict=True))
    return {
        "kl": np.array([-covariance(ratio, f) + mean(f) - mean(b) for f, b in pairs]),
        "log_variance": np.array(
            [-covariance(ratio, f) + covariance(ratio, b) for f, b in pairs]
        ),
    }


def test_gradients_of_the_losses_are_exact(case):
    """Derivatives of E l and of 1/2 Var l against the expectations of the estimates."""
    exact, mine = exact_gradients(case), expected_gradients(case)
    for loss in cmcd.LOSSES:
        assert np.min(np.abs(exact[loss])) > 0.01
        np.testing.assert_allclose(mine[loss], exact[loss], rtol=1e-6, atol=1e-7)
    assert np.max(np.abs(exact["kl"] - exact["log_variance"])) > 0.05


def test_gradients_from_paths_are_unbiased(case):
    """Batches of few paths, where n for n - 1 would show."""
    exact, count = exact_gradients(case), 8
    points = np.random.default_rng(6).standard_normal((count * 20_000, N_STEPS + 1))
    rows = case.rows(points).T.reshape(9, -1, count).swapaxes(0, 1)
    for loss in cmcd.LOSSES:
        found = np.array([cmcd.loss_gradient(loss, batch)[0] for batch in rows])
        error = found.std(axis=0) / np.sqrt(len(found))
        gap = np.abs(found.mean(axis=0) - exact[loss])
        assert np.all(gap < SIGMAS * error), loss
        shrunk = np.abs(exact[loss]) / count
        assert np.max(shrunk / error) > 2.0 * SIGMAS, loss


# ---- the continuity equation ---------------------------------------------------
def test_free_energy_is_log_z_with_exact_integration():
    """Gauss-Legendre in time over fitted F', any states: no error but rounding."""
    problem = registry.problem("gaussian_tilt", mean=0.4)
    start, end = problem.time_span
    schedule = problem.family.base.schedule
    nodes, weights = np.polynomial.legendre.leggauss(40)
    x = np.random.default_rng(7).uniform(-3.0, 3.0, (1, 12))
    total = 0.0
    for share, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
        t, level, rate = start + share * (end - start), share**2, 2.0 * share
        alpha = schedule.alpha(t)
        q = alpha**2 * problem.variance + schedule.variance(t)
        score = -(x - alpha * problem.mean) / q
        velocity = schedule.kappa(t) * x + schedule.eta(t) * score
        slope = problem.slope - problem.curvature * x
        work = (
            rate * problem.reward(x.T) + (end - start) * level * (velocity * slope)[0]
        )
        a, b, energy, residual = nets.fit_continuity(x, score + level * slope, work)
        assert np.max(np.abs(residual)) < 1e-10
        np.testing.assert_allclose([a[0], b[0]], transport(problem, share), atol=1e-7)
        total += weight * energy
    assert total == pytest.approx(problem.truth.log_normalizer(), abs=1e-10)


@pytest.mark.parametrize("spec", GAUSSIAN)
def test_free_energy_has_no_variance_on_gaussian_problems(spec):
    """Regression against a recursion; and of first order in the step."""
    problem, estimator = registry.problem(spec), registry.estimator("nets")
    exact, gaps = problem.truth.log_normalizer(), []
    for n_steps in (8, 64, 128):
        settings = make_settings(problem, n_steps=n_steps, n_paths=64)
        settings = dataclasses.replace(settings, times=grid(problem, n_steps))
        found = make_rows(problem, estimator, settings, 2)
        target = estimator.target(problem.truth.policy_chain("zero", settings.times))
        np.testing.assert_allclose(found, target[0], rtol=0, atol=1e-9)
        gaps.append(target[0] - exact)
    assert gaps[1] / gaps[2] == pytest.approx(2.0, abs=0.15)


def test_terms_are_those_of_the_continuity_equation():
    """Score and work at the states, against the densities of the view."""
    problem = registry.problem("four_modes")
    n_steps, count = 4, 5
    times = grid(problem, n_steps)
    points = np.random.default_rng(8).standard_normal((count, 2 * (n_steps + 1)))
    view = view_at(problem, times, points)
    rows = EscortedTerms(fields=some_field(n_steps, 2)).statistics(view)
    schedule = problem.family.base.schedule
    for n, part in enumerate(rows.reshape(count, n_steps, 5).unbind(1)):
        x, score, work = part[:, :2], part[:, 2:4], part[:, 4]
        level, rate = (n / n_steps) ** 2, 2.0 * n / n_steps**2
        slope, own = view.reward_gradient(x), view.base_score(n, x)
        torch.testing.assert_close(score, own + level * slope, rtol=1e-9, atol=1e-9)
        t, h = times[n], times[n + 1] - times[n]
        flow = float(schedule.kappa(t)) * x + float(schedule.eta(t)) * own
        expected = rate * view.reward(x) + h * level * (flow * slope).sum(1)
        torch.testing.assert_close(work, expected, rtol=1e-9, atol=1e-9)


# ---- cross-fitting ---------------------------------------------------------------
class SameHalf(cmcd.ControlledMonteCarloDiffusion):
    """Fits the field on the very paths that it weighs: wrong."""

    def cross_fitted(self, runner):
        parts = []
        for mine in self.halves(runner):
            inner = EscortedWeights(
                fields=self.fit(runner, mine), profile=np.zeros((0, runner.n_steps))
            )
            parts.append(mine.run(runner, inner))
        return np.concatenate(parts, axis=1)


def mean_weight(problem, estimator, n_steps, n_paths, n_replicates):
    """Mean of W / Z over replicates, and its standard error."""
    settings = make_settings(problem, n_steps=n_steps, n_paths=n_paths)
    rows = make_rows(problem, estimator, settings, n_replicates)[:, 0]
    weights = np.exp(rows - problem.truth.log_normalizer()).mean(axis=1)
    return weights.mean(), weights.std(ddof=1) / np.sqrt(n_replicates)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cmcd", {"degree": 1}),
        ("cmcd", {"degree": 0, "loss": "kl"}),
        ("nets", {"estimate": "weights"}),
    ],
)
def test_cross_fitted_weights_are_unbiased_with_few_paths(name, options):
    problem = registry.problem("gaussian_tilt", mean=0.4, rate=3.0)
    estimator = registry.estimator(name, **options)
    mean, error = mean_weight(problem, estimator, 10, 48, 400)
    assert error < 0.02
    assert abs(mean - 1.0) < SIGMAS * error


def test_weighing_the_paths_that_fitted_the_field_is_biased():
    problem = registry.problem("gaussian_tilt", mean=0.4, rate=3.0)
    for kind, wrong in ((SameHalf, True), (cmcd.ControlledMonteCarloDiffusion, False)):
        mean, error = mean_weight(problem, kind(degree=3), 10, 32, 600)
        assert (abs(mean - 1.0) > 2.0 * SIGMAS * error) == wrong
        assert (abs(mean - 1.0) > SIGMAS * error) == wrong


def test_measured_on_mixtures():
    """The weights are unbiased against log Z; the fitted free energy is not."""
    settings = {"n_steps": 24, "n_paths": 512, "n_replicates": 64, "seed": 4}
    for spec in ("cmcd", "nets:estimate=weights"):
        row = measure("four_modes", spec, **settings).row
        assert row["truth_discrete"] == row["target"] == row["truth"]
        bias = row["mean"][0] - row["truth"][0]
        logarithm = -0.5 * row["variance"] / row["n_paths"]
        assert row["std_error"][0] < 0.01
        assert abs(bias - logarithm) < SIGMAS * row["std_error"][0]
    row = measure("two_modes:start=marginal", "nets", **settings).row
    assert row["verdict"] == "no exact target"
    assert abs(row["bias"][0]) > 10.0 * row["std_error"][0]


# ---- both backends, refusals -----------------------------------------------------
@pytest.mark.parametrize("spec", ["gaussian_tilt:dim=2", "four_modes"])
def test_backends_agree_path_by_path(spec):
    problem = registry.problem(spec)
    settings = make_settings(problem, n_steps=7, n_paths=200)
    inner = {"fields": some_field(7, 2), "annealing": "cubic"}
    for estimator in (
        EscortedWeights(profile=cmcd.profiles(2, 7), **inner),
        EscortedTerms(**inner),
        registry.estimator("cmcd", degree=1, annealing="linear"),
        registry.estimator("nets", estimate="weights"),
    ):
        mine = make_rows(problem, estimator, settings, 2)
        other = dataclasses.replace(settings, backend="torch")
        theirs = make_rows(problem, estimator, other, 2)
        scale = np.max(np.abs(theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("name", ["cmcd", "nets"])
@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("two_modes", "X_0 has another law"),
        ("ou_linear", "denoised prediction"),
        ("gaussian_tilt:noise=constant", "memoryless denoising"),
        ("gaussian_tilt:curvature=-1.9,schedule=ve,rate=2.0", "is not integrable at"),
    ],
)
def test_refusals(name, spec, part):
    request = make_request(registry.problem(spec), n_steps=10, n_paths=4096)
    assert part in refusal(request, registry.estimator(name))


def test_too_few_paths_are_refused():
    request = make_request("gaussian_tilt:dim=20", n_steps=10, n_paths=256)
    assert "120 coefficients" in refusal(request, registry.estimator("cmcd"))
    assert "41 coefficients" in refusal(request, registry.estimator("nets"))
    request = make_request("gaussian_tilt", n_steps=10, n_paths=1)
    assert "one half" in refusal(request, registry.estimator("nets"))


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("cmcd:loss=tv", "loss"),
        ("cmcd:degree=-1", "degree"),
        ("cmcd:rounds=0", "rounds"),
        ("nets:estimate=both", "estimate"),
        ("nets:rounds=0", "rounds"),
        ("nets:annealing=sudden", "annealing"),
    ],
)
def test_unknown_options(spec, part):
    with pytest.raises((ParameterError, UnknownNameError), match=part):
        registry.estimator(spec)


def test_fields_that_are_not_finite_fail_with_the_reason(monkeypatch):
    bad = np.full((1, 8), np.inf)
    found = nets.fit_continuity(bad, bad, bad[0])
    assert np.all(np.isnan(found[0]))
    monkeypatch.setattr(nets, "fit_continuity", lambda *_: found)
    settings = {"n_steps": 5, "n_paths": 64, "n_replicates": 2}
    with pytest.raises(NumericalError, match="log-weights are NaN"):
        measure("gaussian_tilt", "nets:estimate=weights", **settings)


def test_one_round_moves_the_field_by_a_standard_deviation_at_most(runner):
    """Where few paths would take the field anywhere."""
    problem = registry.problem("four_modes")
    estimator = registry.estimator("cmcd", loss="kl", rounds=1, degree=4)
    block = runner(problem, 20, 60)
    half, profile = Half(0, block.noise()), cmcd.profiles(4, 20)
    inner = EscortedWeights(fields=np.zeros((20, 2, 2)), profile=profile)
    gradient, curvature = cmcd.loss_gradient("kl", half.run(block, inner))
    newton = np.linalg.solve(curvature, gradient)
    assert gradient @ newton > 2.0
    fields = estimator.fit(block, half)
    found = np.linalg.lstsq(profile.T, fields.reshape(20, 4), rcond=None)[0].ravel()
    assert found @ curvature @ found == pytest.approx(cmcd.REACH**2, rel=1e-4)
