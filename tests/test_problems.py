"""The checks of the mathematics that every problem of the catalogue must pass.

Problems and variants are discovered: a new file in ``problems/`` is covered as it is.
Below, problems that are wrong on purpose must fail.
"""

from __future__ import annotations

import dataclasses

import _checks as checks
import numpy as np
import pytest

import sdebench
from sdebench.closed_form import log_quadratics as lq
from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    ParameterError,
    UnknownNameError,
)
from sdebench.grid_problem import GridProblem
from sdebench.linear_problem import LinearProblem
from sdebench.problem import ESTIMANDS
from sdebench.tilting_problem import TiltingProblem, TiltingTruth
from sdebench.validate import problem_simulation

PROBLEMS = checks.all_problems()
POINTS = ["zero", "halfway", "optimum", "overshoot", "random"]
IMAGES = ("digits", "digits_classifier")
"""A hundred components in 64 dimensions: tests of few are in test_digits."""
LARGE = "many_well:dim=32"
"""The published size; every answer is a multiple of that of a smaller one."""
SUMS = ("many_well", "funnel")
"""Their u* is a sum at every state: tests on few paths are in files of their own."""


def problems_with(condition, slow=IMAGES):
    """Parametrize over problems; the ones solved on a grid take seconds per answer."""
    chosen = [
        pytest.param(p, marks=pytest.mark.slow)
        if isinstance(p, GridProblem) or {p.name, p.label} & {*slow, LARGE}
        else p
        for p in PROBLEMS
        if condition(p)
    ]
    return pytest.mark.parametrize("problem", chosen, ids=lambda p: p.label)


def is_plane_tilting(problem):
    """Whether the regret is checked by quadrature in the plane, in two of many dims."""
    return checks.grid_dim(checks.reduced(problem)) == 2


every_problem = problems_with(lambda problem: True)


def test_every_problem_file_is_covered():
    assert {p.name for p in PROBLEMS} == set(sdebench.problem_names())


# ---- checks 1 and 2: exact functions -----------------------------------------------


@every_problem
def test_hjb_equation(problem):
    # The differences keep 1e-11; 1e-8 is the promise.  Of the funnel the first times
    # that are looked at are so early that h changes within the usual step.
    step = 0.005 if problem.name == "funnel" else 0.01
    checks.check_hjb(problem, tolerance=1e-10, step=step)
    checks.check_terminal_condition(problem)


@checks.with_slow(PROBLEMS, lambda p: p.name == "forty_modes")
def test_second_route(problem):
    if isinstance(problem, LinearProblem):
        checks.check_linear_by_ode(problem)
    elif checks.grid_dim(problem):
        checks.check_tilting_quadrature(problem)
    elif isinstance(problem, GridProblem):
        pytest.skip("the reference is a second route itself: see test_grid_chain")
    else:
        pytest.skip("h is fixed by its equation and end condition, and Monte Carlo")


# ---- checks 3 and 4: simulation ----------------------------------------------------


@every_problem
@pytest.mark.parametrize("importance", [True, False], ids=["optimum", "base"])
def test_feynman_kac(problem, importance):
    # extrapolation to continuous time needs as many steps as the problem asks for
    finer = 1 if checks.has_chain(problem) else checks.fineness(problem)
    try:
        checks.check_feynman_kac(problem, importance, n_paths=2**14, n_steps=64 * finer)
    except NotApplicableError as reason:
        assert not importance or problem.name in SUMS  # whose family lacks u*
        pytest.skip(str(reason))


WIDE = "forty_modes:dim=50,half_width=2.0"
holds_optimum = problems_with(
    lambda problem: problem.family_holds_optimum, slow=(*IMAGES, WIDE)
)


@holds_optimum
def test_law_under_the_optimal_control(problem):
    checks.check_optimal_law(problem)


@holds_optimum
def test_log_weights_shrink_at_the_known_order(problem):
    checks.check_log_weights(problem)


# ---- check 5: gradients ------------------------------------------------------------


@problems_with(lambda p: True, slow=(*IMAGES, "jacobi_polynomial", "double_well"))
@pytest.mark.parametrize(
    "point", ["halfway", pytest.param("random", marks=pytest.mark.slow)]
)
def test_gradient_against_differences(problem, point):
    problem = checks.reduced(problem)
    theta = checks.thetas(problem)[point]
    # An answer of a reference solution takes seconds.
    reference = isinstance(problem, GridProblem) or problem.name == "many_well"
    directions = 1 if reference else None
    checks.check_gradient(problem, theta, directions=directions)


@pytest.mark.slow
@every_problem
@pytest.mark.parametrize("point", POINTS)
def test_gradient_against_differences_everywhere(problem, point):
    checks.check_gradient(problem, checks.thetas(problem)[point])


@problems_with(checks.has_chain)
@pytest.mark.parametrize("point", POINTS)
def test_discrete_gradient_against_differences(problem, point):
    theta = checks.thetas(problem)[point]
    checks.check_gradient(problem, theta, n_steps=12)


@problems_with(checks.has_chain)
@pytest.mark.parametrize(
    "quantity", ["gradient", "matching_gradient", "cross_entropy_gradient"]
)
@pytest.mark.parametrize("point", ["zero", "random"])
def test_discrete_gradients_converge_at_order_one(problem, quantity, point):
    problem = checks.reduced(problem)
    theta = checks.thetas(problem)[point]
    if problem.truth.answer(quantity, theta) is None:
        pytest.skip(f"{problem.name} has no exact {quantity}")
    checks.check_discrete_order(problem, theta, quantity)


@problems_with(lambda problem: isinstance(problem, LinearProblem))
@pytest.mark.parametrize("point", ["zero", "random"])
def test_objective_and_matching_gradient_by_ode(problem, point):
    problem = checks.reduced(problem)
    checks.check_matching_by_ode(problem, checks.thetas(problem)[point])


@every_problem
def test_gradients_vanish_at_the_optimum(problem):
    checks.check_stationary(checks.reduced(problem))


@problems_with(lambda p: checks.has_chain(p) and p.family_holds_optimum)
def test_discrete_optimum_is_stationary_and_cheapest(problem):
    """J_N(theta) - J_N* >= 0, and control_error(theta, N) is a distance from u*_N."""
    truth = problem.truth
    cheapest = truth.optimal_cost(12)
    for theta in checks.thetas(problem).values():
        assert truth.objective(theta, 12) >= cheapest - 1e-12 * (1 + abs(cheapest))
    assert cheapest >= -truth.log_normalizer(12) - 1e-12  # Jensen over the start
    x = checks.visited(problem, n_times=1)[0][1]
    fine = truth.discrete_control(x, 0, 512), truth.discrete_control(x, 0, 1024)
    limit = truth.control(x, problem.time_span[0])
    rest = np.max(np.abs(2.0 * fine[1] - fine[0] - limit))
    assert rest < 1e-3 * (1.0 + np.max(np.abs(limit)))


# ---- check 6: regret ---------------------------------------------------------------


@problems_with(lambda problem: not is_plane_tilting(problem), slow=IMAGES + SUMS)
@pytest.mark.parametrize(
    "point",
    ["halfway", *(pytest.param(p, marks=pytest.mark.slow) for p in ("zero", "random"))],
)
def test_regret_is_half_the_control_error(problem, point):
    problem = checks.reduced(problem)
    checks.check_regret(problem, checks.thetas(problem)[point])


@problems_with(is_plane_tilting, slow=(*IMAGES, "forty_modes"))
def test_regret_in_the_plane(problem):
    # Coarse in time and space: 1e-5 is left, and 1e-10 in the slow test.
    problem = checks.reduced(problem)
    checks.check_regret(problem, "halfway", 1e-4, nodes=10, panels=1, refine=3.0)
    checks.check_regret_by_simulation(problem, "halfway", n_paths=2**12)


@pytest.mark.slow
@problems_with(is_plane_tilting)
@pytest.mark.parametrize("point", ["zero", "halfway", "overshoot"])
def test_regret_by_fine_quadrature(problem, point):
    problem = checks.reduced(problem)
    checks.check_regret(problem, problem.theta(point), tolerance=1e-9)


@pytest.mark.slow
@every_problem
def test_regret_by_simulation(problem):
    checks.check_regret_by_simulation(problem, "halfway", n_paths=4096)


# ---- the truth's remaining answers -------------------------------------------------


@problems_with(lambda problem: True, slow=(*IMAGES, "forty_modes"))
def test_answers_have_the_right_shape(problem):
    problem = checks.reduced(problem)
    for estimand in ESTIMANDS:
        for n_steps in (None, 7):
            answer = problem.truth.answer(estimand, "halfway", n_steps)
            size = 1 if estimand == "log_normalizer" else problem.n_params
            assert answer is None or answer.shape == (size,)
    assert problem.truth.answer("gradient", "halfway") is not None
    assert problem.truth.answer("log_normalizer", "halfway") is not None
    for quantity in ("gradient", "objective", "log_normalizer", "control_error"):
        bound = problem.truth.error_bound(quantity, "halfway")
        assert 0.0 <= bound < problem.truth.precision
    gap = problem.truth.optimal_cost() + problem.truth.log_normalizer()
    assert gap >= -1e-12  # Jensen's inequality over the start
    regret = problem.truth.objective("halfway") - problem.truth.optimal_cost()
    regret -= problem.truth.start_divergence("halfway")
    error = problem.truth.control_error("halfway")
    assert error == pytest.approx(np.sqrt(2.0 * regret), rel=1e-6)


@every_problem
def test_laws_at_the_start(problem):
    """All laws agree at t_0; a point has no density, and the message says so.

    Where theta moves the law of X_0, the optimum starts from the tilted one.
    """
    start = problem.time_span[0]
    tables = problem.tables(None, problem.time_grid(1))
    spread = getattr(tables, "start_scale", getattr(tables, "start_factor", None))
    if not np.any(spread):
        with pytest.raises(NotExactError, match="point"):
            problem.truth.tilted_marginal(start)
        return
    first = problem.truth.base_marginal(start)
    second = problem.truth.tilted_marginal(start)
    if problem.has_start_parameters:
        mean, covariance = problem.model.tilted_start()
        np.testing.assert_allclose(second.mean(), mean, atol=1e-13)
        np.testing.assert_allclose(second.covariance(), covariance, atol=1e-13)
        assert np.max(np.abs(first.covariance() - covariance)) > 0.1
        return
    np.testing.assert_allclose(first.mean(), second.mean(), atol=1e-13)
    np.testing.assert_allclose(first.covariance(), second.covariance(), atol=1e-13)


@every_problem
def test_wrong_inputs_are_refused_in_one_line(problem):
    x = np.zeros((3, problem.dim))
    span = problem.time_span
    calls = [
        (lambda: problem.time_grid(0), "n_steps 0"),
        (lambda: problem.time_grid(-3), "n_steps -3"),
        (lambda: problem.time_grid(2.5), "time grid"),
        (lambda: problem.time_grid([span[0], span[0], span[1]]), "increasing"),
        (lambda: problem.time_grid([span[1], span[0]]), "increasing"),
        (lambda: problem.time_grid([span[0], np.nan, span[1]]), "increasing"),
        (lambda: problem.time_grid([span[0], 2.0 * span[1]]), "increasing"),
        (lambda: problem.time_grid([span[0]]), "increasing"),
        (lambda: problem.theta([np.nan] * problem.n_params), "finite"),
        (lambda: problem.theta(np.ones(problem.n_params + 1)), "finite"),
        (lambda: problem.theta(["a"] * problem.n_params), "finite"),
        (lambda: problem.drift(x.astype("float32"), span[0]), "float64"),
        (lambda: problem.truth.value(x.astype("float16"), span[0]), "float64"),
        (lambda: problem.truth.control(np.zeros(problem.dim + 1), span[0]), "shape"),
        (lambda: problem.reward(np.full((2, problem.dim), np.nan)), "finite"),
        (lambda: problem.truth.value(x, span[1] + 1.0), "outside"),
        (lambda: problem.drift(x, span[0] - 0.1), "outside"),
    ]
    for call, message in calls:
        with pytest.raises(ParameterError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    for call, message in [
        (lambda: problem.theta("half-way"), "halfway"),
        (lambda: problem.tables(None, problem.time_grid(2), "heun"), "scheme"),
        (lambda: problem.truth.answer("hessian", "zero"), "estimand"),
    ]:
        with pytest.raises(UnknownNameError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@every_problem
def test_shapes_broadcast(problem):
    x = checks.visited(problem, n_times=1)[0][1]
    t = 0.5 * sum(problem.time_span)
    for function in (problem.drift, problem.truth.control):
        np.testing.assert_array_equal(function(x[:4].reshape(2, 2, -1), t).shape[:2], 2)
        np.testing.assert_allclose(function(x[0], t), function(x, t)[0], rtol=1e-12)
    for function in (problem.truth.value, problem.running_cost, problem.truth.h):
        assert function(x, t).shape == (len(x),)
    assert problem.reward(x[0]).shape == ()


@pytest.mark.parametrize(
    "spec",
    [
        "ou_quadratic_easy:dim=5",
        "ou_quadratic_hard:dim=1",
        "ou_linear:dim=3,spread=0.4",
        "brownian_linear:dim=3,sigma=0.5",
        "follmer_mixture:dim=1",
        "follmer_mixture:dim=5,log_mass=0.7",
        "gaussian_tilt:dim=3",
        "gaussian_tilt:schedule=cosine,start_time=0.1,mean=0.3",
        "gaussian_tilt:schedule=ve,rate=3.0,mean=0.4",
        "gaussian_tilt:schedule=cosine,noise=constant,dim=2",
        "gaussian_tilt:schedule=vp,noise=constant,noise_level=2.0",
        "two_modes:start=marginal",
        "four_modes:start=normal",
        "damped_oscillator:noise_level=0.5,damping=0.1",
    ],
)
def test_other_parameters(spec):
    problem = sdebench.problem(spec)
    checks.check_hjb(problem, tolerance=1e-10)
    checks.check_terminal_condition(problem)
    checks.check_tables(problem, "halfway")
    checks.check_stationary(problem)
    if isinstance(problem, LinearProblem):
        checks.check_linear_by_ode(problem)
    elif checks.grid_dim(problem):
        checks.check_tilting_quadrature(problem)
    checks.check_optimal_law(problem, n_paths=2**12)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("gaussian_tilt:curvature=-3", ParameterError, "eigenvalue -1,"),
        ("two_modes:beta=-1.5", ParameterError, "eigenvalue -0.5"),
        ("four_modes:variance=-1", ParameterError, "variance"),
        ("two_modes:variance=0", ParameterError, "variance"),
        ("follmer_mixture:variance=-0.5", ParameterError, "variance"),
        ("follmer_mixture:noise_level=0", ParameterError, "noise_level"),
        ("gaussian_tilt:variance=-1", ParameterError, "variance"),
        ("gaussian_tilt:schedule=linear_flow", ParameterError, "start_time"),
        ("gaussian_tilt:schedule=cosine", ParameterError, "start_time"),
        ("gaussian_tilt:start_time=1.0", ParameterError, "start_time"),
        ("gaussian_tilt:horizon=-1", ParameterError, "horizon"),
        ("gaussian_tilt:rate=0", ParameterError, "rate"),
        ("gaussian_tilt:schedule=ve,rate=-2", ParameterError, "scale"),
        ("gaussian_tilt:noise=constant,noise_level=0", ParameterError, "noise_level"),
        ("gaussian_tilt:schedule=linear", UnknownNameError, "linear_flow"),
        ("gaussian_tilt:noise=memory", UnknownNameError, "memoryless"),
        ("two_modes:start=gaussian", UnknownNameError, "normal"),
        ("gaussian_tilt:dim=0", ParameterError, "dim"),
        ("ou_quadratic_easy:dim=0", ParameterError, "dim"),
        ("ou_quadratic_easy:start_scale=-1", ParameterError, "start_scale"),
        ("ou_quadratic_easy:terminal_cost=-3", ParameterError, "eigenvalue"),
        ("ou_linear:matrix_seed=-1", ParameterError, "matrix_seed"),
        ("damped_oscillator:noise_level=0", ParameterError, "noise_level"),
        ("brownian_linear:dim=0", ParameterError, "dim"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(spec, error, message):
    with pytest.raises(error, match=message) as caught:
        sdebench.problem(spec)
    assert "\n" not in str(caught.value)


def test_a_theta_that_cannot_be_tilted_with_is_refused():
    problem = sdebench.problem("gaussian_tilt")
    # h at the start is finite as long as the law of X_T given X_0 can be tilted with,
    # 1/(C - Phi^2 q) = 2.0025; Z needs the law of X_T, 1/C = 2.
    with pytest.raises(ParameterError, match=r"eigenvalue -0\.9975"):
        problem.truth.objective([0.0, -3.0])
    # Here h is finite for every X_0, but the tilted law is not: precision 2 - 2.001.
    with pytest.raises(ParameterError, match=r"eigenvalue -0\.001"):
        sdebench.problem("gaussian_tilt", curvature=-2.001)
    with pytest.raises(ParameterError, match="eigenvalue"):
        problem.tables(np.array([0.0, -3.0]), problem.time_grid(4))


# ---- mutants: each must fail -------------------------------------------------------


def fails(check, *arguments, **options):
    with pytest.raises(AssertionError):
        check(*arguments, **options)


def with_truth(problem, **members):
    return checks.mutate(problem, truth=checks.mutate(problem.truth, **members))


def with_tables(problem, change):
    original = type(problem).tables

    def tables(self, theta, times, scheme="euler_maruyama"):
        filled = original(self, theta, times, scheme)
        return filled._replace(**change(filled))

    return checks.mutate(problem, tables=tables)


TWO_MODES = sdebench.problem("two_modes")
OU_LINEAR = sdebench.problem("ou_linear", spread=0.4)
OU_HARD = sdebench.problem("ou_quadratic_hard", dim=2)


@pytest.mark.parametrize("problem", [TWO_MODES, OU_LINEAR], ids=lambda p: p.name)
def test_mutant_control_is_the_unmutated_problem(problem):
    same = with_tables(with_truth(problem), lambda t: {})
    checks.check_hjb(same)
    checks.check_optimal_law(same)
    checks.check_feynman_kac(same)


def test_mutant_reward_has_the_wrong_sign():
    def reward(self, x):
        return -OU_LINEAR.reward(x)

    fails(checks.check_terminal_condition, checks.mutate(OU_LINEAR, reward=reward))
    mutant = with_tables(OU_LINEAR, lambda t: {"reward_linear": -t.reward_linear})
    fails(checks.check_tables, mutant, "halfway")
    mutant = with_tables(TWO_MODES, lambda t: {"reward": -t.reward})
    # Under the control for the other sign no path has weight left to test with.
    fails(checks.check_feynman_kac, mutant, importance=False)
    fails(checks.check_log_weights, mutant)


def test_mutant_value_or_control_cost_lacks_its_half():
    for problem in (TWO_MODES, OU_HARD):
        whole = problem.truth

        def value(self, x, t, whole=whole):
            return 0.5 * whole.value(x, t)

        def control(self, x, t, whole=whole):
            return 0.5 * whole.control(x, t)

        fails(checks.check_hjb, with_truth(problem, value=value))
        fails(checks.check_hjb, with_truth(problem, value=value, control=control))
        fails(checks.check_hjb, with_truth(problem, control=control))

        def log_normalizer(self, n_steps=None, scheme="euler_maruyama", whole=whole):
            return 0.5 * whole.log_normalizer(n_steps)

        mutant = with_truth(problem, log_normalizer=log_normalizer)
        fails(checks.check_feynman_kac, mutant)

        def objective(self, theta, n_steps=None, whole=whole, problem=problem):
            return whole.objective(theta) + control_cost(problem, theta)

        mutant = with_truth(problem, objective=objective)
        fails(checks.check_regret, mutant, "halfway")
        fails(checks.check_gradient, mutant, "halfway")


def control_cost(problem, theta):
    """E_theta int 1/2 |u_theta|^2: the objective of the same control without costs."""
    theta = problem.theta(theta)
    if isinstance(problem, TiltingProblem):
        free = dataclasses.replace(
            problem.family, theta_star=np.zeros(problem.n_params), constant=0.0
        )
        return free.objective_and_gradient(theta)[0]
    none = np.zeros((problem.dim, problem.dim))
    free = dataclasses.replace(problem.model, running=none, reward_quadratic=none)
    truth = problem.truth
    law = truth._law(theta)
    return free.policy_objective(*law, truth._dgain, truth._dbias).objective


def test_mutant_simulation_lacks_half_of_the_control_cost(monkeypatch):
    original = problem_simulation.simulate

    def simulate(*arguments, **options):
        run = original(*arguments, **options)
        return dataclasses.replace(run, control_cost=2.0 * run.control_cost)

    monkeypatch.setattr(problem_simulation, "simulate", simulate)
    for problem in (TWO_MODES, OU_HARD):
        fails(checks.check_feynman_kac, problem, n_paths=2**13)
        fails(checks.check_log_weights, problem, n_paths=2**10)
        options = {"n_paths": 2**13, "n_steps": 16}
        fails(checks.check_regret_by_simulation, problem, "overshoot", **options)


def test_mutant_tables_are_off_by_one_step():
    def later(array):
        return np.concatenate([array[1:], array[-1:]])

    mutant = with_tables(TWO_MODES, lambda t: {"tilted": later(t.tilted)})
    fails(checks.check_tables, mutant, "halfway")
    mutant = with_tables(TWO_MODES, lambda t: {"base": later(t.base)})
    fails(checks.check_tables, mutant, "halfway")
    mutant = with_tables(OU_HARD, lambda t: {"gain": later(t.gain)})
    fails(checks.check_tables, mutant, "halfway")
    mutant = with_tables(OU_HARD, lambda t: {"feature_gain": t.feature_gain[:, ::-1]})
    fails(checks.check_parameter_tables, mutant, "halfway")
    change = {"tilted_derivative": lambda t: t.tilted_derivative[:, ::-1]}
    mutant = with_tables(
        TWO_MODES, lambda t: {name: f(t) for name, f in change.items()}
    )
    fails(checks.check_parameter_tables, mutant, "halfway")


def test_mutant_matrix_is_transposed():
    matrix = OU_LINEAR.model.drift_matrix

    def drift(self, x, t):
        return x @ matrix

    fails(checks.check_hjb, checks.mutate(OU_LINEAR, drift=drift))
    fails(checks.check_linear_by_ode, checks.mutate(OU_LINEAR, drift=drift))

    def diffusion(self, t):
        return OU_LINEAR.model.diffusion.T

    fails(checks.check_hjb, checks.mutate(OU_LINEAR, diffusion=diffusion))
    for name in ("transition", "noise"):
        mutant = with_tables(
            OU_LINEAR, lambda t, name=name: {name: np.swapaxes(getattr(t, name), 1, 2)}
        )
        fails(checks.check_tables, mutant, "halfway")
        fails(checks.check_optimal_law, mutant)


def test_mutant_memoryless_noise_lacks_its_factor():
    """sigma^2 = eta for 2 eta: neither the base drift nor the tilt fits any more."""
    base = TWO_MODES.family.base
    half = checks.mutate(base, sigma=lambda self, t: base.sigma(t) / np.sqrt(2.0))
    family = dataclasses.replace(TWO_MODES.family, base=half)
    mutant = checks.mutate(TWO_MODES, family=family)
    mutant.__dict__["truth"] = TiltingTruth(mutant)
    fails(checks.check_hjb, mutant)
    fails(checks.check_feynman_kac, mutant, importance=False)
    fails(checks.check_optimal_law, mutant)


def test_mutant_start_law_is_wrong():
    mutant = with_tables(TWO_MODES, lambda t: {"start_mean": t.start_mean + 0.5})
    fails(checks.check_tilting_quadrature, mutant)
    fails(checks.check_optimal_law, mutant)
    mutant = with_tables(OU_HARD, lambda t: {"start_factor": 2.0 * t.start_factor})
    fails(checks.check_linear_by_ode, mutant)
    fails(checks.check_feynman_kac, mutant)


def test_mutant_law_forgets_the_initial_value_bias():
    problem = sdebench.problem(
        "gaussian_tilt", schedule="linear_flow", noise="constant", noise_level=0.3
    )
    ideal = problem.truth.ideal_law()
    mutant = with_truth(problem, tilted_marginal=lambda self, t: ideal)
    fails(checks.check_optimal_law, mutant)
    fails(checks.check_tilting_quadrature, mutant)


def test_mutant_gradient_lacks_a_factor_or_lags_a_step():
    for problem in (TWO_MODES, OU_HARD):
        exact = problem.truth

        def doubled(self, theta, n_steps=None, exact=exact):
            return 2.0 * exact.gradient(theta, n_steps)

        fails(checks.check_gradient, with_truth(problem, gradient=doubled), "halfway")

    def shifted(self, theta, n_steps=None):
        factor = 1.0 if n_steps is None else 1.01
        return factor * OU_HARD.truth.gradient(theta, n_steps)

    mutant = with_truth(OU_HARD, gradient=shifted)
    fails(checks.check_discrete_order, mutant, "zero")

    def full(self, theta, n_steps=None):
        return OU_HARD.truth.gradient(theta, n_steps)

    mutant = with_truth(OU_HARD, matching_gradient=full)
    fails(checks.check_matching_by_ode, mutant, "halfway")

    def biased(self, theta, n_steps=None):
        return OU_HARD.truth.gradient(theta, n_steps) + 1e-6

    fails(checks.check_stationary, with_truth(OU_HARD, gradient=biased))


def test_mutant_exponential_step_has_euler_noise():
    for problem, name in ((OU_HARD, "noise"), (TWO_MODES, "noise")):

        def change(tables, name=name):
            return {name: getattr(tables, name) * (1 + 0.1 / len(tables.offset))}

        fails(checks.check_exponential_scheme, with_tables(problem, change))


def test_mutant_tilt_lacks_the_normalizer_of_the_base():
    def value(self, x, t):
        rows = TWO_MODES.family.tilt_rows(TWO_MODES.theta_star, t)[1]
        return -lq.log_value(rows, x)

    mutant = with_truth(TWO_MODES, value=value)
    fails(checks.check_terminal_condition, mutant)
    fails(checks.check_tilting_quadrature, mutant)
