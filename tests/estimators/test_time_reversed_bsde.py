"""Time-reversed BSDEs: label errors with the exact costate, and exact limits.

Statistical tests have fixed seeds.  Those of means are t-tests that share FALSE_ALARM;
label errors are root mean squares over 20,000 paths, known to about 2 % (their tails
are heavy), and compared with numbers given to three digits at a tolerance of 5 %.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from _replicates import make_estimates, make_rows, make_settings

from sdebench import registry
from sdebench.errors import NotApplicableError, ParameterError, UnknownNameError
from sdebench.estimators import _costate_regression as regression
from sdebench.estimators._costate_network import NetworkScore, NetworkSlice
from sdebench.estimators.non_adapted_adjoint import NonAdaptedAdjoint
from sdebench.estimators.time_reversed_bsde import TimeReversedBSDE, reversed_costates
from sdebench.measure import measure
from sdebench.measure.intervals import bias_test
from sdebench.simulate.noise import split_seed
from sdebench.view import View

FALSE_ALARM = 1e-4
LADDER = (20, 40, 80, 160)
N_PATHS = 20_000


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@functools.cache
def problem(spec):
    return registry.problem(spec)


def view_of(chosen, n_steps, point="zero", n_paths=N_PATHS, seed=5):
    times, theta = chosen.time_grid(n_steps), chosen.theta(point)
    address = {"key": split_seed(seed), "replicate": 0, "first_path": 0}
    return View(chosen.tables(theta, times), times, theta, n_paths=n_paths, **address)


class Cubic:
    """The exact costate of cubic_costate without control at time t."""

    def __init__(self, t):
        self.late = np.exp(-0.5 * (1.0 - t))
        self.spread = 1.0 - self.late**2

    def __call__(self, x):
        y = self.late * x
        return self.late * (y**3 + 3 * self.spread * y)

    def along(self, x, v):
        return self.late**2 * (3 * (self.late * x) ** 2 + 3 * self.spread) * v

    def trace(self, x, matrix):
        return self.late**3 * 6 * self.late * x * matrix[0, 0]


class Affine:
    """An affine costate S x + s."""

    def __init__(self, S, s):
        self.S, self.s = torch.tensor(S), torch.tensor(s)

    def __call__(self, x):
        return x @ self.S.T + self.s

    def along(self, x, v):
        return v @ self.S.T

    def trace(self, x, matrix):
        return torch.zeros_like(x)


def labels_at_start(estimator, view, phi):
    """Return the states and labels at step 0 with the given costates phi(n)."""
    x = view.rollout().states[-1]
    y = -view.reward_gradient(x)
    for n in reversed(range(view.n_steps)):
        score = estimator.fit_score(view.rollout().states[n + 1])
        x, y = estimator.step_back(view, n, x, y, phi(n + 1), score)
    return x, y


def label_error(estimator, n_steps, shift=0):
    """Return rms and mean of the error of the label at 0, exact cubic costates.

    ``shift`` : steps by which the costate is later than published.
    """
    view = view_of(problem("cubic_costate"), n_steps)
    x, y = labels_at_start(estimator, view, lambda n: Cubic((n - shift) / n_steps))
    gap = (y - Cubic(0.0)(x)).numpy()
    return np.sqrt(np.mean(gap**2)), np.mean(gap)


def slope(errors):
    return -np.polyfit(np.log(LADDER), np.log(errors), 1)[0]


# ---- T1 to T5 of the specification -------------------------------------------------
def test_label_error_of_a_cubic_costate():
    """T1: of order 1/2, the published numbers."""
    errors = [label_error(TimeReversedBSDE(), n)[0] for n in LADDER]
    np.testing.assert_allclose(errors, [0.393, 0.256, 0.173, 0.120], rtol=0.05)
    assert 0.4 < slope(errors) < 0.65


def test_label_error_of_an_affine_costate():
    """T1: of order 1, at a frozen policy."""
    chosen = problem("damped_oscillator")
    errors = []
    for n_steps in LADDER:
        view = view_of(chosen, n_steps, n_paths=2000)
        remaining = chosen.time_grid(n_steps)
        S, s = chosen.model.frozen_costate(np.zeros((2, 2)), np.zeros(2), remaining)
        x, y = labels_at_start(
            TimeReversedBSDE(), view, lambda n, S=S, s=s: Affine(S[n], s[n])
        )
        gap = y - Affine(S[0], s[0])(x)
        errors.append(float(gap.square().mean().sqrt()))
    assert 0.9 < slope(errors) < 1.1


def test_misaligned_increments():
    """T2: at least twice the error; at the released code's times its numbers."""
    wrong = TimeReversedBSDE(increments="misaligned")
    for n_steps, published in zip(LADDER, (0.81, 0.59, 0.42, 0.30), strict=True):
        error, _ = label_error(wrong, n_steps, shift=1)
        assert error == pytest.approx(published, rel=0.06)
        aligned, _ = label_error(TimeReversedBSDE(), n_steps)
        assert label_error(wrong, n_steps)[0] > 2.0 * aligned


class HalfTrace(TimeReversedBSDE):
    """D / 2 in the trace term, as in Ito's formula alone."""

    trace_weight = 0.5


def test_half_of_the_trace_term_is_a_bias_that_stays():
    """T3."""
    for n_steps in (40, 160):
        error, mean = label_error(TimeReversedBSDE(), n_steps)
        bound = 5.0 * error / np.sqrt(N_PATHS) + 0.05 * error
        assert abs(mean) < bound
        # tr: 1/2 phi'' integrated, and odd in x: against x itself
        view = view_of(problem("cubic_costate"), n_steps)
        gaps = []
        for kind in (TimeReversedBSDE, HalfTrace):
            x, y = labels_at_start(kind(), view, lambda n, N=n_steps: Cubic(n / N))
            gaps.append(float(((y - Cubic(0.0)(x)) * x).mean()))
        assert abs(gaps[0]) < 0.06
        assert abs(gaps[1]) > 0.3


def test_a_wrong_score_changes_the_states_but_not_the_costate():
    """T4: exact costates, and fitted ones of the cubic."""
    view = view_of(problem("cubic_costate"), 80)
    spreads, fitted = [], []
    points = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]
    for score in ("fitted", "none"):
        estimator = TimeReversedBSDE(score=score, degree=3)
        slices, states, _ = estimator.costates(view, first=0)
        spreads.append(float(states[0].std()))
        fitted.append(slices[0](points).numpy())
    assert spreads[1] > 1.5 * spreads[0]
    exact = Cubic(0.0)(points).numpy()
    scale = np.max(np.abs(exact))
    for values in fitted:
        assert np.max(np.abs(values - exact)) < 0.06 * scale
    assert np.max(np.abs(exact)) > 0.5


def test_labels_are_less_noisy_than_the_lean_adjoint():
    """T5: 2.12 rms noise of e^{-1/2} X_1^3 given X_0, 1.24 rms costate."""
    view = view_of(problem("cubic_costate"), 80)
    states = view.rollout().states
    noise = np.exp(-0.5) * states[-1] ** 3 - Cubic(0.0)(states[0])
    rms = float(noise.square().mean().sqrt())
    assert rms == pytest.approx(2.12, rel=0.06)
    size = float(Cubic(0.0)(states[0]).square().mean().sqrt())
    assert size == pytest.approx(1.24, rel=0.06)
    assert label_error(TimeReversedBSDE(), 80)[0] < 0.1 * rms


# ---- the exact limit of many paths --------------------------------------------------
OPTIONS = (
    {},
    {"degree": 2},
    {"adjoint": "full"},
    {"increments": "misaligned"},
    {"score": "none"},
    {"adjoint": "full", "increments": "misaligned", "score": "none"},
)
CHAINS = ("damped_oscillator", "ou_quadratic_hard:dim=2", "lq_oscillator:horizon=1")


@pytest.mark.parametrize("spec", CHAINS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_limit_is_exact(spec, options):
    """4096 paths: the finite-sample bias is below a tenth of the standard error."""
    chosen, estimator = problem(spec), TimeReversedBSDE(**options)
    settings = make_settings(chosen, point="overshoot", n_steps=5, n_paths=4096)
    values = make_estimates(chosen, estimator, settings, 24)
    policy = chosen.truth.policy_chain("overshoot", 5)
    target = estimator.target(policy)
    limit = FALSE_ALARM / (len(CHAINS) * len(OPTIONS))

    def p_value(wanted):
        return bias_test(values.mean(0), wanted, np.cov(values.T), len(values)).p_value

    assert p_value(target) > limit
    # and the gradient that it approximates is told apart from it
    exact = chosen.truth.answer(estimator.estimand, "overshoot", 5)
    assert p_value(exact) < limit


def test_the_limit_tends_to_the_gradient_at_order_one():
    chosen = problem("lq_oscillator:horizon=1")
    for adjoint in ("frozen", "full"):
        estimator = TimeReversedBSDE(adjoint=adjoint)
        exact = chosen.truth.answer(estimator.estimand, "halfway")
        gaps = [
            estimator.target(chosen.truth.policy_chain("halfway", n)) - exact
            for n in (400, 800)
        ]
        assert np.linalg.norm(gaps[0]) > 1e-6
        rest = np.linalg.norm(2.0 * gaps[1] - gaps[0]) / np.linalg.norm(gaps[0])
        assert rest < 0.05


def start_limit(chosen, policy):
    """The limit of many paths of `TimeReversedBSDE.start_gradient`, full adjoint."""
    S, s = reversed_costates(policy, full=True, aligned=True, fitted=True)
    mean, covariance = chosen.model.start_mean, chosen.model.start_covariance
    return np.append(S[0] @ mean + s[0], (S[0] @ covariance).ravel())


@pytest.mark.parametrize("point", ["halfway", "optimum"])
def test_gradient_in_the_initial_law(point):
    """The limit of many paths exactly, and J's gradient up to the time step."""
    chosen, count = problem("damped_oscillator"), 24
    estimator = TimeReversedBSDE(adjoint="full")
    found = []
    for seed in range(count):
        view = view_of(chosen, 20, point, n_paths=2048, seed=seed)
        mean, moment = estimator.start_gradient(view)
        found.append(np.append(mean.numpy(), moment.numpy().ravel()))
    found = np.array(found)
    policy = chosen.truth.policy_chain(point, 20)
    limit = start_limit(chosen, policy)
    # the sample's own covariance stands for E (X_0 - m)(X_0 - m)^T: bias 1/n_paths
    allowed = 2.0 / 2048 * np.max(np.abs(limit))
    covariance = np.cov(found.T)
    test = bias_test(found.mean(0), limit, covariance, count, allowed)
    assert test.p_value > FALSE_ALARM / 2
    exact = np.concatenate([p.ravel() for p in chosen.truth.start_gradient(point)])
    gaps = [
        start_limit(chosen, chosen.truth.policy_chain(point, n)) - exact
        for n in (400, 800)
    ]
    assert np.linalg.norm(2.0 * gaps[1] - gaps[0]) < 0.05 * np.linalg.norm(gaps[0])
    halved = bias_test(found.mean(0), 0.5 * limit, covariance, count, allowed)
    assert halved.p_value < FALSE_ALARM / 2


@pytest.mark.slow
def test_the_comparator_has_the_gradient_of_the_chain_as_limit():
    for spec in ("damped_oscillator", "cubic_costate"):
        chosen = problem(spec)
        settings = make_settings(chosen, point="overshoot", n_steps=5, n_paths=4096)
        values = make_estimates(chosen, NonAdaptedAdjoint(), settings, 24)
        for answer, right in (("matching_gradient", True), ("gradient", False)):
            exact = getattr(chosen.truth, answer)("overshoot", 5)
            test = bias_test(values.mean(0), exact, np.cov(values.T), len(values))
            assert (test.p_value > FALSE_ALARM / 2) is right


def test_variance_is_below_that_of_the_lean_adjoint():
    chosen = problem("damped_oscillator:noise_level=5.0")
    settings = make_settings(chosen, n_steps=20, n_paths=512)
    spread = {
        name: make_estimates(chosen, registry.estimator(name), settings, 48).var(0)
        for name in ("time_reversed_bsde", "adjoint_matching")
    }
    ratio = spread["time_reversed_bsde"].sum() / spread["adjoint_matching"].sum()
    assert ratio < 1.0


# ---- the regression ------------------------------------------------------------------
@pytest.mark.parametrize(("dim", "degree"), [(1, 1), (1, 5), (3, 2), (4, 3)])
def test_the_table_of_monomials(dim, degree):
    table = regression.factor_table.py_func(dim, degree)
    wanted = itertools.combinations_with_replacement(range(dim + 1), degree)
    np.testing.assert_array_equal(table, list(wanted))
    assert len(table) == regression.n_features(dim, degree)


@pytest.mark.parametrize(("dim", "degree"), [(1, 1), (1, 3), (3, 3)])
def test_derivatives_of_a_fitted_costate(dim, degree):
    """Against automatic differentiation; a polynomial of the degree is its own fit."""
    generator = torch.Generator().manual_seed(2)
    options = {"generator": generator, "dtype": torch.float64}
    x, v = torch.randn(200, dim, **options), torch.randn(200, dim, **options)
    direction = torch.randn(dim, dim, **options)

    def exact(x):
        return torch.sin(x[:, :1]) * 0.0 + (x @ direction + 0.3) ** degree

    fitted = regression.Slice.fit(x, exact(x), degree)
    x.requires_grad_(True)
    values = exact(x)
    torch.testing.assert_close(fitted(x.detach()), values.detach(), rtol=0, atol=1e-7)
    matrix = direction @ direction.T
    for i in range(dim):
        (slope,) = torch.autograd.grad(values[:, i].sum(), x, create_graph=True)
        along = (slope * v).sum(1)
        got = fitted.along(x.detach(), v)[:, i]
        torch.testing.assert_close(got, along.detach(), rtol=0, atol=1e-6)
        if degree == 1:
            continue
        trace = sum(
            torch.autograd.grad(slope[:, j].sum(), x, retain_graph=True)[0]
            @ matrix[:, j]
            for j in range(dim)
        )
        got = fitted.trace(x.detach(), matrix)[:, i]
        torch.testing.assert_close(got, trace.detach(), rtol=0, atol=1e-6)


def test_the_score_minimizes_implicit_score_matching():
    """Any small change of the affine score raises E[1/2 |s|^2 + div s]."""
    rng = np.random.default_rng(3)
    sample = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 2)) + [1.0, -2.0]
    slope, offset = (
        part.numpy() for part in regression.gaussian_score(torch.tensor(sample))
    )

    def loss(A, b):
        score = sample @ A.T + b
        return 0.5 * np.mean(np.sum(score**2, axis=1)) + np.trace(A)

    least = loss(slope, offset)
    for _ in range(20):
        dA, db = 1e-3 * rng.normal(size=(2, 2)), 1e-3 * rng.normal(size=2)
        assert loss(slope + dA, offset + db) > least
    found = np.zeros((2, 2)), np.zeros(2)
    regression.fit_gaussian_score(np.ascontiguousarray(sample.T), 500, *found)
    np.testing.assert_allclose(found[0], slope, rtol=1e-10)
    np.testing.assert_allclose(found[1], offset, rtol=1e-10)


# ---- networks ------------------------------------------------------------------------
def normals(*shape, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_derivatives_of_a_network():
    """Values, products, trace and divergence against automatic differentiation."""
    x, v, labels = normals(50, 3), normals(50, 3, seed=8), normals(50, 3, seed=9)
    fitted = NetworkSlice.fit(x, labels + torch.sin(2.0 * x), 2, None)
    assert fitted.network.outer.abs().max() > 0.01
    matrix = v[:3].T @ v[:3]
    for i in range(3):
        slopes = torch.func.vmap(torch.func.grad(lambda s, i=i: fitted(s[None])[0, i]))
        bends = torch.func.vmap(
            torch.func.hessian(lambda s, i=i: fitted(s[None])[0, i])
        )
        torch.testing.assert_close(fitted.along(x, v)[:, i], (slopes(x) * v).sum(1))
        trace = (bends(x) * matrix).sum((1, 2))
        torch.testing.assert_close(fitted.trace(x, matrix)[:, i], trace)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda s: fitted.network(s[None])[0]))
    divergence = jacobians(x).diagonal(dim1=1, dim2=2).sum(1)
    found = fitted.network.divergence(x, torch.ones(3, dtype=x.dtype))
    torch.testing.assert_close(found, divergence)


def test_a_network_fits_what_a_line_cannot():
    """A cubic: a line leaves most of it, a network less than a fiftieth of that."""
    x = normals(1000, 1)
    line, network = (
        fit(x, x**3, 1).__call__(x) - x**3
        for fit in (regression.Slice.fit, lambda *a: NetworkSlice.fit(*a, None))
    )
    assert network.square().mean() < 0.02 * line.square().mean()
    # and the same paths give the same bits
    again = NetworkSlice.fit(x, x**3, 1, None)(x) - x**3
    assert torch.equal(again, network)


def test_the_score_of_two_modes_by_a_network():
    """Its implicit score-matching loss lies between the exact score's and a line's."""
    x = normals(4000, 1) * 0.5
    x[::2] += 1.5
    x[1::2] -= 1.5

    def exact(s):
        return (1.5 * torch.tanh(6.0 * s) - s) / 0.25

    def error(score):
        return (score(x) - exact(x)).square().mean() / exact(x).square().mean()

    slope, offset = regression.gaussian_score(x)
    assert error(lambda s: s @ slope.T + offset) > 0.5
    assert error(NetworkScore.fit(x, None)) < 0.1


@pytest.mark.parametrize("score", ["fitted", "network"])
def test_networks_where_the_costate_is_cubic(score):
    """A network leaves less than a tenth of what a line misses at time 0."""
    view = view_of(problem("cubic_costate"), 10, n_paths=2000)

    def error(features):
        estimator = TimeReversedBSDE(features=features, score=score)
        phi = estimator.costates(view, first=0)[0][0]
        x = torch.linspace(-2.0, 2.0, 101, dtype=torch.float64)[:, None]
        exact = Cubic(0.0)(x)
        return float((phi(x) - exact).square().mean() / exact.square().mean())

    line = error("polynomials")
    assert line > 0.05
    assert error("network") < 0.1 * line


def test_networks_need_torch():
    for options in ({"features": "network"}, {"score": "network"}):
        with pytest.raises(NotApplicableError, match="use backend torch"):
            measure("cubic_costate", TimeReversedBSDE(**options), n_paths=16, n_steps=2)


# ---- bad input ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"degree": 0}, ParameterError, "degree 0"),
        ({"degree": 9}, ParameterError, "degree 9"),
        ({"degree": True}, ParameterError, "degree"),
        ({"adjoint": "lean"}, UnknownNameError, "frozen"),
        ({"increments": "align"}, UnknownNameError, "aligned"),
        ({"score": "exact"}, UnknownNameError, "fitted"),
        ({"features": "networks"}, UnknownNameError, "network"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message) as caught:
        TimeReversedBSDE(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["time_reversed_bsde", "non_adapted_adjoint"])
def test_fewer_paths_than_features_are_refused(name):
    chosen = problem("ou_quadratic_easy")  # 20 dimensions, 231 features of degree 2
    with pytest.raises(NotApplicableError, match="231 features"):
        measure(chosen, registry.estimator(name, degree=2), n_paths=231, n_steps=3)
    with pytest.raises(NotApplicableError, match="paths"):
        measure(chosen, registry.estimator(name), n_paths=6, n_steps=3)


def test_a_start_at_a_point_is_no_degenerate_regression():
    for name in ("time_reversed_bsde", "non_adapted_adjoint"):
        settings = make_settings(problem("brownian_linear"), n_steps=4, n_paths=16)
        rows = make_rows(problem("brownian_linear"), registry.estimator(name), settings)
        assert np.all(np.isfinite(rows))
