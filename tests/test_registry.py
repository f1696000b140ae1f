"""Names, specifications and their errors."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sdebench
import sdebench.estimators
import sdebench.problems
from sdebench import registry
from sdebench.errors import ParameterError, SDEBenchError, UnknownNameError
from sdebench.problem import ESTIMANDS

NAMES = {
    "problem": registry.problem_names(),
    "estimator": registry.estimator_names(),
}
BUILD = {"problem": registry.problem, "estimator": registry.estimator}
EVERYTHING = [(kind, name) for kind, names in NAMES.items() for name in names]


@pytest.mark.parametrize("kind", ["problem", "estimator"])
def test_names_are_the_file_stems(kind):
    package = {"problem": sdebench.problems, "estimator": sdebench.estimators}[kind]
    stems = sorted(
        path.stem
        for path in Path(package.__path__[0]).glob("*.py")
        if not path.stem.startswith("_")
    )
    assert NAMES[kind] == stems
    assert stems
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", stem) for stem in stems)


def test_listing_names_imports_no_catalogue_file_and_no_numpy():
    code = (
        "import sys, sdebench\n"
        "assert sdebench.problem_names() and sdebench.estimator_names()\n"
        "print(sorted(m for m in sys.modules if m == 'numpy' or "
        "m.startswith(('sdebench.problems.', 'sdebench.estimators.'))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_every_file_builds_and_describes_itself(kind, name):
    built = BUILD[kind](name)
    assert built.name == name
    assert built.label == name
    assert built.source
    assert built.summary.endswith(".")
    if kind == "problem":
        assert built.hardness
        assert built.default_steps >= 1
        assert built.n_params == len(built.theta_star) == len(built.parameter_names)
    else:
        assert built.unbiased
        assert built.estimand in ESTIMANDS
        assert built.reduction in ("mean", "log_mean_exp")
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.anything = 1


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_labels_of_variants_are_specifications(kind, name):
    variants = type(BUILD[kind](name)).variants
    assert variants
    for variant in variants:
        built = BUILD[kind](name, **variant)
        assert BUILD[kind](built.label) == built
        assert BUILD[kind](built.label.replace("_", "-", name.count("_"))) == built


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_parameters_are_plain_data(kind, name):
    """They are written to results as JSON and must build the same object again."""
    built = BUILD[kind](name)
    values = built.parameters if kind == "problem" else built.options
    assert BUILD[kind](name, **json.loads(json.dumps(values))) == built
    hash(built)


def test_parse():
    parse = registry.parse
    assert parse("two-modes") == ("two_modes", {})
    name, values = parse("a:x=1,y=2.5,z=word,b=true,l=[1,2],n=-1e-3")
    assert name == "a"
    assert values == {
        "x": 1,
        "y": 2.5,
        "z": "word",
        "b": True,
        "l": [1, 2],
        "n": -1e-3,
    }


@pytest.mark.parametrize("spec", ["two_modes:beta", "two_modes:=1", "two_modes:a=1,"])
def test_a_parameter_without_value_is_refused(spec):
    with pytest.raises(ParameterError, match="write name:parameter=value"):
        registry.problem(spec)


def test_numbers_take_the_type_of_the_default():
    assert registry.problem("two_modes", beta=1).parameters["beta"] == 1.0
    assert isinstance(registry.problem("two_modes:beta=1").beta, float)
    dim = registry.problem("brownian_linear:dim=3.0").dim
    assert dim == 3
    assert isinstance(dim, int)


@pytest.mark.parametrize(
    ("spec", "given"),
    [
        ("brownian_linear", {"dim": 2.5}),
        ("brownian_linear", {"dim": "two"}),
        ("brownian_linear", {"dim": True}),
        ("two_modes", {"beta": "small"}),
        ("two_modes", {"start": 3}),
        ("two_modes", {"beta": None}),
    ],
)
def test_wrong_types_are_refused_with_the_default(spec, given):
    ((name, value),) = given.items()
    with pytest.raises(ParameterError) as caught:
        registry.problem(spec, **given)
    message = str(caught.value)
    assert name in message
    assert repr(value) in message
    assert "default is" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: registry.problem("two_mode"), "two_modes"),
        (lambda: registry.problem("ou_linnear"), "ou_linear"),
        (lambda: registry.estimator("pathwize"), "pathwise"),
        (lambda: registry.problem("two_modes", bita=1.0), "beta"),
        (lambda: registry.problem("two_modes:bita=1.0"), "beta"),
        (lambda: registry.estimator("reinforce:base_line=mean"), "baseline"),
        (lambda: registry.estimator("reinforce", baseline="leave_1_out"), "leave_one"),
        (lambda: registry.problem("two_modes").theta("half-way"), "halfway"),
        (
            lambda: registry.estimator("path_importance_sampling", proposal="zeros"),
            "zero",
        ),
    ],
)
def test_unknown_names_come_with_the_nearest_ones(call, hint):
    with pytest.raises(UnknownNameError) as caught:
        call()
    assert "unknown" in str(caught.value)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, KeyError)


def test_names_without_a_near_one_list_all():
    with pytest.raises(UnknownNameError) as caught:
        registry.estimator("zzzzzz")
    for name in NAMES["estimator"]:
        assert name in str(caught.value)


@pytest.mark.parametrize("private", ["_ou_quadratic", "_tilted_mixture", "__init__"])
def test_private_files_are_not_problems(private):
    with pytest.raises(UnknownNameError):
        registry.problem(private)


def test_a_file_holds_exactly_one_public_class(monkeypatch):
    module = sys.modules[type(registry.estimator("pathwise")).__module__]
    second = type("Second", (type(registry.estimator("pathwise")),), {})
    second.__module__ = module.__name__
    monkeypatch.setattr(module, "Second", second, raising=False)
    with pytest.raises(SDEBenchError, match="exactly one"):
        registry.estimator("pathwise")


def test_label_shows_what_differs_from_the_defaults():
    defaults = {"a": 1, "b": "x", "c": (1, 2)}
    assert registry.label("n", dict(defaults), defaults) == "n"
    changed = {"a": 2.5, "b": "y", "c": (1, 2)}
    assert registry.label("n", changed, defaults) == "n:a=2.5,b=y"


# ---- points and grids of a problem ------------------------------------------
def test_points_are_multiples_of_the_optimum():
    problem = registry.problem("two_modes")
    for name, factor in (
        ("zero", 0),
        ("halfway", 0.5),
        ("optimum", 1),
        ("overshoot", 1.5),
    ):
        np.testing.assert_array_equal(problem.theta(name), factor * problem.theta_star)
    np.testing.assert_array_equal(problem.theta([1, 2]), [1.0, 2.0])


@pytest.mark.parametrize(
    "theta", [[1.0], [1.0, np.nan], [[1.0, 2.0]], [np.inf, 0.0], ["a", "b"], 3.0]
)
def test_theta_that_does_not_fit_is_refused(theta):
    with pytest.raises(ParameterError, match=r"give 2 finite numbers \(linear_1, quad"):
        registry.problem("two_modes").theta(theta)


@pytest.mark.parametrize(
    "steps",
    [
        0,
        -3,
        [0.0],
        [0.0, 0.5],
        [0.1, 1.0],
        [0.0, 0.6, 0.5, 1.0],
        [0.0, 0.5, 0.5, 1.0],
        [[0.0, 1.0]],
        [0.0, np.nan, 1.0],
    ],
)
def test_grids_that_do_not_fit_are_refused(steps):
    with pytest.raises(ParameterError, match="is not allowed; give"):
        registry.problem("two_modes").time_grid(steps)


def test_grids():
    problem = registry.problem("two_modes")
    assert len(problem.time_grid()) == problem.default_steps + 1
    np.testing.assert_allclose(problem.time_grid(4), [0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_array_equal(problem.time_grid([0, 0.1, 1]), [0.0, 0.1, 1.0])
    with pytest.raises(UnknownNameError, match="euler_maruyama"):
        problem.tables(None, problem.time_grid(3), "euler")
