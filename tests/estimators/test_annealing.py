"""Annealed importance sampling and thermodynamic integration: exact invariance."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from _log_weights import log_mean, quadratic, view_at
from _replicates import make_rows, make_settings

from sdebench import registry
from sdebench.errors import ParameterError, UnknownNameError
from sdebench.estimators import _annealing
from sdebench.measure import measure
from sdebench.measure.cell import make_request, refusal

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIGMAS = 4.5
"""Standard errors; two dozen comparisons fail by chance with 2e-4."""
LEVELS = (0.0, 0.1, 0.4, 1.0)
SPECS = ("gaussian_tilt", "gaussian_tilt:noise=constant", "four_modes")


def ais(**options):
    return registry.estimator("annealed_importance_sampling", **options)


def integration(**options):
    return registry.estimator("thermodynamic_integration", **options)


def some_view(spec, n_steps=4, n_paths=40):
    problem = registry.problem(spec)
    points = np.zeros((n_paths, (n_steps + 1) * problem.dim))
    return view_at(problem, problem.time_grid(n_steps), points)


# ---- the moves leave every density of the path invariant --------------------------
@pytest.mark.parametrize("kernel", _annealing.MOVES)
@pytest.mark.parametrize("path", _annealing.PATHS)
@pytest.mark.parametrize("spec", SPECS)
def test_detailed_balance(spec, path, kernel):
    """rho(x) q(x, y) min(1, ratio) is the same from x to y and from y to x.

    At random pairs, with the density of the proposal computed here; not so with half
    of the gradient in the way back, nor with twice of it.
    """
    estimator = ais(path=path, kernel=kernel, levels=LEVELS)
    view, n = some_view(spec), 2
    generator = torch.Generator().manual_seed(3)
    x, y = (
        torch.randn(40, view.dim, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    noise = view.apply_noise(n - 1, torch.ones(1, view.dim, dtype=torch.float64))
    s = estimator.step * 2.0 * float(noise[0, 0])

    def flow(a, b, factor=1.0):
        """log rho(a) q(a, b) min(1, ratio); ``factor`` is a wrong gradient's."""
        half = 0.5 * s * s * (kernel == "mala")
        slope = estimator.score(view, n, a)
        z = (b - a - half * slope) / s
        here = estimator.log_density(view, n, a)
        found, _, ratio = estimator.log_acceptance(view, n, a, z, here)
        torch.testing.assert_close(found, b)
        if kernel == "mala":
            back = estimator.score(view, n, b)
            right = (a - b - half * back) / s
            wrong = (a - b - factor * half * back) / s
            ratio = ratio + 0.5 * ((right * right).sum(1) - (wrong * wrong).sum(1))
        return here - 0.5 * (z * z).sum(1) + ratio.clamp(max=0.0)

    torch.testing.assert_close(flow(x, y), flow(y, x), rtol=1e-10, atol=1e-10)
    if kernel == "mala":
        for factor in (0.5, 2.0):
            gap = flow(x, y, factor) - flow(y, x, factor)
            assert gap.abs().max() > 0.01


@pytest.mark.parametrize("path", _annealing.PATHS)
@pytest.mark.parametrize("spec", SPECS)
def test_scores_are_the_gradients_of_the_densities(spec, path):
    estimator = ais(path=path, annealing="cubic")
    view = some_view(spec)
    x = torch.linspace(-1.5, 1.5, 40 * view.dim, dtype=torch.float64)
    x = x.reshape(40, view.dim).requires_grad_(True)
    for n in range(5):
        total = estimator.log_density(view, n, x).sum()
        (slope,) = torch.autograd.grad(total, x)
        mine = estimator.score(view, n, x.detach())
        torch.testing.assert_close(mine, slope, rtol=1e-10, atol=1e-10)


def test_the_path_leads_from_the_start_to_the_tilted_law():
    problem = registry.problem("four_modes")
    view = some_view("four_modes")
    x = torch.linspace(-1.5, 1.5, 80, dtype=torch.float64).reshape(40, 2)
    tilt = view.base_log_density(4, x) + view.reward(x)
    start = problem.truth.base_marginal(problem.time_span[0])
    for path, levels in itertools.product(_annealing.PATHS, ((), LEVELS)):
        estimator = ais(path=path, levels=levels)
        first, last = (estimator.log_density(view, n, x) for n in (0, 4))
        np.testing.assert_allclose(first, start.log_density(x.numpy()), atol=1e-10)
        torch.testing.assert_close(last, tilt)


# ---- annealed importance sampling --------------------------------------------------
@pytest.mark.parametrize("path", _annealing.PATHS)
@pytest.mark.parametrize(
    "spec", ["gaussian_tilt:dim=2,mean=0.7,rate=4.0", "gaussian_tilt:noise=constant"]
)
def test_one_level_is_importance_sampling(spec, path):
    """The mean weight by a determinant: Z exactly, without sampling."""
    problem = registry.problem(spec)
    form = quadratic(problem, ais(path=path), problem.time_grid(1))
    exact = problem.truth.log_normalizer()
    assert log_mean(*form) == pytest.approx(exact, abs=1e-10)


def mean_weight(problem, estimator, n_steps, n_paths=1 << 13, n_replicates=8):
    """The mean of W / Z over independent paths, and its standard error."""
    settings = make_settings(problem, n_steps=n_steps, n_paths=n_paths)
    rows = make_rows(problem, estimator, settings, n_replicates)[:, 0].ravel()
    weights = np.exp(rows - problem.truth.log_normalizer())
    return weights.mean(), weights.std() / np.sqrt(len(weights))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"levels": LEVELS},
        {"path": "geometric", "kernel": "random_walk", "moves": 2},
        {"moves": 2, "step": 0.6},
    ],
)
@pytest.mark.parametrize(
    ("spec", "n_steps"), [("gaussian_tilt", 5), ("four_modes", 12)]
)
def test_weights_are_unbiased_at_any_number_of_levels(spec, n_steps, options):
    mean, error = mean_weight(registry.problem(spec), ais(**options), n_steps)
    assert error < 0.05
    assert abs(mean - 1.0) < SIGMAS * error


def test_unadjusted_langevin_moves_are_biased(monkeypatch):
    """What the acceptance is for: the same moves, all of them accepted."""
    accepted = _annealing.AnnealingEstimator.log_acceptance

    def always(self, view, n, x, z, here):
        y, there, ratio = accepted(self, view, n, x, z, here)
        return y, there, torch.full_like(ratio, 1.0)

    monkeypatch.setattr(_annealing.AnnealingEstimator, "log_acceptance", always)
    problem = registry.problem("gaussian_tilt")
    settings = make_settings(problem, n_steps=5, n_paths=1 << 14, backend="torch")
    rows = make_rows(problem, ais(step=0.5), settings)[0, 0]
    weights = np.exp(rows - problem.truth.log_normalizer())
    error = weights.std() / np.sqrt(len(weights))
    assert abs(weights.mean() - 1.0) > 2.0 * SIGMAS * error


def test_more_levels_leave_less_variance():
    problem = registry.problem("gaussian_tilt")
    spread = []
    for n_steps in (4, 16, 64):
        settings = make_settings(problem, n_steps=n_steps, n_paths=4096)
        spread.append(make_rows(problem, ais(), settings)[0, 0].var())
    assert spread[2] < 0.5 * spread[1] < 0.5 * spread[0]


# ---- thermodynamic integration -------------------------------------------------------
def by_quadrature(problem, estimator, times):
    """The trapezoidal sum of exact expectations in one dimension, on a fine grid."""
    x = np.linspace(-14.0, 14.0, 4001)
    view = view_at(problem, times, np.zeros((len(x), len(times))))
    states = torch.tensor(x[:, None])
    logs = [estimator.log_density(view, n, states).numpy() for n in range(len(times))]

    def mean(values, log):
        weight = np.exp(log - log.max())
        return weight @ values / weight.sum()

    total = sum(
        0.5 * (mean(after - here, here) + mean(after - here, after))
        for here, after in itertools.pairwise(logs)
    )
    logs = np.array(logs)
    step = np.log(x[1] - x[0])
    first, last = (np.logaddexp.reduce(logs[n]) + step for n in (0, -1))
    return total, last - first


@pytest.mark.parametrize(
    "options", [{}, {"path": "geometric"}, {"levels": LEVELS, "expectations": "plain"}]
)
@pytest.mark.parametrize(
    "spec",
    [
        "gaussian_tilt:mean=0.7,slope=0.5",
        "gaussian_tilt:schedule=linear_flow,start_time=0.2",
        "gaussian_tilt:schedule=ve,rate=2.0",
    ],
)
def test_target_is_the_trapezoidal_sum(spec, options):
    """Gaussian algebra against quadrature of the estimator's own densities."""
    problem, estimator = registry.problem(spec), integration(**options)
    start, end = problem.time_span
    times = problem.time_grid(start + (end - start) * np.linspace(0, 1, 7) ** 1.3)
    total, exact = by_quadrature(problem, estimator, times)
    assert exact == pytest.approx(problem.truth.log_normalizer(), abs=1e-8)
    target = estimator.target(problem.truth.policy_chain("zero", times))
    np.testing.assert_allclose(target, [total], atol=1e-9)


def third_cumulants(path):
    """Sum over n of the third cumulant of log rho_{n+1} / rho_n under rho_n, d = 1."""
    total = 0.0
    for n in range(len(path.constant) - 1):
        variance = 1.0 / path.precision[n, 0, 0]
        mean = variance * path.linear[n, 0]
        a = path.precision[n + 1, 0, 0] - path.precision[n, 0, 0]
        b = path.linear[n + 1, 0] - path.linear[n, 0]
        slope = np.sqrt(variance) * (b - a * mean)
        bend = -0.5 * a * variance
        total += 6.0 * slope**2 * bend + 8.0 * bend**3
    return total


@pytest.mark.parametrize("path", _annealing.PATHS)
def test_error_of_the_rule_is_a_twelfth_of_the_third_cumulants(path):
    from sdebench.closed_form.work import annealed_gaussians

    problem, estimator = registry.problem("gaussian_tilt", mean=0.4), integration
    ratios, errors = [], []
    for n_steps in (50, 100, 200):
        policy = problem.truth.policy_chain("zero", n_steps)
        target = estimator(path=path).target(policy)[0]
        errors.append(target - problem.truth.log_normalizer())
        level = estimator(path=path).all_levels(n_steps)
        cumulants = third_cumulants(annealed_gaussians(policy.chain, level, path))
        ratios.append(errors[-1] / (cumulants / 12.0))
    assert errors[1] / errors[2] == pytest.approx(4.0, abs=0.1)
    assert abs(ratios[2] - 1.0) < 0.6 * abs(ratios[1] - 1.0) < 0.05


@pytest.mark.parametrize("spec", ["gaussian_tilt", "gaussian_tilt:dim=2,rate=4.0"])
def test_weighted_expectations_meet_the_target(spec):
    """And plain ones lag behind; the bias of few weights is below the error."""
    settings = {"n_steps": 5, "n_paths": 1 << 13, "n_replicates": 32, "seed": 5}
    row = measure(spec, "thermodynamic_integration", **settings).row
    error = row["std_error"][0]
    assert row["verdict"] == "unbiased for its target"
    assert abs(row["bias_own"][0]) < SIGMAS * error
    assert abs(row["bias"][0]) > 2.0 * SIGMAS * error
    plain = "thermodynamic_integration:expectations=plain"
    assert measure(spec, plain, **settings).row["bias_own"][0] < -0.05


def test_plain_expectations_need_mixing():
    """With many moves per level they meet the target too."""
    problem, moves = registry.problem("gaussian_tilt"), 24
    estimator = integration(expectations="plain", moves=moves)
    settings = make_settings(problem, n_steps=6, n_paths=1 << 12)
    found = make_rows(problem, estimator, settings, 16)[:, 0, 0]
    target = estimator.target(problem.truth.policy_chain("zero", 6))[0]
    error = found.std(ddof=1) / 4.0
    assert error < 0.005
    assert abs(found.mean() - target) < SIGMAS * error
    few = make_rows(problem, dataclasses.replace(estimator, moves=1), settings)
    assert abs(few[0, 0, 0] - target) > 0.05


def test_processes_without_a_denoiser_have_no_target():
    row = measure(
        "gaussian_tilt:noise=constant",
        "thermodynamic_integration",
        n_steps=8,
        n_paths=64,
        n_replicates=4,
    ).row
    assert row["verdict"] == "no exact target"


# ---- both backends, refusals, counts -----------------------------------------------
@pytest.mark.parametrize("spec", SPECS)
def test_backends_agree_path_by_path(spec):
    problem = registry.problem(spec)
    settings = make_settings(problem, n_steps=7, n_paths=300)
    shared = {"levels": LEVELS, "moves": 3}
    for estimator in (
        ais(**shared),
        ais(path="geometric", kernel="random_walk"),
        integration(**shared),
        integration(path="geometric", expectations="plain"),
    ):
        mine = make_rows(problem, estimator, settings, 2)
        other = dataclasses.replace(settings, backend="torch")
        theirs = make_rows(problem, estimator, other, 2)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("levels", "part"),
    [
        ([0.1, 1.0], "first level must be 0"),
        ([0.0, 0.9], "last level must be 1"),
        ([0.0, 1.2, 1.0], "must stay in"),
        ([0.0, float("nan"), 1.0], "finite"),
        ([1.0], "at least two"),
    ],
)
def test_paths_that_are_not_absolutely_continuous(levels, part):
    for make in (ais, integration):
        with pytest.raises(ParameterError, match=part):
            make(levels=levels)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"path": "optimal"}, "path"),
        ({"kernel": "hmc"}, "kernel"),
        ({"annealing": "sudden"}, "annealing"),
        ({"moves": 0}, "at least 1"),
        ({"step": 0.0}, "positive"),
        ({"step": float("inf")}, "finite"),
    ],
)
def test_unknown_options(options, part):
    for make in (ais, integration):
        with pytest.raises((ParameterError, UnknownNameError), match=part):
            make(**options)
    with pytest.raises((ParameterError, UnknownNameError), match="expectations"):
        integration(expectations="exact")


BENT = "gaussian_tilt:curvature=-1.9,schedule=ve,rate=2.0"


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("two_modes", "X_0 has another law"),
        ("forty_modes", "random start"),
        ("ou_linear", "density of the base process"),
        (BENT, "not integrable at step"),
    ],
)
def test_refusals(spec, part):
    request = make_request(registry.problem(spec), n_steps=10)
    for make in (ais, integration):
        assert part in refusal(request, make())
    assert part in refusal(request, ais(levels=LEVELS))
    geometric = refusal(request, ais(path="geometric"))
    assert (geometric is None) == (spec == BENT)
    assert "at least 2 paths" in refusal(
        make_request("four_modes", n_paths=1), integration()
    )


def test_evaluations_are_counted():
    problem = registry.problem("four_modes")
    view = view_at(problem, problem.time_grid(5), np.zeros((3, 12)))
    ais(moves=2).statistics(view)
    assert view.used == {"base_density", "reward_gradient"}
    moves = 2 * 4
    assert {k: v // 3 for k, v in view.counts.items()} == {
        "drift_evaluations": 2 * moves,
        "vjp_evaluations": 0,
        "control_evaluations": 0,
        "reward_evaluations": 6 + moves,
        "reward_gradient_evaluations": 2 * moves,
        "density_evaluations": 6 + moves,
        "noise_draws": 2 * moves,
    }
