"""Mean and covariance of X_0 among the parameters: exact answers, then estimators.

The statistical tests have fixed seeds.  All their p-values together fail by chance with
probability at most FALSE_ALARM: the threshold of one is FALSE_ALARM over their number.
"""

import dataclasses

import numpy as np
import pytest
from scipy.stats import multivariate_normal

import sdebench
from sdebench import registry
from sdebench.closed_form.initial_law import InitialLawFamily, relative_entropy
from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.errors import NotApplicableError, ParameterError
from sdebench.linear_problem import LinearProblem
from sdebench.measure import measure, measure_group
from sdebench.measure.intervals import t_quantile
from sdebench.measure.workers import Settings, make_worker
from sdebench.simulate.noise import split_seed
from sdebench.simulate.torch_family import TorchLinear
from sdebench.view import View

FALSE_ALARM = 1e-4
POINTS = ("zero", "halfway", "optimum", "overshoot")
N_STEPS = 5
TENTH = np.array([5 / 6, -5 / 21, 5 / 84, -5 / 504, 1 / 1260])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skewed(LinearProblem):
    """Correlated X_0 off the origin, and a reward with a linear part."""

    initial_law: bool = True
    degenerate: bool = False

    def build(self):
        factor = np.array([[0.9, 0.4], [-0.3, 0.0 if self.degenerate else 0.7]])
        covariance = factor @ factor.T
        if self.degenerate:
            covariance = np.diag([1.0, 0.0])
        return LinearQuadratic(
            drift_matrix=np.array([[-0.3, 0.8], [-0.5, -0.2]]),
            drift_offset=np.array([0.2, -0.1]),
            diffusion=np.array([[0.7, 0.1], [0.3, 0.5]]),
            running=np.array([[0.4, 0.1], [0.1, 0.3]]),
            reward_quadratic=np.array([[0.8, 0.2], [0.2, 0.6]]),
            reward_linear=np.array([0.5, -0.7]),
            reward_constant=0.3,
            horizon=1.0,
            start_mean=np.array([0.4, -0.6]),
            start_covariance=covariance,
        )


OSCILLATOR = sdebench.problem("lq_oscillator", initial_law=True)
SKEWED = Skewed()
both = pytest.mark.parametrize("problem", [OSCILLATOR, SKEWED], ids=lambda p: p.name)


def without(problem):
    return dataclasses.replace(problem, initial_law=False)


def own(problem):
    """Indices of the parameters of the start law."""
    return np.arange(len(without(problem).parameter_names), problem.n_params)


def off_line(problem):
    """A theta on no line through zero and the optimum, and all entries not zero."""
    rng = np.random.default_rng(4)
    return problem.theta("halfway") + 0.1 * rng.uniform(0.5, 1.0, problem.n_params)


def differences(function, theta, step=0.01):
    """Return the slopes of a function of theta, by differences of order ten."""
    rows = []
    for e in np.eye(len(theta)):
        terms = [
            c * (function(theta + k * step * e) - function(theta - k * step * e))
            for k, c in enumerate(TENTH, 1)
        ]
        rows.append(sum(terms) / step)
    return np.array(rows)


# ---- the family --------------------------------------------------------------------


def test_names_and_layout():
    assert OSCILLATOR.parameter_names[-5:] == (
        "initial_mean_0",
        "initial_mean_1",
        "initial_factor_0_0",
        "initial_factor_1_0",
        "initial_factor_1_1",
    )
    tables = SKEWED.tables(off_line(SKEWED), SKEWED.time_grid(3))
    mu, (a, b, c) = off_line(SKEWED)[-5:-3], off_line(SKEWED)[-3:]
    base = SKEWED.tables(None, SKEWED.time_grid(3))
    np.testing.assert_allclose(
        tables.start_mean, base.start_mean + base.start_factor @ mu, rtol=1e-14
    )
    matrix = np.array([[1 + a, 0.0], [b, 1 + c]])
    np.testing.assert_allclose(tables.start_factor, base.start_factor @ matrix)
    assert not np.any(tables.basis[own(SKEWED)])
    plain = without(SKEWED).tables(None, SKEWED.time_grid(3))
    assert plain.start_cost_gradient.size == plain.start_mean_derivative.size == 0


@both
def test_tables_hold_the_derivatives_of_the_start(problem):
    theta, times = off_line(problem), problem.time_grid(2)
    tables = problem.tables(theta, times)
    for derivative, field in (
        ("start_mean_derivative", "start_mean"),
        ("start_factor_derivative", "start_factor"),
        ("start_cost_gradient", "start_cost"),
    ):
        numeric = differences(
            lambda t, field=field: getattr(problem.tables(t, times), field), theta
        )
        exact = getattr(tables, derivative)
        shape = exact.shape
        np.testing.assert_allclose(exact, numeric.reshape(shape), atol=1e-10)


def test_the_cost_is_the_relative_entropy():
    family = InitialLawFamily(np.array([0.3, -1.0]), np.array([[2.0, 0.3], [0.1, 0.5]]))
    parameters = np.array([0.4, -0.2, 0.5, 0.3, -0.4])
    mean, factor = family.moments(parameters)
    laws = (mean, factor @ factor.T, family.mean, family.factor @ family.factor.T)
    assert family.cost(parameters) == pytest.approx(relative_entropy(*laws), rel=1e-13)
    x = mean + np.random.default_rng(1).normal(size=(200_000, 2)) @ factor.T
    values = multivariate_normal(*laws[:2]).logpdf(x)
    values -= multivariate_normal(*laws[2:]).logpdf(x)
    z = (values.mean() - family.cost(parameters)) / (values.std() / np.sqrt(len(x)))
    assert abs(z) < 3.9  # false alarm 1e-4
    np.testing.assert_allclose(family.parameters_of(*laws[:2]), parameters, rtol=1e-12)


# ---- exact answers -----------------------------------------------------------------


@both
def test_the_optimum_has_no_initial_value_bias(problem):
    """J(theta*) = -log Z, below the least cost from the base's start law."""
    truth = problem.truth
    least = -truth.log_normalizer()
    assert truth.objective("optimum") == pytest.approx(least, abs=1e-12)
    assert truth.optimal_cost() == pytest.approx(least, abs=1e-12)
    assert truth.optimal_cost() < without(problem).truth.optimal_cost() - 0.01
    for estimand in ("gradient", "matching_gradient"):
        assert np.max(np.abs(truth.answer(estimand, "optimum"))) < 1e-12
    assert np.min(np.abs(problem.theta_star[own(problem)[2:]])) > 0.01


@both
@pytest.mark.parametrize("n_steps", [None, N_STEPS])
def test_base_law_and_normalizer_do_not_depend_on_theta(problem, n_steps):
    plain = without(problem).truth
    got = problem.truth.log_normalizer(n_steps)
    assert got == pytest.approx(plain.log_normalizer(n_steps), rel=1e-13)
    chain = problem.truth.policy_chain(off_line(problem), N_STEPS).chain
    assert chain.log_normalizer() == pytest.approx(plain.log_normalizer(N_STEPS))
    for name in ("objective", "reward_only_objective"):
        at_zero = getattr(problem.truth, name)("zero", n_steps)
        assert at_zero == pytest.approx(getattr(plain, name)("zero", n_steps))


@both
@pytest.mark.parametrize("n_steps", [None, N_STEPS])
@pytest.mark.parametrize("kind", ["", "reward_only_"])
def test_gradients_against_differences(problem, n_steps, kind):
    truth, theta = problem.truth, off_line(problem)
    exact = getattr(truth, f"{kind}gradient")(theta, n_steps)
    numeric = differences(
        lambda t: getattr(truth, f"{kind}objective")(t, n_steps), theta
    )
    scale = np.linalg.norm(exact)
    np.testing.assert_allclose(exact, numeric, rtol=0, atol=1e-10 * scale)
    assert np.min(np.abs(exact[own(problem)])) > 1e-4  # none is vacuous


@both
def test_regret_is_control_error_and_divergence(problem):
    truth = problem.truth
    for theta in (*map(problem.theta, POINTS), off_line(problem)):
        regret = truth.objective(theta) - truth.optimal_cost()
        half = 0.5 * truth.control_error(theta) ** 2
        divergence = truth.start_divergence(theta)
        assert regret == pytest.approx(half + divergence, abs=1e-11)
    assert truth.start_divergence("zero") > 0.01
    assert without(problem).truth.start_divergence("zero") == 0.0


@both
def test_discrete_optimum(problem):
    """The least J_N over feedbacks and start laws: the chain's own tilted start."""
    truth = problem.truth
    chain = truth.policy_chain("zero", N_STEPS).chain
    P, p, rho = (part[0] for part in chain.value_coefficients())
    precision = np.linalg.inv(chain.start_covariance)
    covariance = np.linalg.inv(precision + P)
    mean = covariance @ (precision @ chain.start_mean - p)
    base = chain.start_mean, chain.start_covariance
    second = covariance + np.outer(mean, mean)
    cost = 0.5 * np.sum(P * second) + p @ mean + rho
    cost += relative_entropy(mean, covariance, *base)
    assert truth.optimal_cost(N_STEPS) == pytest.approx(cost, rel=1e-12)
    assert truth.optimal_cost(N_STEPS) > -truth.log_normalizer(N_STEPS)
    for theta in (*map(problem.theta, POINTS), off_line(problem)):
        assert truth.objective(theta, N_STEPS) > truth.optimal_cost(N_STEPS)


@both
@pytest.mark.parametrize("kind", ["gradient", "reward_only_gradient"])
def test_matching_and_discrete_answers_tend_to_continuous_time(problem, kind):
    for quantity in (kind, "matching_gradient"):
        method, theta = getattr(problem.truth, quantity), off_line(problem)
        exact, part = method(theta), own(problem)
        coarse, fine = (method(theta, n) - exact for n in (1000, 2000))
        rest = np.max(np.abs(2.0 * fine - coarse)[part])
        assert rest < 0.02 * np.max(np.abs(coarse)[part])


# ---- refusals ----------------------------------------------------------------------


def test_a_factor_without_positive_diagonal_is_refused():
    theta = OSCILLATOR.theta("zero").copy()
    theta[-1] = -1.0
    for call in (
        lambda: OSCILLATOR.theta(theta),
        lambda: OSCILLATOR.truth.objective(theta),
        lambda: OSCILLATOR.tables(theta, OSCILLATOR.time_grid(2)),
    ):
        with pytest.raises(ParameterError, match="above -1"):
            call()


def test_a_start_without_density_is_refused():
    with pytest.raises(ParameterError, match="initial_law needs an X_0"):
        Skewed(degenerate=True)
    Skewed(degenerate=True, initial_law=False)


def test_estimators_without_these_terms_are_refused():
    handled = {
        name
        for name in registry.estimator_names()
        if registry.estimator(name).handles_initial_law
    }
    assert handled == {
        "adjoint_matching",
        "non_adapted_adjoint",
        "pathwise",
        "reinforce",
        "time_reversed_bsde",
    }
    for name in set(registry.estimator_names()) - handled:
        estimator = registry.estimator(name)
        backend = estimator.backends[0]
        with pytest.raises(NotApplicableError, match="theta moves the law of X_0"):
            measure(OSCILLATOR, estimator, n_steps=3, backend=backend)


# ---- estimators --------------------------------------------------------------------

SPECS = (
    "pathwise",
    "pathwise:sticking_the_landing=true",
    "pathwise:objective=reward",
    "adjoint_matching",
    "adjoint_matching:adjoint=full",
    "reinforce:baseline=none",
    "reinforce:baseline=leave_one_out",
    "reinforce:baseline=optimal",
    "reinforce:reward_to_go=true",
    "reinforce:objective=reward",
)
REGRESSIONS = (
    "time_reversed_bsde",
    "time_reversed_bsde:adjoint=full",
    "time_reversed_bsde:increments=misaligned",
    "non_adapted_adjoint",
    "non_adapted_adjoint:degree=3",
)
N_TESTS = 2 * len(POINTS) * len(SPECS)


@both
@pytest.mark.parametrize("point", POINTS)
def test_estimators_are_unbiased(problem, point):
    """Against the exact N-step answer.

    At "overshoot" a wrong sign of the relative entropy is three standard errors beyond
    the threshold: it passes with probability 0.0013.
    """
    needed = t_quantile(1.0 - FALSE_ALARM / N_TESTS, 47, problem.n_params)
    rows = measure_group(
        problem,
        [registry.estimator(spec) for spec in SPECS],
        point=point,
        n_steps=N_STEPS,
        n_paths=1024,
        n_replicates=48,
        seed=10 + POINTS.index(point),
    )
    for spec, measurement in zip(SPECS, rows, strict=True):
        row = measurement.row
        assert row["status"] == "ok", row["reason"]
        assert row["p_value_own"] > FALSE_ALARM / N_TESTS, spec
        if point == "overshoot" and row["estimand"] != "reward_only_gradient":
            times = problem.time_grid(N_STEPS)
            wrong = (
                2.0 * problem.tables(problem.theta(point), times).start_cost_gradient
            )
            part = own(problem)
            error = np.array(row["std_error"])[part]
            assert np.max(np.abs(wrong[part]) / error) > needed + 3.0, spec


@both
def test_regressions_tend_to_their_targets(problem):
    """Many paths: the bias left is of order 1/n_paths, below its standard error."""
    rows = measure_group(
        problem,
        [registry.estimator(spec) for spec in REGRESSIONS],
        point="overshoot",
        n_steps=N_STEPS,
        n_paths=4096,
        n_replicates=12,
        seed=31,
    )
    part = own(problem)
    for spec, measurement in zip(REGRESSIONS, rows, strict=True):
        row = measurement.row
        gap = (np.array(row["mean"]) - row["target"])[part]
        scale = np.linalg.norm(row["target"]) + 1.0
        assert np.max(np.abs(gap)) < 0.02 * scale, spec
        answer = problem.truth.answer(row["estimand"], "overshoot", N_STEPS)
        np.testing.assert_allclose(row["truth_discrete"], answer)


def statistics(problem, spec, backend, dtype, n_steps=N_STEPS):
    times = problem.time_grid(n_steps)
    settings = Settings(
        times=times,
        theta=off_line(problem),
        n_paths=272,
        backend=backend,
        dtype=dtype,
        device="cpu",
        seed=5,
    )
    worker = make_worker(problem, [registry.estimator(spec)], settings)
    parts = []
    for first in range(0, 272, worker.size):
        count = min(worker.size, 272 - first)
        rows = worker.block(2, first, count)[0][0]
        parts.append(np.array(rows[:, :count], np.float64))
    return np.concatenate(parts, axis=1)


@both
@pytest.mark.parametrize("n_steps", [1, N_STEPS])
@pytest.mark.parametrize("spec", [*SPECS, *REGRESSIONS])
def test_backends_agree_path_by_path(problem, spec, n_steps):
    ours = statistics(problem, spec, "numba", "float64", n_steps)
    theirs = statistics(problem, spec, "torch", "float64", n_steps)
    scale = np.max(np.abs(theirs), axis=1, keepdims=True)
    assert np.all(np.abs(ours - theirs) <= 1e-11 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["pathwise", "reinforce", SPECS[1]])
def test_backends_agree_in_single_precision(spec):
    ours = statistics(SKEWED, spec, "numba", "float32")
    theirs = statistics(SKEWED, spec, "torch", "float32")
    scale = np.max(np.abs(theirs), axis=1, keepdims=True)
    assert np.all(np.abs(ours - theirs) <= 1e-4 * scale)


def view_of(problem, theta, n_paths=6):
    times = problem.time_grid(N_STEPS)
    return View(
        problem.tables(theta, times),
        times,
        theta,
        key=split_seed(7),
        replicate=1,
        first_path=0,
        n_paths=n_paths,
    )


@both
def test_pathwise_is_the_derivative_of_cost_and_entropy(problem):
    """Path by path at fixed noise, every parameter."""
    theta = off_line(problem)
    mine = registry.estimator("pathwise").statistics(view_of(problem, theta)).numpy()

    def cost(parameters):
        view = view_of(problem, parameters)
        entropy = problem.tables(parameters, view.times).start_cost[0]
        return view.rollout().cost.numpy() + entropy

    numeric = differences(cost, theta, step=0.005).T
    np.testing.assert_allclose(mine, numeric, rtol=0, atol=1e-8 * np.max(np.abs(mine)))


def log_density(problem, parameters, x):
    """Return the log-density (n,) of X_0 = x (n, d) by another library."""
    tables = problem.tables(parameters, problem.time_grid(1))
    covariance = tables.start_factor @ tables.start_factor.T
    return multivariate_normal(tables.start_mean, covariance).logpdf(x)


@both
def test_start_score_is_the_derivative_of_the_log_density(problem):
    theta = off_line(problem)
    view = view_of(problem, theta)
    x = view.start()
    numeric = differences(lambda t: log_density(problem, t, x.numpy()), theta)
    np.testing.assert_allclose(view.start_score(x).numpy(), numeric.T, atol=1e-9)

    def ratio(shift):
        moved = x.numpy() + shift
        own = log_density(problem, theta, moved)
        return own - log_density(problem, 0.0 * theta, moved)

    slope = differences(ratio, np.zeros(2)).T
    mine = view.start_log_ratio_gradient(x).numpy()
    np.testing.assert_allclose(mine, slope, atol=1e-9)


@both
@pytest.mark.parametrize("keep_states", [True, False])
def test_weights_of_paths_hold_the_ratio_of_start_densities(problem, keep_states):
    theta, options = off_line(problem), {"n_steps": 3, "n_paths": 300}
    x = sdebench.simulate(problem, point=theta, keep_states=True, **options).states[0].T
    run = sdebench.simulate(problem, point=theta, keep_states=keep_states, **options)
    wanted = log_density(problem, theta, x) - log_density(problem, 0.0 * theta, x)
    np.testing.assert_allclose(run.start_log_ratio, wanted, atol=1e-12)
    terms = run.reward - run.running_cost - run.martingale - run.control_cost
    np.testing.assert_allclose(run.log_weight, terms - wanted, rtol=1e-12)
    fixed = sdebench.simulate(without(problem), **options)
    assert not np.any(fixed.start_log_ratio)


@both
def test_sticking_the_landing_leaves_no_variance_as_the_step_shrinks(problem):
    """At theta* the start's part is of order h, plain pathwise's is not."""
    variances = {}
    for n_steps in (20, 80):
        for spec in SPECS[:2]:
            row = measure(
                problem,
                spec,
                point="optimum",
                n_steps=n_steps,
                n_paths=64,
                n_replicates=16,
                seed=3,
            ).row
            error = np.array(row["std_error"])[own(problem)]
            variances[spec, n_steps] = float(np.sum(error**2))
    plain, landed = SPECS[:2]
    assert variances[landed, 80] < 0.01 * variances[plain, 80]
    assert variances[landed, 80] < 0.2 * variances[landed, 20]  # order h^2


# ---- wrong ones must be seen -------------------------------------------------------


def missing_noise(self, x, v):
    """dX_0/dtheta without L' xi."""
    return v @ self._law.derivative[:, :, 0].T


def transposed(self, x, v):
    """L' transposed."""
    law = self._law
    z = self._start_noise(x)
    moved = law.derivative[:, None, :, 0] + z @ law.derivative[:, :, 1:]
    return (moved * v).sum(2).T


def wrong_sign(self):
    return -self._t.start_cost_gradient


def no_trace(self, x):
    z = self._start_noise(x)
    return self._start_product(self._law.whitened, z, z)


def not_whitened(self, x):
    z = self._start_noise(x)
    return self._start_product(self._law.derivative, z, z) - self._law.trace


MUTATIONS = (
    ("start_parameter_vjp", missing_noise, "pathwise"),
    ("start_parameter_vjp", transposed, "pathwise"),
    ("start_parameter_vjp", transposed, "adjoint_matching"),
    ("start_cost_gradient", wrong_sign, "pathwise"),
    ("start_cost_gradient", wrong_sign, "reinforce"),
    ("start_cost_gradient", wrong_sign, "adjoint_matching"),
    ("start_score", no_trace, "reinforce:baseline=none"),
    ("start_score", not_whitened, "reinforce"),
)


@pytest.mark.parametrize(("name", "wrong", "spec"), MUTATIONS)
def test_mutations_are_seen(monkeypatch, name, wrong, spec):
    """The test above, in torch: passes as it is and fails with the mutation."""
    settings = {
        "point": "overshoot",
        "n_steps": N_STEPS,
        "n_paths": 4096,
        "n_replicates": 24,
        "seed": 21,
        "backend": "torch",
    }
    limit = FALSE_ALARM / len(MUTATIONS)
    assert measure(SKEWED, spec, **settings).row["p_value_own"] > limit
    monkeypatch.setattr(TorchLinear, name, wrong)
    assert measure(SKEWED, spec, **settings).row["p_value_own"] < limit


def test_mutations_of_the_exact_answers_are_seen(monkeypatch):
    """The checks by differences fail with a wrong sign, factor or entropy."""
    family = type(SKEWED.initial_family)
    derivatives = family.derivatives

    def flipped(self):
        mean, factor = derivatives(self)
        return mean, np.swapaxes(factor, 1, 2)

    for name, wrong in (
        ("derivatives", flipped),
        ("cost_gradient", lambda self, p, f=family.cost_gradient: -f(self, p)),
        ("cost", lambda self, p, f=family.cost: -f(self, p)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(family, name, wrong)
            for n_steps in (None, N_STEPS):
                with pytest.raises(AssertionError):
                    test_gradients_against_differences(Skewed(), n_steps, "")
