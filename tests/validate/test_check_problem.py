"""`check_problem`: right problems pass, each kind of mistake is caught and named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from functools import cached_property

import numpy as np
import pytest
from scipy.stats import binom

import sdebench
from sdebench.errors import (
    NotExactError,
    ParameterError,
    SDEBenchError,
    UnknownNameError,
    ValidationError,
)
from sdebench.files import load_class
from sdebench.problem import Problem, Truth
from sdebench.problems.gaussian_tilt import GaussianTilt
from sdebench.problems.two_modes import TwoModes
from sdebench.validate import problem_simulation as simulation
from sdebench.validate.new import write_new
from sdebench.validate.problem import check_problem
from sdebench.validate.problem_checks import (
    CheckFailedError,
    reduced,
    require_zero,
)

FALSE_ALARM = 1e-6
"""Of one call: forty calls with fixed seeds fail by chance with probability 4e-5."""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_new("problem", "pulled", tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def pulled(template):
    return load_class(template, kind="problem")


def changed(cls, truth=None, parameters=None, **members):
    """Return an instance of a subclass with other members, and other truth's members.

    A member is called with what it overrides as second argument.
    """

    def override(base, name, member):
        def method(self, *arguments, **options):
            original = getattr(super(found, self), name)
            return member(self, original, *arguments, **options)

        found = type(base.__name__, (base,), {name: method})
        found.__module__ = base.__module__
        return found

    for name, member in members.items():
        cls = override(cls, name, member)
    if truth:
        kind = type(cls().truth)
        for name, member in truth.items():
            kind = override(kind, name, member)
        prop = cached_property(lambda self: kind(self))
        prop.__set_name__(cls, "truth")
        cls = type(cls.__name__, (cls,), {"truth": prop, "__module__": cls.__module__})
    return cls(**(parameters or {}))


def validate(problem, **options):
    options = {"on_fail": "report", "false_alarm": FALSE_ALARM, **options}
    return check_problem(problem, **options)


def failed(report):
    return {check.name for check in report.checks if check.status == "failed"}


# ---- right problems ----------------------------------------------------------------


def test_the_template_passes_and_is_clean(template):
    report = check_problem(str(template))
    assert {check.status for check in report.checks} == {"passed"}
    text = str(report)
    assert "0.001 at most" in text
    assert all(check.name in text for check in report.checks)
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["passed"] is True
    assert {"name", "status", "value", "limit", "message"} < set(record["checks"][3])
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", str(template)]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_a_class_an_object_and_a_specification_are_the_same(pulled, template):
    given = (pulled, pulled(), f"{template}:target=1")
    names = ("control", "gradient", "law under u*")
    reports = [validate(each, seed=3, only=names) for each in given]
    values = [[(c.name, c.value) for c in report.checks] for report in reports]
    assert values[0] == values[1] == values[2]
    assert [name for name, _ in values[0][2:]] == list(names)
    assert reports[0].problem == "pulled"


@pytest.mark.parametrize(
    "parameters",
    [
        {"rate": 30.0, "dim": 1},
        {"noise_level": 20.0, "start_scale": 20.0, "target": 50.0, "weight": 1e-3},
        pytest.param(
            {"noise_level": 0.05, "start_scale": 0.05, "target": 0.1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"start_scale": 0.0, "rate": -2.0, "dim": 1}, marks=pytest.mark.slow
        ),
        pytest.param({"dim": 20, "target": 3.0}, marks=pytest.mark.slow),
    ],
)
def test_problems_on_other_scales_pass(pulled, parameters):
    report = validate(pulled(**parameters))
    assert report.passed, str(report)


def test_a_mixture_passes():
    report = validate(TwoModes())
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "spec",
    [
        "gaussian_tilt:schedule=ve,rate=3.0,mean=0.4",
        pytest.param("two_modes:variance=0.01", marks=pytest.mark.slow),
    ],
)
def test_problems_that_need_a_finer_look_pass(spec):
    """A small term of order one in the step; a control with sharp features."""
    names = ["HJB equation", "regret", "order in the time step"]
    report = validate(spec, only=names)
    assert report.passed, str(report)


STOCHASTIC = (
    "log Z under the base",
    "log Z under u*",
    "law under u*",
    "regret",
    "estimators",
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rate_of_false_alarms_over_the_catalogue():
    """Four runs of each problem at 20 %; more alarms than the limit: chance 1e-3."""
    runs = list(itertools.product(sdebench.problem_names(), (11, 12, 13, 14)))
    alarms = []
    for name, seed in runs:
        problem = reduced(sdebench.problem(name))
        report = validate(problem, seed=seed, false_alarm=0.2, only=STOCHASTIC)
        alarms += [(name, seed)] if failed(report) else []
    assert len(alarms) <= binom.isf(1e-3, len(runs), 0.2), alarms


# ---- wrong problems ----------------------------------------------------------------


def scaled(factor):
    return lambda self, original, *arguments: factor * original(*arguments)


def shifted(offset):
    return lambda self, original, *arguments: original(*arguments) + offset


def steeper_reward(self, original, x):
    return original(x) - 0.01 * np.sum(x**2, axis=-1)


def off_for_the_chain(self, original, theta, n_steps=None, scheme="euler_maruyama"):
    return original(theta, n_steps) * (1.0 if n_steps is None else 1.01)


def of_the_objective(self, original, *arguments):
    return self.gradient(*arguments)


def replaced(**changes):
    """Return a method `tables` whose tables have some arrays changed."""

    def tables(self, original, *arguments, **options):
        filled = original(*arguments, **options)
        return filled._replace(
            **{name: change(getattr(filled, name)) for name, change in changes.items()}
        )

    return tables


def moved(self, original, t):
    law = original(t)
    return dataclasses.replace(law, means=law.means + 1.0)


LINEAR = {
    "u* has the wrong sign": (
        {"truth": {"control": scaled(-1.0)}},
        {"HJB equation", "second route"},
    ),
    "log Z is off by 0.01": (
        {"truth": {"_log_normalizer": shifted(0.01)}},
        {"second route", "log Z under u*"},
    ),
    "the reward is not that of the closed form": (
        {"reward": steeper_reward},
        {"terminal condition", "second route", "coefficient tables"},
    ),
    "the gradient is 5 % too large": (
        {"truth": {"gradient": scaled(1.05)}},
        {"gradient", "discrete gradients", "estimators"},
    ),
    "the gradient of the chain only is 1 % too large": (
        {"truth": {"gradient": off_for_the_chain}},
        {"discrete gradients", "order in the time step"},
    ),
    "the drift is not that of the tables": (
        {"drift": scaled(1.01)},
        {"HJB equation", "second route", "coefficient tables"},
    ),
    "the tables are not the problem's": (
        {"tables": replaced(noise=lambda noise: 1.05 * noise)},
        {"coefficient tables", "order of the log-weights", "log Z under u*"},
    ),
    "the tables start elsewhere": (
        {"tables": replaced(start_mean=lambda mean: mean + 0.2)},
        {"second route", "law under u*"},
    ),
    "the tables' derivatives are in another order": (
        {"tables": replaced(basis=lambda basis: basis[::-1].copy())},
        {"parameter derivatives", "discrete gradients", "order in the time step"},
    ),
    "the matching gradient is that of J": (
        {"truth": {"matching_gradient": of_the_objective}},
        {"matching gradient", "estimators"},
    ),
}


@pytest.mark.parametrize("case", LINEAR)
def test_wrong_linear_problems_are_caught(pulled, case):
    members, expected = LINEAR[case]
    problem = changed(pulled, parameters={"dim": 1}, **members)
    report = validate(problem, only=sorted(expected))
    assert failed(report) == expected, str(report)


def test_all_checks_of_a_wrong_problem_run_and_are_named(pulled):
    """Only what is wrong fails: a gradient that is 5 % too large."""
    problem = changed(pulled, truth={"gradient": scaled(1.05)})
    report = validate(problem)
    wrong = {"gradient", "discrete gradients", "estimators"}
    assert failed(report) == wrong, str(report)
    assert len(report.checks) == 29
    found = report.check("gradient")
    assert found.value > found.limit == 1e-9
    assert "gradient against differences" in found.message
    with pytest.raises(ValidationError, match="did not pass 3 of 29 checks") as caught:
        report.raise_if_failed()
    assert caught.value.report is report
    with pytest.raises(AssertionError):
        check_problem(problem, only=["gradient"])


MIXTURES = {
    "u* lacks its half": (
        TwoModes,
        {"control": scaled(0.5)},
        {"HJB equation", "regret"},
    ),
    "log Z is off by 0.01": (
        TwoModes,
        {"_log_normalizer": shifted(0.01)},
        {"second route"},
    ),
    "log Z is off by 0.1": (
        TwoModes,
        {"_log_normalizer": shifted(0.1)},
        {"log Z under the base", "log Z under u*"},
    ),
    "J is 1e-6 too large": (
        TwoModes,
        {"_objective": scaled(1.0 + 1e-6)},
        {"gradient", "regret"},
    ),
    "the law under u* is elsewhere": (
        TwoModes,
        {"tilted_marginal": moved},
        {"second route", "law under u*"},
    ),
    "V is not what paths say": (
        GaussianTilt,
        {"value": shifted(0.3)},
        {"terminal condition", "order of the log-weights"},
    ),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_wrong_mixtures_are_caught(case):
    cls, truth, expected = MIXTURES[case]
    report = validate(changed(cls, truth=truth), only=sorted(expected))
    assert failed(report) == expected, str(report)


def test_a_wrong_objective_is_caught_by_paths():
    """In three dimensions no grid tells J: paths do."""
    problem = changed(
        GaussianTilt,
        truth={"_objective": scaled(1.2)},
        parameters={"dim": 3},
    )
    with pytest.raises(CheckFailedError, match="regret identity"):
        simulation.check_regret(problem, "halfway", alarm=1e-4)


# ---- mistakes in the code ----------------------------------------------------------

DRIFTS = {
    "return undefined * x": "NameError: name 'undefined' is not defined (broken.py,",
    "return super().drift(x, t).sum()": "return a numpy array|returns shape ()",
    "return super().drift(x, t)[..., :1]": "returns shape (1,); return (2,)",
    "return np.nan * x": "returns NaN or infinity in 2 of 2 numbers",
    "x *= 2.0; return super().drift(x, t)": "drift writes into its input x",
    "return super().drift(x, t).astype('float32')": "returns float32; return float64",
    "return super().drift(x, t).tolist()": "returns list; return a numpy array",
    "return -x + np.random.default_rng().normal()": "two answers to the same question",
    "return super().drift(x, t) - x.mean()": "batch against single states",
}


@pytest.mark.parametrize("code", DRIFTS)
def test_a_mistake_in_the_code_is_one_clear_line(template, tmp_path, code):
    path = tmp_path / "broken.py"
    body = "\n        ".join(code.split("; "))
    method = f"\n    def drift(self, x, t):\n        {body}\n"
    path.write_text(template.read_text("utf-8") + method, "utf-8")
    report = validate(str(path), only=["drift", "HJB equation", "coefficient tables"])
    found = report.check("drift")
    assert found.status == "failed"
    assert any(part in found.message for part in DRIFTS[code].split("|"))
    assert "\n" not in found.message
    if "undefined" in code:
        line = path.read_text("utf-8").splitlines().index(f"        {body}") + 1
        assert f"line {line})" in found.message
        assert "NameError" in found.traceback
        for name in ("HJB equation", "coefficient tables"):
            assert report.check(name).message == "stopped by the error of drift"


def test_a_problem_that_cannot_be_built_is_one_failed_check(template, tmp_path):
    path = tmp_path / "unbuilt.py"
    text = template.read_text("utf-8").replace("eye, zero =", "eye, nothing =")
    path.write_text(text, "utf-8")
    for given in (str(path), load_class(path, kind="problem")):
        report = validate(given)
        assert [check.name for check in report.checks] == ["construction"]
        assert "NameError: name 'zero' is not defined (unbuilt.py, line" in str(
            report.checks[0]
        )
        assert not report.passed


def test_empty_descriptions_are_a_note(pulled):
    problem = type("Bare", (pulled,), {"source": "", "formula": " "})()
    report = validate(problem, only=["settings"])
    assert report.passed
    assert report.check("metadata").status == "note"
    assert report.check("metadata").message.startswith("source, formula: empty")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"default_steps": 0}, "default_steps is 0"),
        ({"time_span": property(lambda self: (1.0, 0.0))}, "time_span is (1, 0)"),
        ({"variants": ({"target": "far"},)}, "TypeError|UFuncTypeError"),
        ({"parameter_names": ("a", "a", "b", "c", "d")}, "each once"),
        ({"theta_star": np.ones(7)}, "theta_star has shape (7,)"),
    ],
)
def test_wrong_settings_are_one_clear_line(pulled, members, message):
    problem = type("Wrong", (pulled,), members)()
    found = validate(problem, only=["settings"]).check("settings")
    assert found.status == "failed"
    assert any(part in found.message for part in message.split("|")), found.message


# ---- a direct subclass of Problem --------------------------------------------------


class ShortTruth(Truth):
    """V, u* and log Z only; the rest is left unwritten, or has a reason."""

    def __init__(self, problem):
        super().__init__(problem)
        self.whole = TwoModes().truth

    def control(self, x, t):
        return self.whole.control(x, t)

    def value(self, x, t):
        return self.whole.value(x, t)

    def _log_normalizer(self):
        return self.whole.log_normalizer()

    def _gradient(self, theta):
        raise NotExactError("nobody knows this gradient")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Short(Problem):
    """A problem that fills the tables itself."""

    problem_class = "by hand"
    dim = 1
    time_span = (0.0, 1.0)
    parameter_names = TwoModes().parameter_names
    theta_star = TwoModes().theta_star

    def drift(self, x, t):
        return TwoModes().drift(x, t)

    def diffusion(self, t):
        return TwoModes().diffusion(t)

    def running_cost(self, x, t):
        return TwoModes().running_cost(x, t)

    def reward(self, x):
        return TwoModes().reward(x)

    def tables(self, theta, times, scheme="euler_maruyama"):
        return TwoModes().tables(theta, times, scheme)

    @cached_property
    def truth(self):
        return ShortTruth(self)


def test_a_direct_subclass_is_checked_as_far_as_its_truth_goes():
    names = ["HJB equation", "terminal condition", "gradient", "policy", "law under u*"]
    report = validate(Short(), only=[*names, "log Z under u*", "second route"])
    status = {check.name: check.status for check in report.checks}
    for name in ("HJB equation", "terminal condition", "log Z under u*"):
        assert status[name] == "passed", str(report)
    assert report.check("gradient").message == "nobody knows this gradient"
    assert status["gradient"] == status["second route"] == "skipped"
    for name in ("policy", "law under u*"):
        assert status[name] == "failed"
        assert "raise NotExactError with the reason" in report.check(name).message


# ---- settings of the validation ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on_fail": "warn"}, UnknownNameError, "on_fail"),
        ({"false_alarm": 0.0}, ParameterError, "not a probability"),
        ({"only": ["HJB"]}, UnknownNameError, "HJB equation"),
        ({"seed": -1}, ParameterError, "seed"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        check_problem("two_modes", **options)


def test_a_problem_that_does_not_exist_is_refused():
    with pytest.raises(SDEBenchError, match="there is no file"):
        check_problem("nowhere/else.py")
    with pytest.raises(UnknownNameError, match="two_modes"):
        check_problem("two_mode")


def test_z_tests_have_the_stated_false_alarm_rate():
    """1000 families of 5 comparisons at 20 %: above 247 with chance 1e-4."""
    rng = np.random.default_rng(7)
    alarms = 0
    for row in rng.normal(size=(1000, 5)):
        try:
            require_zero(row, np.ones(5), "noise", alarm=0.2)
        except CheckFailedError:
            alarms += 1
    assert binom.ppf(1e-4, 1000, 0.18) <= alarms <= binom.isf(1e-4, 1000, 0.2)
