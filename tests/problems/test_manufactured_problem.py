"""A problem from one's own value function: exact, simulated, and refused in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import sdebench
from sdebench import registry
from sdebench.errors import NotApplicableError, NotExactError, ParameterError
from sdebench.manufactured_problem import ManufacturedProblem
from sdebench.measure import measure, measure_group
from sdebench.measure.cell import make_request, refusal
from sdebench.plan import suite
from sdebench.simulate.paths import simulate
from sdebench.simulate.torch_family import torch_family
from sdebench.validate import check_problem

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@dataclass(frozen=True, kw_only=True)
class Cosines(ManufacturedProblem):
    """Cosines as value function, a double well as base, correlated noise."""

    default_steps = 16
    dim: int = 2

    def value_function(self, x, t):
        return 0.5 * torch.cos(x).sum(1) * (1.0 + t) + 0.3 * x[:, 0] * x[:, 1]

    def drift_function(self, x, t):
        return x - x**3 + t

    def noise(self, t):
        return np.array([[1.0, 0.3], [0.0, 0.8]]) * (1.0 + 0.5 * t)

    @property
    def start(self):
        return np.array([0.2, -0.1])


@dataclass(frozen=True, kw_only=True)
class Quadratic(ManufacturedProblem):
    """Brownian motion with reward -|x|^2/2: V in closed form, and f = 0."""

    default_steps = 16
    dim: int = 3

    def value_function(self, x, t):
        late = 2.0 - t  # 1 + T - t
        return 0.5 * self.dim * torch.log(late) + 0.5 * (x * x).sum(1) / late

    def drift_function(self, x, t):
        return torch.zeros_like(x)

    def noise(self, t):
        return np.eye(self.dim)

    @property
    def start(self):
        return np.full(self.dim, 0.7)


def test_a_value_function_with_known_costs():
    """-log E exp(-|x + B_T|^2/2), a Gaussian integral: no running cost is left."""
    problem = Quadratic()
    x = np.random.default_rng(1).normal(size=(5, 3))
    for t in (0.0, 0.4, 1.0):
        np.testing.assert_allclose(problem.running_cost(x, t), 0.0, atol=1e-14)
    np.testing.assert_allclose(problem.reward(x), -0.5 * (x * x).sum(1), atol=1e-14)
    wanted = -1.5 * math.log(2.0) - 0.25 * 3 * 0.7**2
    assert problem.truth.log_normalizer() == pytest.approx(wanted, abs=1e-14)
    np.testing.assert_allclose(problem.truth.control(x, 0.0), -x / 2.0, atol=1e-14)


def test_the_same_paths_as_a_problem_of_the_catalogue():
    """Another backend and another family of functions, the same noise."""
    theirs = sdebench.problem("ou_quadratic_easy", dim=3)
    x0 = Quadratic().start
    # both under no control: only drift, noise and reward are compared
    ours = simulate(Quadratic(), point=None, n_steps=5, n_paths=40, seed=3)
    base = simulate(theirs, point=None, n_steps=5, n_paths=40, seed=3, keep_states=True)
    assert ours.terminal.shape == base.terminal.shape
    steps = np.diff(base.states, axis=0)
    drift = np.array([theirs.drift(s.T, 0.0).T for s in base.states[:-1]])
    shocks = (steps - drift / 5.0).sum(axis=0)  # sqrt(h) sum z, sigma = 1
    np.testing.assert_allclose(ours.terminal, x0[:, None] + shocks, atol=1e-12)
    np.testing.assert_allclose(
        ours.reward, -0.5 * (ours.terminal**2).sum(0), atol=1e-13
    )


@pytest.mark.parametrize("problem", [Cosines(), Quadratic()], ids=lambda p: p.name)
def test_its_answers_pass_the_checks(problem):
    """HJB by differences of V, tables and derivatives."""
    names = (
        "exact answers",
        "HJB equation",
        "terminal condition",
        "coefficient tables",
        "parameter derivatives",
    )
    report = check_problem(problem, only=names)
    found = {check.name: check.status for check in report.checks}
    assert all(found[name] == "passed" for name in names), found


def test_the_weights_under_u_star_become_constant():
    """Their spread is of the order of the root of the step, around log Z."""
    problem, spreads = Cosines(), []
    for n_steps in (16, 64):
        weights = simulate(problem, n_steps=n_steps, n_paths=1000, seed=5).log_weight
        spreads.append(weights.std())
        assert abs(weights.mean() - problem.truth.log_normalizer()) < spreads[-1]
    assert spreads[0] / spreads[1] == pytest.approx(2.0, abs=0.3)
    assert spreads[1] < 0.1


def test_a_wrong_value_function_fails_the_checks():
    """Half the noise in f only: V does not solve its equation."""

    class Wrong(Cosines):
        def running_cost(self, x, t):
            return super().running_cost(x, t) + 0.01

    report = check_problem(Wrong(), only=("HJB equation",), on_fail="report")
    assert {c.name: c.status for c in report.checks}["HJB equation"] == "failed"


def test_products_match_differences():
    problem = Cosines()
    tables = problem.tables(np.array([0.5, 0.2, 0.3]), problem.time_grid(4))
    family = torch_family(tables, "float64", "cpu")
    generator = torch.Generator().manual_seed(4)
    x, v, direction = (
        torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    step = 1e-4

    def slope(function):
        return (function(x + step * direction) - function(x - step * direction)) / (
            2.0 * step
        )

    for n in range(4):
        for product, function in (
            (family.base_vjp, family.base_mean),
            (family.control_vjp, family.control),
        ):
            mine = (product(n, x, v) * direction).sum(1)
            wanted = (slope(lambda y, n=n, f=function: f(n, y)) * v).sum(1)
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)
        mine = (family.running_cost_gradient(n, x) * direction).sum(1)
        wanted = slope(lambda y, n=n: family.running_cost(n, y))
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)
        mine = family.control_parameter_vjp(n, x, v)
        whole = (mine * torch.tensor([0.5, 0.2, 0.3])).sum(1)
        torch.testing.assert_close(whole, (family.control(n, x) * v).sum(1))
    mine = (family.reward_gradient(x) * direction).sum(1)
    torch.testing.assert_close(mine, slope(family.reward), rtol=1e-6, atol=1e-7)


def test_every_estimator_runs_or_says_why():
    """Finite numbers, or a reason; which of them have a kernel does not matter."""
    every = [registry.estimator(name) for name in registry.estimator_names()]
    problem = Cosines()
    found = measure_group(problem, every, n_paths=256, n_replicates=2, n_steps=4)
    for measurement in found:
        row = measurement.row
        assert row["status"] in ("ok", "not applicable"), (
            row["estimator"],
            row["reason"],
        )
        assert row["reason"] or np.all(np.isfinite(row["mean"]))
    ran = {m.row["estimator"] for m in found if m.row["status"] == "ok"}
    assert {"pathwise", "reinforce", "adjoint_matching", "log_variance"} <= ran


def test_two_unbiased_estimators_agree():
    """Of the gradient of the N-step chain; false-alarm rate 1e-4 over 3 components."""
    problem = Cosines()
    rows = [
        measure(problem, name, n_paths=512, n_replicates=24, n_steps=8, seed=2).row
        for name in ("pathwise", "reinforce:baseline=leave_one_out")
    ]
    (a, b) = (np.array(r["mean"]) for r in rows)
    error = np.hypot(*(np.array(r["std_error"]) for r in rows))
    assert np.all(np.abs(a - b) < 4.9 * error)  # Student t, 46 degrees, 1e-4 / 3
    assert np.linalg.norm(a) > 10 * np.linalg.norm(error)


def test_what_is_known_and_what_is_not():
    truth = Cosines().truth
    np.testing.assert_array_equal(truth.gradient("optimum"), np.zeros(3))
    assert truth.objective("optimum") == -truth.log_normalizer()
    for answer in (truth.gradient, truth.objective, truth.reward_only_gradient):
        with pytest.raises(NotExactError):
            answer("halfway")


def test_bad_input_is_refused_in_words():
    with pytest.raises(NotApplicableError, match="backend torch"):
        measure(Cosines(), "pathwise", backend="numba")
    request = make_request(Cosines())
    assert request.backend == "torch"
    assert refusal(request, registry.estimator("pathwise")) is None
    with pytest.raises(ParameterError, match="horizon"):
        Cosines(horizon=-1.0)

    class Flat(Cosines):
        def noise(self, t):
            return np.ones(2)

    with pytest.raises(ParameterError, match=r"return \(2, 2\)"):
        Flat().diffusion(0.0)

    class Vector(Cosines):
        def value_function(self, x, t):
            return x

    with pytest.raises(ParameterError, match=r"return \(1,\)"):
        Vector().truth.log_normalizer()


def test_suites_take_the_backend_of_the_problem(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "from sdebench.manufactured_problem import ManufacturedProblem\n\n\n"
        "class Mine(ManufacturedProblem):\n"
        "    dim = 1\n\n"
        "    def value_function(self, x, t):\n        return (x * x).sum(1)\n\n"
        "    def drift_function(self, x, t):\n        return -x\n\n"
        "    def noise(self, t):\n        return np.eye(1)\n"
    )
    problem = registry.problem(f"{tmp_path / 'mine.py'}")
    assert measure(problem, "pathwise", n_replicates=4, n_steps=3).backend == "torch"
    assert {cell.backend for cell in suite("quick")} == {"numba", "torch"}
