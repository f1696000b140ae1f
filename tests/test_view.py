"""What an estimator may see and what it is charged.

The truth cannot be reached from a view: no chain of Python references leads from it to
a problem or to closed-form algebra.  Every call is counted.
"""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import sdebench.estimators
from sdebench import registry
from sdebench.closed_form.affine_chain import AffineChain
from sdebench.closed_form.base_process import BaseProcess
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.linear_quadratic import LinearQuadratic
from sdebench.closed_form.tilting import TiltingFamily
from sdebench.composite import CompositeEstimator
from sdebench.measure import measure, measure_group
from sdebench.measure.workers import NumbaWorker, Settings
from sdebench.problem import Problem, Truth
from sdebench.simulate.noise import split_seed
from sdebench.view import COUNTERS, View

SECRETS = (
    Problem,
    Truth,
    TiltingFamily,
    LinearQuadratic,
    AffineChain,
    BaseProcess,
    GaussianMixture,
)
OPAQUE = (type, types.ModuleType, types.CodeType)
FILES = sorted(
    path
    for path in Path(sdebench.estimators.__path__[0]).glob("*.py")
    if path.name != "__init__.py"
)


def view_of(problem, point="halfway", n_steps=4, n_paths=6, control="theta"):
    theta = {
        "theta": problem.theta(point),
        "none": None,
        "optimal": problem.theta_star,
    }[control]
    times = problem.time_grid(n_steps)
    return View(
        problem.tables(theta, times),
        times,
        theta,
        key=split_seed(3),
        replicate=0,
        first_path=0,
        n_paths=n_paths,
    )


def neighbours(item):
    """What Python code can reach from an object without imports."""
    if isinstance(item, types.FunctionType):
        # Its globals are its module: an import, not a reference to this view.
        return [
            item.__closure__,
            item.__defaults__,
            item.__kwdefaults__,
            item.__dict__,
        ]
    found = list(gc.get_referents(item))
    if isinstance(item, np.ndarray):
        found.append(item.base)
    if isinstance(item, torch.Tensor):
        found += [item.grad_fn, item._base]
    found.append(getattr(item, "__dict__", None))
    return found


def reachable(root):
    """All objects that a breadth-first walk from ``root`` meets."""
    seen, queue = {id(root): root}, [root]
    while queue:
        item = queue.pop()
        for other in neighbours(item):
            if other is None or isinstance(other, OPAQUE) or id(other) in seen:
                continue
            if isinstance(other, dict) and "__builtins__" in other:
                continue  # the globals of a module
            seen[id(other)] = other
            queue.append(other)
    return list(seen.values())


def secrets(root):
    return [item for item in reachable(root) if isinstance(item, SECRETS)]


# ---- the truth is out of reach ----------------------------------------------
@pytest.mark.parametrize("name", registry.problem_names())
def test_no_reference_leads_from_a_view_to_the_truth(name):
    problem = registry.problem(name)
    problem.truth.answer("gradient", "halfway", 4)  # fill every cache first
    for control in ("theta", "none", "optimal"):
        view = view_of(problem, control=control)
        view.rollout()
        for seen in (view, view.share(), view.share().rollout):
            assert len(reachable(seen)) > 20
            assert secrets(seen) == []


@pytest.mark.parametrize("name", registry.problem_names())
def test_no_reference_leads_from_a_kernel_s_arguments_to_the_truth(name):
    problem = registry.problem(name)
    times = problem.time_grid(3)
    settings = Settings(
        times=times,
        theta=problem.theta("halfway"),
        n_paths=16,
        backend="numba",
        dtype="float64",
        device="cpu",
        seed=0,
    )
    group = [registry.estimator("pathwise")]
    worker = NumbaWorker(problem.tables(settings.theta, times), group, settings)
    for item in (worker._prepared, worker._work, worker._buffers, worker._estimators):
        assert secrets(item) == []


def test_the_walk_finds_a_truth_that_is_hidden():
    """Mutations: a problem behind a list, a closure, a method, an array's base."""
    problem = registry.problem("brownian_linear")

    def closure():
        return problem

    class Sly(np.ndarray):
        pass

    array = np.zeros(3).view(Sly)
    array.note = [problem.truth]
    for plant in ({"a": [problem]}, closure, problem.drift, array, array[1:]):
        view = view_of(problem)
        assert secrets(view) == []
        view.theta_of_somebody = plant
        assert secrets(view), plant
        view = view_of(problem)
        view._family.cache = (plant,)
        assert secrets(view.share()), plant


def test_an_estimator_gets_only_the_view():
    """The object handed over by the engine holds no problem, and neither does it."""
    handed = []

    class Spy(type(registry.estimator("pathwise"))):
        def statistics(self, view):
            handed.append(view)
            return super().statistics(view)

    problem = registry.problem("two_modes")
    measure_group(
        problem, [Spy()], backend="torch", n_steps=3, n_paths=8, n_replicates=2
    )
    assert len(handed) >= 2
    for view in handed:
        assert type(view) is View
        assert secrets(view) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_estimator_imports_nothing_that_knows_the_truth(path):
    """Closed forms are for `Estimator.target`, which the harness alone calls."""
    allowed = ("errors", "estimator", "composite", "simulate", "view", "closed_form")
    exactly = {"sdebench.registry.estimator", "sdebench.registry"}
    forbidden = {"importlib", "gc", "inspect", "sys"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            # `from sdebench import problem` imports the module of that name
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("__import__", "eval", "exec", "compile")
    for name in imported:
        first, *rest = name.split(".")
        assert first not in forbidden | {"problems", "estimators"}
        if name in exactly or name.startswith("sdebench.estimators._"):
            continue
        if first == "sdebench":
            assert rest
            assert rest[0] in allowed, name
        elif first not in (
            "__future__",
            "abc",
            "collections",
            "dataclasses",
            "functools",
            "itertools",
            "typing",
        ):
            assert first in ("numpy", "scipy", "torch", "math", "numba"), name


def test_the_catalogue_is_not_imported_under_a_second_name():
    code = (
        "import sys\n"
        "import sdebench\n"
        "for name in sdebench.problem_names(): sdebench.problem(name)\n"
        "for name in sdebench.estimator_names(): sdebench.estimator(name)\n"
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('problems', 'estimators')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ---- counts -----------------------------------------------------------------
N = 5

# Counted by hand from the formulae at the head of each estimator's file.
ROLLOUT = {
    "drift_evaluations": N,
    "control_evaluations": N,
    "noise_draws": N,
    "reward_evaluations": 1,
    "vjp_evaluations": 0,
    "reward_gradient_evaluations": 0,
    "density_evaluations": 0,
}
EXTRA = {
    # per step: parameters, base and control; once grad r
    "pathwise": {"vjp_evaluations": 3 * N, "reward_gradient_evaluations": 1},
    # per step: parameters and base
    "adjoint_matching": {"vjp_evaluations": 2 * N, "reward_gradient_evaluations": 1},
    # per step: parameters twice, for the score and for the direct part
    "reinforce": {"vjp_evaluations": 2 * N},
    "path_importance_sampling": {},
    # the full adjoint needs the control's Jacobian too
    "adjoint_matching:adjoint=full": {
        "vjp_evaluations": 3 * N,
        "reward_gradient_evaluations": 1,
    },
    # without a baseline both parts are one product
    "reinforce:baseline=none": {"vjp_evaluations": N},
}


def extra(estimator):
    return EXTRA.get(estimator.label, EXTRA.get(estimator.name))


def every_estimator():
    return [
        registry.estimator(name, **variant)
        for name in registry.estimator_names()
        for variant in type(registry.estimator(name)).variants
    ]


def counted():
    """The estimators whose evaluations are counted by hand in `EXTRA`."""
    every = [e for e in every_estimator() if not e.needs_denoiser]
    return [e for e in every if e.name in EXTRA]


@pytest.mark.parametrize("estimator", counted(), ids=lambda e: e.label)
@pytest.mark.parametrize("name", ["damped_oscillator", "two_modes"])
def test_counts_are_those_of_the_formulae(estimator, name):
    problem = registry.problem(name)
    view = view_of(problem, n_steps=N, n_paths=6, control=estimator.control)
    estimator.statistics(view)
    wanted = ROLLOUT | extra(estimator)
    assert view.counts == {key: 6 * value for key, value in wanted.items()}
    # Charged once, however often the forward paths are asked for.
    view.rollout()
    assert view.counts["drift_evaluations"] == 6 * N


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_measured_counts_do_not_depend_on_neighbours_or_backend(backend):
    group = every_estimator()
    rows = measure_group(
        "damped_oscillator",
        group,
        backend=backend,
        n_steps=N,
        n_paths=32,
        n_replicates=2,
    )
    for estimator, measurement in zip(group, rows, strict=True):
        row = measurement.row
        if row["status"] == "not applicable":
            continue
        counts = {key: row[key] for key in COUNTERS}
        if estimator in counted():
            assert counts == ROLLOUT | extra(estimator)
        alone = measure(
            "damped_oscillator", estimator, n_steps=N, n_paths=32, n_replicates=2
        )
        assert counts == {key: alone.row[key] for key in COUNTERS}
        total = sum(v for k, v in counts.items() if k.endswith("evaluations"))
        assert row["evaluations"] == total


def test_share_charges_the_rollout_to_everyone_who_asks():
    view = view_of(registry.problem("two_modes"), n_steps=N, n_paths=3)
    first, second, third = (view.share() for _ in range(3))
    assert all(not any(v.counts.values()) for v in (first, second, third))
    assert first.rollout() is second.rollout() is view.rollout()
    second.rollout()
    second.reward(second.rollout().states[-1])
    charged = {key: 3 * value for key, value in ROLLOUT.items()}
    assert first.counts == charged
    assert second.counts == charged | {"reward_evaluations": 6}
    assert not any(third.counts.values())
    assert view.counts == charged


# ---- the view itself --------------------------------------------------------
def test_view_copies_grid_and_theta():
    problem = registry.problem("two_modes")
    view = view_of(problem)
    view.theta[:] = 99.0
    view.times[:] = 99.0
    assert np.all(problem.theta("halfway") < 90.0)
    assert problem.time_grid(4)[0] == 0.0


def test_blocks_of_a_view_are_parts_of_the_same_paths():
    problem = registry.problem("follmer_mixture")
    times, theta = problem.time_grid(4), problem.theta("halfway")

    def states(first, count):
        view = View(
            problem.tables(theta, times),
            times,
            theta,
            key=split_seed(9),
            replicate=2,
            first_path=first,
            n_paths=count,
        )
        return view.rollout().states[-1]

    whole = states(0, 10)
    torch.testing.assert_close(states(0, 4), whole[:4], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(states(4, 6), whole[4:], rtol=1e-13, atol=1e-13)


def test_a_runner_leads_to_no_truth():
    """What a composite estimator gets holds no problem either."""
    handed = []

    @dataclass(frozen=True, kw_only=True)
    class Spy(CompositeEstimator):
        estimand: ClassVar[str] = "gradient"

        def run(self, runner):
            handed.append(runner)
            return runner.run(registry.estimator("pathwise"))[0]

    measure_group("damped_oscillator", [Spy()], n_steps=3, n_paths=16, n_replicates=2)
    assert handed
    for runner in handed:
        assert len(reachable(runner)) > 5
        assert secrets(runner) == []
    handed[0].secret = [registry.problem("damped_oscillator")]
    assert secrets(handed[0])
