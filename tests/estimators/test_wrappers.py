"""Wrappers: antithetic, quasi-random, control variate, multilevel.

They leave the expectation alone, so every exact answer of the wrapped estimator is
theirs; what they do to the variance is compared with theory.  Random tests have fixed
seeds; all p-values and intervals of this file together fail by chance with probability
at most FALSE_ALARM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from _replicates import make_estimates, make_rows, make_settings
from scipy.stats import chi2, norm

from sdebench import registry
from sdebench.composite import CompositeEstimator
from sdebench.errors import ParameterError
from sdebench.estimator import Sizes
from sdebench.estimators._cross_fitting import cross_fitted
from sdebench.estimators.antithetic import reflected
from sdebench.estimators.multilevel import allocation, coarser, coarser_noise
from sdebench.estimators.quasi_random import bridge_matrix, sobol_points
from sdebench.measure import measure, measure_group
from sdebench.measure.intervals import bias_test, t_quantile
from sdebench.simulate.noise import block_noise

FALSE_ALARM = 1e-4
TESTS = 120
"""An upper bound on the number of p-values and intervals of this file."""
LIMIT = FALSE_ALARM / TESTS
WRAPPERS = ("antithetic", "quasi_random", "control_variate", "multilevel")
INNER = ("pathwise", "reinforce:baseline=none", "adjoint_matching")
EXACT = ("damped_oscillator", "gaussian_tilt")
"""Problems with an exact N-step chain and a random start."""


def wrap(name, inner="pathwise", **options):
    return registry.estimator(name, estimator=inner, **options)


# ---- specifications -------------------------------------------------------------
@pytest.mark.parametrize(
    "spec",
    [
        "antithetic",
        "antithetic:estimator=[reinforce:baseline=none]",
        "multilevel:estimator=[reinforce:baseline=none],levels=4",
        "quasi_random:estimator=adjoint_matching,bridge=false",
    ],
)
def test_labels_round_trip(spec):
    built = registry.estimator(spec)
    assert built.label == spec
    assert registry.estimator(built.label) == built


def test_brackets_hold_a_specification():
    spec = "antithetic:estimator=[reinforce:baseline=none],x=[1,2],y=[a:b=[c:d=1,e=2]]"
    assert registry.parse(spec) == (
        "antithetic",
        {
            "estimator": "reinforce:baseline=none",
            "x": [1, 2],
            "y": "a:b=[c:d=1,e=2]",
        },
    )
    assert registry.parse("a:y=[b:c=1,d=2]")[1] == {"y": "b:c=1,d=2"}


def test_without_brackets_one_option_is_understood():
    plain = registry.estimator("antithetic:estimator=reinforce:baseline=none")
    assert plain == wrap("antithetic", "reinforce:baseline=none")
    assert plain.label == "antithetic:estimator=[reinforce:baseline=none]"


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_answer_the_wrapped_question(name):
    lean = wrap(name, "adjoint_matching")
    assert lean.estimand == "matching_gradient"
    assert lean.inner.needs <= lean.needs
    assert not lean.has_target
    assert lean.declared_bias == "none"


OWN = '''
from typing import ClassVar
import numpy as np
from sdebench.estimator import Estimator


class Window(Estimator):
    """A part of the pathwise gradient, in torch alone."""

    estimand: ClassVar[str] = "gradient"

    @property
    def declared_bias(self):
        return "any"

    def noisy_steps(self, n_steps):
        return np.arange(n_steps) % 2.0

    def not_applicable(self, n_paths):
        return "too many" if n_paths > 4096 else None

    def target(self, policy):
        return policy.gradient(step_weights=self.noisy_steps(policy.chain.n_steps))

    def statistics(self, view):
        from sdebench.estimators.pathwise import Pathwise
        from sdebench.composite import PathScores

        return PathScores().statistics(view)[:, : view.n_params]
'''


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_file_of_ones_own_is_wrapped_with_all_it_declares(name, tmp_path):
    path = tmp_path / "window.py"
    path.write_text(OWN)
    built = registry.estimator(f"{name}:estimator=[{path}:Window]")
    assert built.backends == ("torch",)
    assert built.has_target
    assert built.declared_bias == "any"
    assert built.not_applicable(8192) == "too many"
    np.testing.assert_array_equal(built.noisy_steps(3), [0, 1, 0])
    policy = registry.problem("gaussian_tilt").truth.policy_chain("halfway", 4)
    np.testing.assert_array_equal(built.target(policy), built.inner.target(policy))
    problem = registry.problem("gaussian_tilt")
    settings = make_settings(problem, n_steps=4, n_paths=16, backend="torch")
    rows = make_rows(problem, built, settings)
    assert rows.shape == (1, 2, 16)
    assert np.all(np.isfinite(rows))


# ---- refusals -----------------------------------------------------------------------
@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("reinforce", "compares the paths"),
        ("reinforce:baseline=optimal", "compares the paths"),
        ("path_importance_sampling", "logarithm of a mean"),
        ("zeroth_order", "simulations of its own"),
        ("antithetic", "simulations of its own"),
    ],
)
def test_what_is_no_plain_mean_is_refused(name, inner, words):
    with pytest.raises(ParameterError, match=words):
        wrap(name, inner)


@pytest.mark.parametrize(
    ("estimator", "settings", "words"),
    [
        (wrap("quasi_random"), {"n_paths": 96}, "use 128"),
        (wrap("quasi_random"), {"n_paths": 64, "n_steps": 2200}, "at most 21201"),
        (wrap("control_variate"), {"n_paths": 10}, "fewer paths than features"),
        (
            wrap("control_variate", covariates="martingale"),
            {"n_paths": 4},
            "fewer paths than features",
        ),
        (wrap("multilevel"), {"n_paths": 8}, "use at least 12"),
        (wrap("multilevel"), {"n_steps": 2}, "use at least 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(
    estimator, settings, words
):
    row = measure_group("ou_linear", [estimator], n_replicates=2, **settings)[0].row
    assert row["status"] == "not applicable"
    assert words in row["reason"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("multilevel", {"levels": 1}, "levels = 1"),
        ("multilevel", {"exponent": -1.0}, "exponent = -1.0"),
        ("control_variate", {"covariates": "reward"}, "unknown covariates"),
    ],
)
def test_wrong_options_are_refused(name, options, words):
    with pytest.raises(Exception, match=words):
        registry.estimator(name, **options)


def test_the_least_sizes_run():
    """One path, step or dimension less is refused above; this much runs."""
    problem = registry.problem("ou_linear")
    for estimator, sizes in (
        (wrap("control_variate"), {"n_paths": 12}),
        (wrap("multilevel"), {"n_paths": 12}),
        (wrap("multilevel"), {"n_steps": 3}),
    ):
        settings = make_settings(problem, **sizes)
        asked = Sizes(settings.n_paths, len(settings.times) - 1, problem.dim, 3)
        assert estimator.not_applicable_to(asked) is None
        assert estimator.refusal(settings.n_paths, "numba") is None
        assert np.all(np.isfinite(make_rows(problem, estimator, settings)))


# ---- expectation --------------------------------------------------------------------
def wrapped_estimators():
    plain = [wrap(name, inner) for name in WRAPPERS for inner in INNER]
    return [
        *plain,
        wrap("quasi_random", bridge=False),
        wrap("control_variate", "reinforce:baseline=none", covariates="score"),
        wrap("control_variate", "reinforce:baseline=none", covariates="martingale"),
    ]


@pytest.mark.parametrize("steps", [7, 1.5])
@pytest.mark.parametrize("spec", EXACT)
def test_unbiased_for_the_wrapped_estimand(spec, steps):
    """Odd and non-uniform grids; zero or twice the answer would be refused."""
    problem = registry.problem(spec)
    start, end = problem.time_span
    times = (
        steps
        if isinstance(steps, int)
        else problem.time_grid(start + (end - start) * np.linspace(0, 1, 9) ** steps)
    )
    rows = measure_group(
        problem,
        wrapped_estimators(),
        point="halfway",
        n_steps=times,
        n_paths=128,
        n_replicates=300,
        seed=21,
    )
    for measurement in rows:
        row = measurement.row
        label = row["estimator_label"]
        assert row["status"] == "ok", label
        assert row["p_value_own"] > LIMIT, label
        variance = np.square(row["std_error"]) * 300
        for factor in (0.0, 2.0):
            wrong = factor * np.array(row["truth_discrete"])
            assert bias_test(row["mean"], wrong, variance, 300).p_value < LIMIT, label


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("spec", [*EXACT, "two_modes"])
def test_numba_and_torch_give_the_same_rows(spec, name):
    problem = registry.problem(spec)
    for inner in INNER[:2]:
        ours, theirs = (
            make_rows(
                problem,
                wrap(name, inner),
                make_settings(problem, n_steps=7, n_paths=32, backend=backend),
            )
            for backend in ("numba", "torch")
        )
        scale = np.max(np.abs(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * scale)


# ---- antithetic ---------------------------------------------------------------------
def test_reflection_is_of_everything_random():
    noise = block_noise(1, 2, 3, 16, 5, 2)
    mirror = reflected(noise)
    for a, b, total in zip(noise, mirror, (0.0, 0.0, 1.0), strict=True):
        np.testing.assert_allclose(a + b, total, atol=1e-15)
        assert np.ptp(a) > 0.1


def test_antithetic_has_no_variance_where_the_estimate_is_linear_in_the_noise():
    """Pathwise on ou_linear: offsets are constants, the feedback is linear in X."""
    problem = registry.problem("ou_linear")
    settings = make_settings(problem, n_steps=8, n_paths=64)
    (plain,) = make_rows(problem, registry.estimator("pathwise"), settings)
    (rows,) = make_rows(problem, wrap("antithetic"), settings)
    exact = problem.truth.gradient("halfway", 8)
    scale = np.max(np.abs(exact))
    assert np.std(plain[2]) > 0.01 * scale
    np.testing.assert_allclose(
        rows, exact[:, None] + np.zeros((1, 64)), rtol=0, atol=1e-12 * scale
    )


def test_antithetic_gains_nothing_where_the_estimate_is_even():
    """Pathwise on the damped oscillator without offset: rows are those of one path."""
    problem = registry.problem("damped_oscillator")
    settings = make_settings(problem, point="zero", n_steps=8, n_paths=64)
    (plain,) = make_rows(problem, registry.estimator("pathwise"), settings)
    (rows,) = make_rows(problem, wrap("antithetic"), settings)
    np.testing.assert_allclose(rows[2], plain[2], rtol=1e-10)


@pytest.mark.parametrize("name", ["antithetic", "control_variate", "quasi_random"])
def test_evaluations_count_every_simulation(name):
    inner, outer = (
        measure("ou_linear", e, n_steps=8, n_paths=64, n_replicates=2).row
        for e in ("pathwise", wrap(name))
    )
    factor = 2 if name == "antithetic" else 1
    assert outer["reward_gradient_evaluations"] == (
        factor * inner["reward_gradient_evaluations"]
    )
    drifts = 1 if name == "quasi_random" else 2
    assert outer["drift_evaluations"] == drifts * inner["drift_evaluations"]


# ---- quasi-random -------------------------------------------------------------------
@pytest.mark.parametrize("n_steps", [1, 2, 3, 8, 13])
def test_bridge_is_orthogonal_and_coarse_to_fine(n_steps):
    times = np.linspace(0, 1.3, n_steps + 1) ** 1.7
    matrix = bridge_matrix(times)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n_steps), atol=1e-13)
    path = np.cumsum(np.sqrt(np.diff(times))[:, None] * matrix, axis=0)
    np.testing.assert_allclose(path[-1, 0], np.sqrt(times[-1]), rtol=1e-12)
    np.testing.assert_allclose(path[-1, 1:], 0.0, atol=1e-13)
    if n_steps > 3:  # the middle is fixed by the first two
        np.testing.assert_allclose(path[n_steps // 2 - 1, 2:], 0.0, atol=1e-13)
        assert abs(path[n_steps // 2 - 1, 1]) > 0.1
    covariance = path @ path.T
    np.testing.assert_allclose(
        covariance, np.minimum.outer(times[1:], times[1:]), atol=1e-13
    )


def test_sobol_points_have_one_in_each_interval():
    """In every coordinate; each generator scrambles anew."""
    first, second = (
        sobol_points(np.random.default_rng(seed), 64, 40) for seed in (1, 2)
    )
    cells = np.sort(np.floor(64 * first), axis=0)
    np.testing.assert_array_equal(cells, np.arange(64)[:, None] + np.zeros((1, 40)))
    np.testing.assert_array_equal(2.0**30 * first % 1, 0.5)  # middles: never 0 or 1
    assert not np.any(first == second)
    assert sobol_points(np.random.default_rng(1), 1, 3).shape == (1, 3)


def variance_slope(variances, sizes, n_replicates):
    """Slope of log variance against log size, and its standard error.

    Of normal estimates: Var log s^2 = 2/(R - 1).
    """
    x = np.log(sizes) - np.mean(np.log(sizes))
    slope = x @ np.log(variances) / (x @ x)
    return slope, np.sqrt(2 / (n_replicates - 1) / (x @ x))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("pathwise", -1.5, -0.5), ("quasi_random", -4.0, -1.5)]
)
def test_quasi_random_errors_decay_faster(name, low, high):
    """Pathwise on the oscillator: the interval of the variance's slope in n.

    It holds -1 for random paths, and lies below -1.5 for Sobol points in the 11
    coordinates of a path; -3 is the limit of smooth functions.
    """
    problem, sizes, count = registry.problem("damped_oscillator"), (32, 128, 512), 200
    estimator = registry.estimator(name)
    variances = []
    for n_paths in sizes:
        settings = make_settings(problem, n_steps=4, n_paths=n_paths, seed=31)
        estimates = make_estimates(problem, estimator, settings, count)
        variances.append(np.trace(np.cov(estimates.T)))
    slope, error = variance_slope(variances, sizes, count)
    margin = norm.isf(LIMIT / 2) * error
    assert low < slope - margin
    assert slope + margin < high


def test_the_bridge_helps_where_the_end_matters():
    """pathwise on gaussian_tilt with 32 steps: F-quantile of the ratio of variances."""
    problem = registry.problem("gaussian_tilt")
    settings = make_settings(problem, n_steps=32, n_paths=128, seed=32)
    spread = [
        np.trace(np.cov(make_estimates(problem, estimator, settings, 100).T))
        for estimator in (
            registry.estimator("pathwise"),
            wrap("quasi_random", bridge=False),
            wrap("quasi_random"),
        )
    ]
    ratio = chi2.isf(LIMIT, 99) / chi2.ppf(LIMIT, 99)
    assert spread[0] > ratio * spread[1]
    assert spread[1] > ratio * spread[2]


# ---- control variates ---------------------------------------------------------------
def test_regression_takes_out_what_is_linear():
    generator = np.random.default_rng(4)
    covariates = generator.standard_normal((3, 20))
    slopes = generator.standard_normal((2, 3))
    constant = np.array([[2.0], [-1.0]])
    left = cross_fitted(constant + slopes @ covariates, covariates)
    np.testing.assert_allclose(left, constant + np.zeros((1, 20)), rtol=1e-12)
    # collinear and vanishing covariates
    doubled = np.vstack([covariates, covariates.sum(axis=0), np.zeros(20)])
    left = cross_fitted(constant + slopes @ covariates, doubled)
    np.testing.assert_allclose(left, constant + np.zeros((1, 20)), rtol=1e-12)


def test_coefficients_come_from_the_other_half():
    """A path's own row does not enter its own coefficients, but those of the others."""
    generator = np.random.default_rng(5)
    covariates, rows = generator.standard_normal((2, 1, 12))
    before = cross_fitted(rows, covariates)
    rows[0, 4] += 1.0
    change = cross_fitted(rows, covariates) - before
    np.testing.assert_allclose(change[0, 0::2], 1.0 * (np.arange(6) == 2), atol=1e-12)
    assert np.all(np.abs(change[0, 1::2]) > 1e-6)


def own_fit(rows, covariates):
    """What the wrapper must not do: coefficients from the paths they are used on."""
    design = np.vstack([np.ones(rows.shape[1]), covariates]).T
    fitted = np.linalg.lstsq(design, rows.T, rcond=None)[0]
    return rows - fitted[1:].T @ covariates


def test_cross_fitting_is_unbiased_and_fitting_on_the_own_paths_is_not():
    """g = x^2 + x^3 with covariate x: the own fit is off by -E[x^3 ...]/n."""
    generator = np.random.default_rng(6)
    count, n = 40000, 12
    x = generator.exponential(size=(count, 1, n)) - 1.0
    mine = [cross_fitted(a**2, a).mean() for a in x]
    own = [own_fit(a**2, a).mean() for a in x]
    exact = 1.0
    error = np.std(mine) / np.sqrt(count)
    assert abs(np.mean(mine) - exact) < norm.isf(LIMIT / 2) * error
    assert abs(np.mean(own) - exact) > 2 * norm.isf(LIMIT / 2) * np.std(own) / (
        np.sqrt(count)
    )


@pytest.mark.parametrize("spec", EXACT)
def test_unbiased_with_few_paths(spec):
    problem = registry.problem(spec)
    row = measure(
        problem,
        wrap("control_variate", "reinforce:baseline=none"),
        n_steps=4,
        n_paths=16,
        n_replicates=4000,
        seed=33,
    ).row
    assert row["p_value_own"] > LIMIT


def test_control_variates_take_out_their_share():
    """Variance ratio 1 - R^2, R^2 of a regression on the same rows of many paths."""
    problem, n_paths = registry.problem("gaussian_tilt"), 512
    inner = registry.estimator("reinforce:baseline=none")
    settings = make_settings(problem, n_steps=4, n_paths=n_paths, seed=34)
    plain = make_rows(problem, inner, settings, 60)
    mine = make_rows(problem, wrap("control_variate", inner.label), settings, 60)
    total = [np.var(rows, axis=2, ddof=1).sum(axis=1).mean() for rows in (plain, mine)]
    from sdebench.composite import PathScores

    scores = make_rows(problem, PathScores(), settings, 60)
    count = problem.n_params
    covariates = np.concatenate(scores[:, [*range(count), 2 * count + 2]], axis=1)
    rows = np.concatenate(plain, axis=1)
    left = np.var(own_fit(rows, covariates), axis=1).sum()
    assert left < 0.7 * np.var(rows, axis=1).sum()
    np.testing.assert_allclose(
        total[1] / total[0], left / np.var(rows, axis=1).sum(), rtol=0.1
    )


# ---- multilevel ---------------------------------------------------------------------
def test_allocation_adds_up_and_grows_towards_the_coarse_grid():
    for n_paths, levels, exponent in ((256, 3, 1.5), (12, 3, 1.5), (1000, 5, 1.0)):
        counts = allocation(n_paths, levels, exponent)
        assert sum(counts) == n_paths
        assert min(counts) >= 1
        assert counts == sorted(counts)
    assert allocation(700, 3, 1.0) == [100, 200, 400]
    assert allocation(300, 3, 0.0) == [100, 100, 100]


@pytest.mark.parametrize("n_steps", [2, 3, 8, 13])
def test_coarse_noise_is_the_same_brownian_path(n_steps):
    times = np.linspace(0, 1.2, n_steps + 1) ** 1.4
    noise = block_noise(3, 1, 0, 7, n_steps, 2)
    coarse_times = coarser(times)
    coarse = coarser_noise(noise, times)
    assert len(coarse_times) == (n_steps + 1) // 2 + 1

    def path(noise, times):
        roots = np.sqrt(np.diff(times))[:, None, None]
        return np.concatenate(
            [np.zeros((1, 2, 7)), np.cumsum(roots * noise.steps, axis=0)]
        )

    kept = np.searchsorted(times, coarse_times)
    np.testing.assert_allclose(
        path(coarse, coarse_times), path(noise, times)[kept], atol=1e-13
    )
    np.testing.assert_array_equal(coarse.start, noise.start)
    uniform = coarser_noise(noise, np.arange(n_steps + 1.0)).steps[0]
    np.testing.assert_allclose(
        uniform, (noise.steps[0] + noise.steps[1]) / np.sqrt(2), rtol=1e-12
    )


@dataclass(frozen=True, kw_only=True)
class Difference(CompositeEstimator):
    """Rows of one level of the telescoping sum."""

    estimand: ClassVar[str] = "gradient"
    of: str = "pathwise"

    def run(self, runner):
        inner, noise = registry.estimator(self.of), runner.noise()
        (fine,) = runner.run(inner, noise=noise)
        (coarse,) = runner.run(
            inner,
            noise=coarser_noise(noise, runner.times),
            times=coarser(runner.times),
        )
        return fine - coarse


@pytest.mark.parametrize(
    ("spec", "inner", "order"),
    [
        ("brownian_linear", "pathwise", 2.0),
        ("gaussian_tilt", "pathwise", 2.0),
        ("brownian_linear", "reinforce:baseline=none", 1.0),
        ("ou_linear", "reinforce:baseline=none", 1.0),
    ],
)
def test_differences_of_levels_decay(spec, inner, order):
    """Variance like h^2, and like h for stochastic integrals of the state.

    Slopes of eight independent ladders, with a band of 0.3 for h that is not small
    yet; the other order lies outside.
    """
    problem, sizes = registry.problem(spec), (64, 128, 256)
    x = np.log(sizes) - np.mean(np.log(sizes))
    slopes = []
    for seed in range(8):
        variances = []
        for n_steps in sizes:
            settings = make_settings(
                problem, n_steps=n_steps, n_paths=4096, seed=40 + seed
            )
            (rows,) = make_rows(problem, Difference(of=inner), settings)
            variances.append(np.var(rows, axis=1).sum())
        slopes.append(-x @ np.log(variances) / (x @ x))
    margin = t_quantile(1 - LIMIT, 7) * np.std(slopes, ddof=1) / np.sqrt(8)
    assert margin < 0.35
    assert abs(np.mean(slopes) - order) < 0.3 + margin


def test_multilevel_evaluations_are_those_of_its_grids():
    """n_l paths of N_l + N_{l+1} steps, the coarsest alone."""
    n_paths, estimator = 64, wrap("multilevel")
    row = measure(
        "ou_linear", estimator, n_steps=14, n_paths=n_paths, n_replicates=2
    ).row
    counts = allocation(n_paths, 3, 1.5)
    steps = [14 + 7, 7 + 4, 4]
    total = sum(a * b for a, b in zip(counts, steps, strict=True))
    assert row["drift_evaluations"] == total / n_paths


def test_levels_have_noise_of_their_own():
    """The variance is the sum over levels: no level reuses the noise of another."""
    problem, n_paths, count = registry.problem("gaussian_tilt"), 64, 400
    estimator = wrap("multilevel", levels=2, exponent=0.0)
    settings = make_settings(problem, n_steps=8, n_paths=n_paths, seed=35)
    mine = np.trace(np.cov(make_estimates(problem, estimator, settings, count).T))
    fine = make_rows(problem, Difference(), settings, count)
    coarse = make_rows(
        problem,
        registry.estimator("pathwise"),
        make_settings(problem, n_steps=4, n_paths=n_paths, seed=36),
        count,
    )
    expected = sum(
        np.var(rows, axis=2).sum(axis=1).mean() / (n_paths / 2)
        for rows in (fine, coarse)
    )
    ratio = mine / expected
    spread = norm.isf(LIMIT / 2) * np.sqrt(2 / count)
    assert abs(ratio - 1) < spread + 0.05
