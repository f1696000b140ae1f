"""The public face: lazy imports, modules that can be called, one-line errors."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest

import sdebench

HEAVY = ("numpy", "torch", "numba", "pandas", "scipy", "matplotlib", "pyarrow")


def run(code):
    """Return what a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_import_is_light():
    """No heavy library, and below 0.2 s of processor time, the best of three."""
    code = (
        "import json, sys, time\n"
        "start = time.process_time()\n"
        "import sdebench\n"
        "spent = time.process_time() - start\n"
        f"print(json.dumps([spent, [m for m in {HEAVY!r} if m in sys.modules]]))\n"
    )
    results = [json.loads(run(code)) for _ in range(3)]
    assert all(loaded == [] for _, loaded in results)
    assert min(spent for spent, _ in results) < 0.2


def test_importing_names_and_errors_stays_light():
    code = (
        "import json, sys\n"
        "import sdebench, sdebench.registry, sdebench.errors\n"
        "sdebench.problem_names(), sdebench.UnknownNameError, dir(sdebench)\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))\n"
    )
    assert json.loads(run(code)) == []


def test_building_a_problem_needs_neither_torch_nor_numba():
    code = (
        "import json, sys, sdebench\n"
        "sdebench.problem('two_modes').truth.gradient('halfway')\n"
        "print(json.dumps([m for m in ('torch', 'numba', 'pandas') "
        "if m in sys.modules]))\n"
    )
    assert json.loads(run(code)) == []


@pytest.mark.parametrize("name", sdebench.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(sdebench, name)
    assert inspect.getdoc(value)
    assert name in dir(sdebench)


def test_star_import_works():
    assert run("from sdebench import *; print(callable(measure))") == "True"


def test_names_that_do_not_exist_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        sdebench.mesure  # noqa: B018


@pytest.mark.parametrize("name", ["problem", "estimator", "measure", "run", "simulate"])
def test_modules_that_share_a_name_with_a_function_can_be_called(name):
    module = getattr(sdebench, name)
    assert isinstance(module, ModuleType)
    assert module.__name__ == f"sdebench.{name}"
    assert callable(module)


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import sdebench.problem",
        "import sdebench.measure.tails",
        "from sdebench.problem import Problem",
        "from sdebench import measure, problem",
        "import sdebench.simulate.tables",
    ],
)
def test_calls_work_whatever_was_imported_before(before):
    code = (
        f"{before}\n"
        "import sdebench\n"
        "p = sdebench.problem('two_modes', beta=1.0)\n"
        "from sdebench.problem import Problem, Truth\n"
        "assert isinstance(p, Problem) and isinstance(p.truth, sdebench.Truth)\n"
        "assert sdebench.estimator('reinforce:baseline=none').baseline == 'none'\n"
        "assert isinstance(sdebench.estimator('pathwise'), sdebench.Estimator)\n"
        "print(p.label)\n"
    )
    assert run(code) == "two_modes:beta=1.0"


def test_functions_as_modules():
    """The same name is the function and the package of its parts."""
    paths = sdebench.simulate("brownian_linear", n_steps=3, n_paths=5)
    assert paths.terminal.shape == (1, 5)
    from sdebench.simulate.tables import LinearTables

    problem = sdebench.problem("brownian_linear")
    tables = problem.tables(None, problem.time_grid(2))
    assert isinstance(tables, LinearTables)
    result = sdebench.measure(
        problem, "pathwise", n_steps=2, n_paths=16, n_replicates=2
    )
    from sdebench.measure.tails import tail_index

    assert isinstance(result, sdebench.Measurement)
    assert callable(tail_index)


# ---- simulate ---------------------------------------------------------------
@pytest.mark.parametrize("name", ["damped_oscillator", "follmer_mixture"])
def test_simulate_gives_the_paths_that_estimators_see(name):
    import torch

    from sdebench.simulate.noise import split_seed
    from sdebench.view import View

    problem = sdebench.problem(name)
    times, theta = problem.time_grid(5), problem.theta("halfway")
    view = View(
        problem.tables(theta, times),
        times,
        theta,
        key=split_seed(4),
        replicate=1,
        first_path=0,
        n_paths=37,
    )
    ours = sdebench.simulate(
        problem,
        point="halfway",
        n_steps=5,
        n_paths=37,
        seed=4,
        replicate=1,
        keep_states=True,
    )
    theirs = view.rollout()
    states = torch.stack(theirs.states).permute(0, 2, 1).numpy()
    np.testing.assert_allclose(ours.states, states, rtol=1e-11, atol=1e-11)
    for part in ("control_cost", "running_cost", "martingale", "reward", "cost"):
        np.testing.assert_allclose(
            getattr(ours, part), getattr(theirs, part), rtol=1e-10, atol=1e-10
        )
    np.testing.assert_allclose(
        ours.log_weight, theirs.log_weight, rtol=1e-10, atol=1e-10
    )


def test_simulate_does_not_depend_on_threads_or_on_what_is_kept():
    settings = {"n_steps": 4, "n_paths": 700, "seed": 8}
    one = sdebench.simulate("two_modes", **settings)
    two = sdebench.simulate("two_modes", threads=2, **settings)
    kept = sdebench.simulate("two_modes", keep_states=True, **settings)
    few = sdebench.simulate("two_modes", **settings | {"n_paths": 300})
    for part in ("terminal", "cost", "log_weight"):
        np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
        np.testing.assert_array_equal(getattr(one, part), getattr(kept, part))
        np.testing.assert_array_equal(getattr(one, part)[..., :300], getattr(few, part))
    assert one.states is None
    assert kept.states.shape == (5, 1, 700)


@pytest.mark.parametrize("settings", [{"n_paths": 0}, {"threads": 0}])
def test_simulate_refuses_settings_out_of_range(settings):
    with pytest.raises(sdebench.ParameterError, match="must be at least 1"):
        sdebench.simulate("two_modes", **settings)


# ---- measurements as objects ------------------------------------------------
@pytest.fixture(scope="module")
def measurement():
    return sdebench.measure(
        "brownian_linear", "pathwise", n_steps=3, n_paths=32, n_replicates=4
    )


def test_measurement_gives_its_columns_as_attributes(measurement):
    assert measurement.verdict == measurement.row["verdict"]
    assert measurement.mean == measurement.row["mean"]
    with pytest.raises(AttributeError):
        measurement.no_such_column  # noqa: B018
    text = repr(measurement)
    assert "brownian_linear" in text
    assert "\n" not in text


def test_measurement_can_be_copied_and_stored(measurement):
    assert pickle.loads(pickle.dumps(measurement)).row["mean"] == measurement.mean
    assert copy.deepcopy(measurement).row.keys() == measurement.row.keys()
    json.dumps(measurement.row)


def test_measurement_to_frame(measurement):
    frame = measurement.to_frame()
    assert len(frame) == 1
    assert set(frame.columns) == set(measurement.row)
    assert frame.loc[0, "problem"] == "brownian_linear"


# ---- errors -----------------------------------------------------------------
def test_errors_are_standard_errors_too():
    for error, standard in (
        (sdebench.UnknownNameError, KeyError),
        (sdebench.ParameterError, ValueError),
        (sdebench.NotExactError, LookupError),
        (sdebench.NumericalError, ArithmeticError),
    ):
        assert issubclass(error, standard)
        assert issubclass(error, sdebench.SDEBenchError)
    text = str(sdebench.UnknownNameError("one sentence"))
    assert text == "one sentence"


def test_help_shows_every_parameter_of_a_callable_module():
    assert [*inspect.signature(sdebench.measure).parameters][:2] == [
        "problem",
        "estimator",
    ]
    assert "spec" in inspect.signature(sdebench.problem).parameters
