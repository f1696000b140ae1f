"""Jarzynski and Crooks under tilting: exact means, both backends, refusals."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from _log_weights import (
    effective_share,
    is_quadratic,
    log_mean,
    quadratic,
    view_at,
)
from _replicates import make_rows, make_settings
from scipy.special import logsumexp

from sdebench import registry
from sdebench.closed_form.work import log_mean_work
from sdebench.errors import NotExactError, ParameterError, UnknownNameError
from sdebench.estimators import _work as work_file
from sdebench.estimators._work import (
    ANNEALING,
    BACKWARD,
    log_kernel_ratio,
    steps_of,
)
from sdebench.measure import measure
from sdebench.measure.cell import make_request, refusal
from sdebench.simulate.noise import Noise, split_seed
from sdebench.view import View

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FALSE_ALARM = 1e-4
GAUSSIAN = (
    "gaussian_tilt",
    "gaussian_tilt:dim=2,mean=0.7,slope=0.5,rate=4.0",
    "gaussian_tilt:schedule=linear_flow,start_time=0.2",
    "gaussian_tilt:schedule=cosine,start_time=0.2",
)
CROOKS = [
    registry.estimator("crooks", annealing=annealing, backward=backward)
    for annealing, backward in itertools.product(ANNEALING, BACKWARD)
]
JARZYNSKI = [registry.estimator("jarzynski", annealing=name) for name in ANNEALING]


def grid(problem, n_steps, power=1.3):
    """A grid that is not uniform: mixing up steps would show."""
    start, end = problem.time_span
    return problem.time_grid(
        start + (end - start) * np.linspace(0, 1, n_steps + 1) ** power
    )


# ---- exact means on Gaussian problems -------------------------------------------
@pytest.mark.parametrize("n_steps", [1, 2, 6])
@pytest.mark.parametrize("spec", GAUSSIAN)
def test_crooks_is_unbiased_for_z_at_any_number_of_steps(spec, n_steps):
    """By a determinant, against log Z of continuous time; no sampling."""
    problem = registry.problem(spec)
    times, exact = grid(problem, n_steps), problem.truth.log_normalizer()
    for estimator in CROOKS:
        assert is_quadratic(problem, estimator, times)
        found = log_mean(*quadratic(problem, estimator, times))
        assert found == pytest.approx(exact, abs=2e-10), estimator.label


@pytest.mark.parametrize("n_steps", [1, 2, 6, 12])
@pytest.mark.parametrize("spec", GAUSSIAN)
def test_mean_of_the_riemann_work_is_its_target(spec, n_steps):
    """Two routes: the estimator's values and a determinant; a Riccati recursion."""
    problem = registry.problem(spec)
    times = grid(problem, n_steps)
    policy = problem.truth.policy_chain("halfway", times)
    for estimator in JARZYNSKI:
        assert is_quadratic(problem, estimator, times)
        found = log_mean(*quadratic(problem, estimator, times))
        target = estimator.target(policy)
        np.testing.assert_allclose(target, [found], rtol=0, atol=1e-12)
        assert abs(found - problem.truth.log_normalizer()) > 1e-3 / n_steps


def test_an_infinite_mean_has_no_target():
    problem = registry.problem("gaussian_tilt", schedule="ve")
    chain = problem.truth.policy_chain("zero", 5).chain
    estimator = registry.estimator("jarzynski", annealing="linear")
    assert log_mean(*quadratic(problem, estimator, problem.time_grid(5))) == np.inf
    with pytest.raises(NotExactError, match="infinite"):
        log_mean_work(chain, ANNEALING["linear"])


@pytest.mark.parametrize("annealing", ANNEALING)
def test_bias_of_the_riemann_work_is_of_first_order(annealing):
    problem = registry.problem("gaussian_tilt")
    exact, estimator = problem.truth.log_normalizer(), ANNEALING[annealing]
    errors = [
        log_mean_work(problem.truth.policy_chain("zero", n).chain, estimator) - exact
        for n in (100, 200, 400, 800)
    ]
    orders = np.log2(np.abs(errors[:-1]) / np.abs(errors[1:]))
    np.testing.assert_allclose(orders, 1.0, atol=0.05)
    assert abs(2.0 * errors[-1] - errors[-2]) < 0.02 * abs(errors[-1])


def test_variance_of_kernel_ratios():
    """Matched kernels: infinite with few steps; both settle with many."""
    problem = registry.problem("gaussian_tilt")
    share = {
        (backward, n): effective_share(
            *quadratic(
                problem,
                registry.estimator("crooks", backward=backward),
                problem.time_grid(n),
            )
        )
        for backward in BACKWARD
        for n in (2, 5, 20)
    }
    assert share["matched", 2] == 0.0
    assert share["noising", 2] > 0.2
    assert 0.3 < share["matched", 5] < share["matched", 20] < 0.9
    assert share["noising", 20] < share["matched", 20]


# ---- the two weights are discretizations of one ------------------------------------
def gap(spec, estimator, n_steps):
    """Spread of kernel ratio minus Riemann work over that of the work, same noise."""
    problem = registry.problem(spec)
    times = problem.time_grid(n_steps)
    view = View(
        problem.tables(None, times),
        times,
        None,
        key=split_seed(5),
        replicate=0,
        first_path=0,
        n_paths=300,
    )
    ratio = estimator.statistics(view)
    work = registry.estimator("jarzynski").statistics(view)
    return float((ratio - work).std() / work.std())


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("spec", ["gaussian_tilt:dim=2", "two_modes:start=marginal"])
def test_kernel_ratio_tends_to_the_work_path_by_path(spec, backward, monkeypatch):
    """Any backward kernel is unbiased; only the right one gives the work.

    The gap is of order h^(1/2): a factor 4 from 40 to 640 steps.
    """
    crooks = registry.estimator("crooks", backward=backward)
    assert gap(spec, crooks, 640) < 0.3 * gap(spec, crooks, 40)

    def against_the_reward(steps, n, x, after, slope, z):
        return log_kernel_ratio(steps, n, x, after, -slope, z)

    monkeypatch.setattr(work_file, "log_kernel_ratio", against_the_reward)
    assert gap(spec, crooks, 640) > 0.6 * gap(spec, crooks, 40)


# ---- mixtures: quadrature over the normals -----------------------------------------
def expected_weight(problem, estimator, n_steps, nodes):
    """Return E W of a scalar problem, over start component, start and steps."""
    points, mass = np.polynomial.hermite_e.hermegauss(nodes)
    mass = mass / mass.sum()
    index = np.array(list(itertools.product(range(nodes), repeat=n_steps + 1)))
    weights = np.prod(mass[index], axis=1)
    times = problem.time_grid(n_steps)
    edges = np.append(0.0, problem.tables(None, times).start_cumulative)
    total = -np.inf
    for low, high in itertools.pairwise(edges):
        view = view_at(problem, times, points[index])
        view._given = Noise(
            view._given.steps,
            view._given.start,
            np.full(len(index), 0.5 * (low + high)),
        )
        values = estimator.statistics(view)[:, 0].numpy()
        part = logsumexp(values + np.log(weights * (high - low)))
        total = np.logaddexp(total, part)
    return total


@pytest.mark.parametrize("backward", BACKWARD)
def test_crooks_is_unbiased_on_mixtures(backward):
    """Gauss-Hermite quadrature over the whole path of one step, then of two."""
    problem = registry.problem("two_modes", start="marginal", rate=1.5, distance=1.0)
    exact = problem.truth.log_normalizer()
    estimator = registry.estimator("crooks", backward=backward, annealing="linear")
    for n_steps, nodes, limit in ((1, 150, 1e-7), (2, 60, 1e-5)):
        found = expected_weight(problem, estimator, n_steps, nodes)
        assert found == pytest.approx(exact, abs=limit)
    riemann = registry.estimator("jarzynski", annealing="linear")
    assert abs(expected_weight(problem, riemann, 2, 60) - exact) > 0.01


@pytest.mark.parametrize("spec", ["two_modes:start=marginal", "four_modes"])
def test_measured_on_mixtures(spec):
    """Crooks is unbiased against the exact log Z, the Riemann sum is not."""
    settings = {"n_steps": 16, "n_paths": 4096, "n_replicates": 64, "seed": 4}
    crooks = measure(spec, "crooks", **settings).row
    assert crooks["truth_discrete"] == crooks["target"] == crooks["truth"]
    error = crooks["std_error"][0]
    bias = crooks["mean"][0] - crooks["truth"][0]
    logarithm = -0.5 * crooks["variance"] / crooks["n_paths"]
    assert abs(bias - logarithm) < 4.5 * error
    assert error < 0.01
    riemann = measure(spec, "jarzynski", **settings).row
    assert riemann["target"] is None
    assert riemann["verdict"] == "no exact target"
    assert riemann["bias"][0] > 10.0 * riemann["std_error"][0]


def test_verdicts_on_a_gaussian_problem():
    settings = {"n_steps": 8, "n_paths": 1 << 14, "n_replicates": 32, "seed": 5}
    for backward in BACKWARD:
        row = measure("gaussian_tilt", f"crooks:backward={backward}", **settings).row
        assert row["verdict"] == "unbiased", backward
    row = measure("gaussian_tilt", "jarzynski", **settings).row
    assert row["verdict"] == "unbiased for its target"
    assert row["p_value"] < FALSE_ALARM


@pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "spec", ["gaussian_tilt:dim=2", "two_modes:start=marginal", "four_modes"]
)
def test_backends_agree_path_by_path(spec, dtype):
    problem = registry.problem(spec)
    settings = make_settings(problem, n_steps=7, n_paths=300, dtype=dtype)
    limit = {"float64": 1e-11, "float32": 1e-4}[dtype]
    for estimator in (CROOKS[0], CROOKS[-1], JARZYNSKI[0], JARZYNSKI[-1]):
        mine = make_rows(problem, estimator, settings)
        torch_settings = dataclasses.replace(settings, backend="torch")
        theirs = make_rows(problem, estimator, torch_settings)
        scale = np.max(np.abs(theirs))
        assert np.max(np.abs(mine - theirs)) <= limit * scale, estimator.label


def test_they_leave_the_shared_paths_alone():
    """A kernel of an own chain writes into no buffer that others read."""
    problem = registry.problem("four_modes")
    settings = make_settings(problem, n_steps=5, n_paths=64)
    from sdebench.measure.workers import make_worker

    plain = registry.estimator("path_importance_sampling", proposal="zero")
    alone = make_worker(problem, [plain], settings).block(0, 0, 64)[0][0][:, :64].copy()
    group = [CROOKS[0], JARZYNSKI[0], plain]
    together = make_worker(problem, group, settings).block(0, 0, 64)[0][2][:, :64]
    np.testing.assert_array_equal(alone, together)


# ---- coefficients and refusals ---------------------------------------------------
def test_coefficients_are_those_of_the_schedule():
    problem = registry.problem("gaussian_tilt")
    times = grid(problem, 6)
    schedule = problem.family.base.schedule
    steps = steps_of(problem.tables(None, times).denoiser, 2, "noising")
    h, left = np.diff(times), times[:-1]
    ratio = schedule.alpha(left) / schedule.alpha(times[1:])
    np.testing.assert_allclose(steps.noise**2, 2.0 * h * schedule.eta(left))
    np.testing.assert_allclose(steps.growth, h * schedule.kappa(left), rtol=1e-10)
    np.testing.assert_allclose(steps.shrink, ratio)
    back = [problem.family.base.backward(s, t)[2] for s, t in itertools.pairwise(times)]
    np.testing.assert_allclose(steps.back, back)
    assert (steps.level[0], steps.level[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["crooks", "jarzynski"])
@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("two_modes", "X_0 has another law"),
        ("ou_linear", "denoised prediction"),
        ("follmer_mixture", "denoised prediction"),
        ("gaussian_tilt:noise=constant", "memoryless denoising"),
        ("gaussian_tilt:curvature=-1.9,schedule=ve,rate=2.0", "is not integrable at"),
    ],
)
def test_refusals(name, spec, part):
    request = make_request(registry.problem(spec), n_steps=10)
    assert part in refusal(request, registry.estimator(name))


def test_exponential_scheme_is_refused():
    request = make_request("gaussian_tilt", scheme="exponential")
    assert "euler_maruyama" in refusal(request, registry.estimator("crooks"))


def test_unknown_options():
    for name in ("crooks", "jarzynski"):
        with pytest.raises((ParameterError, UnknownNameError), match="annealing"):
            registry.estimator(name, annealing="sudden")
    with pytest.raises((ParameterError, UnknownNameError), match="backward"):
        registry.estimator("crooks", backward="exact")


def test_evaluations_are_counted():
    problem = registry.problem("four_modes")
    view = view_at(problem, problem.time_grid(5), np.zeros((3, 12)))
    registry.estimator("crooks").statistics(view)
    assert view.used == {"base_density", "reward_gradient"}
    assert {k: v // 3 for k, v in view.counts.items()} == {
        "drift_evaluations": 5,
        "vjp_evaluations": 0,
        "control_evaluations": 0,
        "reward_evaluations": 1,
        "reward_gradient_evaluations": 5,
        "density_evaluations": 2,
        "noise_draws": 5,
    }
    assert torch.is_grad_enabled()
