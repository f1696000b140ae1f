"""Truncated backpropagation: DRaFT-K, AlignProp, Russian roulette, DRaFT-LV, ReFL.

Expectations are exact (see `_expectation`); own randomness is given or integrated over.
"""

from __future__ import annotations

import numpy as np
import pytest
from _expectation import (
    close,
    expectation,
    grid,
    problem,
    steps_of,
    theta_of,
    view_of,
)
from scipy.special import ndtri
from scipy.stats import chisquare

from sdebench import registry
from sdebench.errors import NotApplicableError, ParameterError, UnknownNameError
from sdebench.estimator import Sizes
from sdebench.estimators.truncated import KERNELS, _draw
from sdebench.measure import measure, measure_group
from sdebench.measure.workers import NumbaWorker, Settings
from sdebench.simulate.torch_family import torch_family

FALSE_ALARM = 1e-4
"""Of each statistical test here, divided by its number of comparisons."""
TILTED = (
    "gaussian_tilt:mean=0.3",
    "gaussian_tilt:schedule=linear_flow,start_time=0.05",
    "gaussian_tilt:schedule=cosine,start_time=0.1,mean=-0.4",
    "gaussian_tilt:schedule=ve,rate=3.0,mean=0.5",
)
CHAINS = ("brownian_linear", "damped_oscillator", "ou_linear:dim=2", *TILTED)
ANY = ("damped_oscillator", "two_modes", "four_modes")


def truncated(method, **options):
    return registry.estimator("truncated", method=method, **options)


def normal_of(number, count):
    """The normal that draws the ``number``-th of ``count`` values, from 0."""
    return np.full((1, 1, 1), ndtri((number + 0.5) / count))


def cell(spec):
    chosen = problem(spec)
    times = grid(chosen, steps_of(chosen))
    theta = theta_of(chosen)
    return chosen, theta, times, chosen.truth.policy_chain(theta, times)


def single_steps(policy, reward_only):
    """The expectation of every step's term (N, P)."""
    return np.array(
        [
            policy.gradient(reward_only=reward_only, step_weights=one)
            for one in np.eye(policy.chain.n_steps)
        ]
    )


# ---- windows ----------------------------------------------------------------
@pytest.mark.parametrize("objective", ["reward", "control"])
@pytest.mark.parametrize("spec", CHAINS)
def test_draft_k_misses_exactly_the_early_steps(spec, objective):
    """Its bias is minus the early terms.  Fails with K - 1 or K + 1 steps."""
    chosen, theta, times, policy = cell(spec)
    terms = single_steps(policy, objective == "reward")
    full = policy.gradient(reward_only=objective == "reward")
    close(terms.sum(0), full)
    for k in range(1, policy.chain.n_steps + 1):
        estimator = truncated("draft_k", n_last=k, objective=objective)
        mean = expectation(estimator, chosen, theta, times)
        scale = np.max(np.abs(full))
        close(mean, estimator.target(policy), scale)
        close(mean - full, -terms[: len(terms) - k].sum(0), scale)


@pytest.mark.parametrize("objective", ["reward", "control"])
@pytest.mark.parametrize("spec", ANY)
def test_random_lengths_are_draft_k_of_that_length(spec, objective):
    """Path by path; the mean over lengths of the roulette is pathwise, path by path."""
    chosen = problem(spec)
    times, n_steps = grid(chosen, 5), 5
    roulette = 0.0
    for k in range(1, n_steps + 1):
        view = view_of(chosen, theta_of(chosen), times)
        view.own = np.broadcast_to(
            normal_of(k - 1, n_steps), (1, view.n_paths, view.dim)
        )
        window = truncated("draft_k", n_last=k, objective=objective).statistics(view)
        drawn = truncated("alignprop", objective=objective).statistics(view)
        close(drawn.numpy(), window.numpy())
        weighted = truncated("russian_roulette", objective=objective)
        roulette = roulette + weighted.statistics(view).numpy() / n_steps
    full = registry.estimator("pathwise", objective=objective).statistics(view)
    close(roulette, full.numpy())
    close(window.numpy(), full.numpy())


@pytest.mark.parametrize("objective", ["reward", "control"])
@pytest.mark.parametrize("spec", CHAINS)
def test_random_lengths_have_the_mean_of_their_targets(spec, objective):
    chosen, theta, times, policy = cell(spec)
    n_steps = policy.chain.n_steps
    full = policy.gradient(reward_only=objective == "reward")
    for method in ("alignprop", "russian_roulette"):
        estimator = truncated(method, objective=objective)
        means = [
            expectation(estimator, chosen, theta, times, normal_of(k, n_steps))
            for k in range(n_steps)
        ]
        close(np.mean(means, axis=0), estimator.target(policy), np.max(np.abs(full)))
    close(estimator.target(policy), full)


def test_lengths_are_uniform_and_of_their_own():
    """Chi-square of 4000 draws, at FALSE_ALARM; the paths' noise is another one."""
    chosen = problem("damped_oscillator")
    view = view_of(chosen, theta_of(chosen), grid(chosen, 7), n_paths=4000)
    lengths = _draw(view, 3, 9).numpy()
    counts = np.bincount(lengths, minlength=10)
    assert not np.any(counts[:3])
    assert counts.sum() == counts[3:10].sum()
    assert chisquare(counts[3:10]).pvalue > FALSE_ALARM
    for n in range(7):
        assert not np.any(view.noise(n).numpy() == view.noise(7).numpy())


@pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("spec", ["damped_oscillator", "ou_quadratic_easy:dim=3"])
def test_the_kernels_draw_the_same_lengths(spec, dtype):
    """Own normals of a block that does not begin at path 0, dim not dividing 4."""
    chosen = problem(spec)
    settings = Settings(
        times=grid(chosen, 7),
        theta=theta_of(chosen),
        n_paths=100,
        backend="numba",
        dtype=dtype,
        device="cpu",
        seed=7,
    )
    tables = chosen.tables(settings.theta, settings.times)
    group = [truncated("russian_roulette"), truncated("alignprop")]
    rows, _, _ = NumbaWorker(tables, group, settings).block(1, 37, 100)
    view = view_of(
        chosen,
        settings.theta,
        settings.times,
        first_path=37,
        n_paths=100,
        dtype=dtype,
    )
    limit = {"float64": 1e-11, "float32": 1e-4}[dtype]
    for estimator, mine in zip(group, rows, strict=True):
        theirs = estimator.statistics(view).numpy().T
        close(mine[:, :100], theirs, limit=limit)


# ---- denoised predictions ---------------------------------------------------
def predictions(chosen, theta, times, n, x):
    """D_n(x) under parameters theta, through the tables."""
    tables = chosen.tables(theta, times)
    family = torch_family(tables, "float64", "cpu")
    p, q, s = tables.denoiser[n, :3]
    return p * x + q * family.base_mean(n, x) + s * family.control(n, x)


@pytest.mark.parametrize("spec", TILTED)
def test_the_prediction_is_the_posterior_mean_of_the_tilted_data(spec):
    """E[X_T | X_t] of data N(m', C') noised to alpha X_T + beta z."""
    chosen = problem(spec)
    theta, times = theta_of(chosen), grid(chosen, 6)
    variance = 1.0 / (1.0 / chosen.variance + theta[1])
    mean = variance * (chosen.mean / chosen.variance + theta[0])
    schedule = chosen.family.base.schedule
    x = view_of(chosen, theta, times).rollout().states[3]
    denoiser = chosen.tables(theta, times).denoiser
    for n, t in enumerate(times[:-1]):
        alpha, noise = schedule.alpha(t), schedule.variance(t)
        gain = alpha * variance / (alpha**2 * variance + noise)
        exact = mean + gain * (x.numpy() - alpha * mean)
        close(predictions(chosen, theta, times, n, x).numpy(), exact)
        close(denoiser[n, 3:], np.array([alpha, np.sqrt(noise)]))


def quotient(chosen, theta, times, n, x, reward):
    """Difference quotients of -r(D_n(x)) in theta at fixed x, (n_paths, P)."""
    step, columns = 1e-3, []
    for direction in np.eye(chosen.n_params):
        at = {
            k: -reward(predictions(chosen, theta + k * step * direction, times, n, x))
            for k in (-2, -1, 1, 2)
        }
        columns.append((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step))
    return np.array([column.numpy() for column in columns]).T


@pytest.mark.parametrize("spec", ["gaussian_tilt:mean=0.3", "two_modes", "four_modes"])
def test_predictions_are_differentiated_at_fixed_states(spec):
    """Fails with the sign of r, without s_n, with another step or alpha for beta."""
    chosen = problem(spec)
    theta, times, n_steps = theta_of(chosen), grid(chosen, 6), 6
    view = view_of(chosen, theta, times)
    states = view.rollout().states
    alpha, beta = view.denoiser[-1, 3:]
    mine = truncated("draft_lv", n_renoisings=3).statistics(view).numpy()
    noised = [alpha * states[-1] + beta * view.noise(n_steps + i) for i in range(3)]
    exact = np.mean(
        [quotient(chosen, theta, times, 5, x, view.reward) for x in noised], axis=0
    )
    close(mine, exact, limit=1e-7)
    for i, n in enumerate((4, 5)):
        view.own = np.broadcast_to(normal_of(i, 2), (1, view.n_paths, view.dim))
        mine = truncated("refl", late_share=0.3).statistics(view).numpy()
        exact = quotient(chosen, theta, times, n, states[n], view.reward)
        close(mine, exact, limit=1e-7)


@pytest.mark.parametrize("spec", TILTED)
def test_predictions_have_the_mean_of_their_targets(spec):
    chosen, theta, times, policy = cell(spec)
    for count in (1, 2):
        estimator = truncated("draft_lv", n_renoisings=count)
        mean = expectation(estimator, chosen, theta, times, own_normals=count)
        close(mean, estimator.target(policy))
    for share, late in ((0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)):
        estimator = truncated("refl", late_share=share)
        means = [
            expectation(estimator, chosen, theta, times, normal_of(i, late))
            for i in range(late)
        ]
        close(np.mean(means, axis=0), estimator.target(policy))
    # E r(D) is not E r(X_N): the bias is there, and known
    gap = estimator.target(policy) - policy.gradient(reward_only=True)
    assert np.linalg.norm(gap) > 0.01 * np.linalg.norm(estimator.target(policy))


def test_renoising_lowers_the_variance_of_draft_1():
    """Exact for one path: the name LV; with many draws little more than X_N varies."""
    chosen = problem("gaussian_tilt")
    group = [
        truncated("draft_k"),
        *(truncated("draft_lv", n_renoisings=n) for n in (1, 8)),
    ]
    rows = measure_group(chosen, group, n_paths=256, n_replicates=32, seed=1)
    variances = [m.row["variance"] for m in rows]
    assert variances[0] > variances[1] > variances[2]


# ---- the harness judges them ------------------------------------------------
@pytest.mark.parametrize("objective", ["reward", "control"])
def test_verdicts(objective):
    """p-values at FALSE_ALARM altogether; what is left out is reported exactly."""
    chosen = problem("damped_oscillator")
    group = [
        truncated(method, objective=objective)
        for method in ("draft_k", "alignprop", "russian_roulette")
    ]
    rows = [
        m.row
        for m in measure_group(chosen, group, n_steps=6, n_paths=512, n_replicates=32)
    ]
    policy = chosen.truth.policy_chain("halfway", 6)
    terms = single_steps(policy, objective == "reward")
    for row in rows:
        assert row["p_value_own"] > FALSE_ALARM / len(rows)
    assert rows[0]["verdict"] == rows[1]["verdict"] == "unbiased for its target"
    assert rows[2]["verdict"] == "discretization bias only"
    missing = np.linalg.norm(terms[:-1].sum(0)) / rows[0]["scale"]
    np.testing.assert_allclose(rows[0]["relative_bias_target"], missing, rtol=1e-10)


# ---- refusals ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_last": 0}, "n_last 0 must be"),
        ({"n_last": -2}, "n_last -2 must be"),
        ({"method": "draft_lv", "n_renoisings": 0}, "n_renoisings 0 must be"),
        ({"method": "refl", "late_share": 0.0}, "late_share 0.0 must be in"),
        ({"method": "refl", "late_share": 1.5}, "late_share 1.5 must be in"),
        ({"method": "refl", "objective": "control"}, "use objective reward"),
        ({"method": "draft_lv", "objective": "control"}, "use objective reward"),
        ({"method": "alignprop", "n_last": 3}, "option of method draft_k"),
        ({"method": "draft_k", "n_renoisings": 3}, "option of method draft_lv"),
        ({"method": "draft_lv", "late_share": 0.5}, "option of method refl"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ParameterError, match=words):
        registry.estimator("truncated", **options)


def test_unknown_methods_are_refused():
    with pytest.raises(UnknownNameError, match="draft_k"):
        truncated("draft")
    with pytest.raises(UnknownNameError, match="reward"):
        truncated("draft_k", objective="rewards")


def test_a_window_longer_than_the_chain_is_refused():
    settings = {"n_steps": 4, "n_paths": 16, "n_replicates": 2}
    with pytest.raises(NotApplicableError, match="longer than the chain of 4 steps"):
        measure("damped_oscillator", "truncated:n_last=5", **settings)
    whole = truncated("draft_k", n_last=4)
    assert whole.not_applicable_to(Sizes(16, 4, 2, 3)) is None
    assert measure("damped_oscillator", whole, **settings).status == "ok"


@pytest.mark.parametrize("method", ["draft_lv", "refl"])
@pytest.mark.parametrize(
    ("spec", "scheme"),
    [
        ("ou_linear", "euler_maruyama"),
        ("follmer_mixture", "euler_maruyama"),
        ("gaussian_tilt", "exponential"),
    ],
)
def test_predictions_need_a_denoiser(spec, scheme, method):
    with pytest.raises(NotApplicableError, match="denoised prediction"):
        measure(
            spec,
            truncated(method),
            n_steps=4,
            n_paths=16,
            n_replicates=2,
            scheme=scheme,
        )


def test_every_method_needs_the_reward_gradient():
    for method in KERNELS:
        assert "reward_gradient" in truncated(method).needs
