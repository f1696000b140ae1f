"""Files of a user's own: found, loaded, started from a template, or refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sdebench
from sdebench import cli, registry
from sdebench.errors import ParameterError, SDEBenchError, UnknownNameError
from sdebench.files import file_spec, load_class
from sdebench.validate import write_new

ESTIMATOR = """\
from dataclasses import dataclass
from sdebench import Estimator

@dataclass(frozen=True, kw_only=True)
class {name}(Estimator):
    '''One line.'''

    estimand = "gradient"
    needs = frozenset({{"control_parameter_vjp"}})
    scale: float = 1.0

    def statistics(self, view):
        paths = view.rollout()
        total = 0.0
        for n in range(view.n_steps):
            x, w, z = paths.states[n], paths.controls[n], paths.noises[n]
            v = paths.cost[:, None] * z + w
            total = total + view.control_parameter_vjp(n, x, v)
        return self.scale * total
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def run(*arguments):
    """Run the command line here; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


# ---- specifications -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a/b.py", ("a/b.py", "", "")),
        ("a/b.py:Two", ("a/b.py", "Two", "")),
        ("b.py:k=1,m=x", ("b.py", "", "k=1,m=x")),
        ("b.py:Two:k=1", ("b.py", "Two", "k=1")),
    ],
)
def test_specifications_of_files(spec, parts):
    found = file_spec(spec)
    assert (str(found.path), *found[1:]) == parts


@pytest.mark.parametrize("spec", ["pathwise", "two_modes:beta=1", "python", "x.pyc"])
def test_names_are_not_files(spec):
    assert file_spec(spec) is None


def test_a_file_is_used_like_a_name(write):
    path = write(ESTIMATOR.format(name="Mine"))
    built = registry.estimator(f"{path}:scale=2")
    assert (built.name, built.label, built.scale) == ("mine", "mine:scale=2.0", 2.0)
    measured = sdebench.measure(
        "brownian_linear", str(path), backend="torch", n_replicates=4
    )
    assert measured.verdict == "discretization bias only"
    with pytest.raises(UnknownNameError, match="did you mean scale"):
        registry.estimator(f"{path}:scael=2")


def test_an_edited_file_is_read_again(write):
    path = write(ESTIMATOR.format(name="Mine"))
    first = load_class(path)
    assert load_class(path) is first
    write(ESTIMATOR.format(name="Other"))
    assert load_class(path).__name__ == "Other"


def test_helpers_beside_the_file_are_found(write):
    write("FACTOR = 1.0\n", "my_helper_module.py")
    text = "from my_helper_module import FACTOR\n" + ESTIMATOR.format(name="Mine")
    assert load_class(write(text)).__name__ == "Mine"
    sys.modules.pop("my_helper_module")


TWO = ESTIMATOR.format(name="One") + ESTIMATOR.format(name="Two")
ABSTRACT = """\
from sdebench import Estimator

class Half(Estimator):
    estimand = "gradient"
"""


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import nothing_like_it\n", "mine.py", "does not import: ModuleNotFoundError"),
        ("x = 1\ny = x / 0\n", "mine.py", r"ZeroDivisionError: .*\(line 2\)"),
        ("def f(:\n", "mine.py", "SyntaxError: .*line 1"),
        ("raise SystemExit(3)\n", "mine.py", "does not import: SystemExit"),
        ("x = 1\n", "mine.py", "no subclass of Estimator or Problem; `sdebench new"),
        ("x = 1\n", "my file.py", "'my file' is not a Python name; rename"),
        (TWO, "mine.py", r"2 classes \(One, Two\); say which: .*mine.py:One"),
        (ABSTRACT, "mine.py", "Half in .* lacks statistics"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(write, text, name, message, capsys):
    path = write(text, name)
    with pytest.raises(SDEBenchError, match=message):
        load_class(path)
    assert run("validate", path) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_classes_that_are_not_there(write, tmp_path):
    path = write(TWO)
    assert load_class(path, "Two").__name__ == "Two"
    with pytest.raises(UnknownNameError, match="did you mean"):
        load_class(path, "Tow")
    with pytest.raises(SDEBenchError, match=r"there is no file .*absent\.py"):
        load_class(tmp_path / "absent.py")
    with pytest.raises(SDEBenchError, match="no subclass of Problem"):
        load_class(path, kind="problem")


# ---- templates ----------------------------------------------------------------------


def test_the_template_of_an_estimator_passes(tmp_path):
    path = write_new("estimator", "reward-to-go", tmp_path)
    assert path.name == "reward_to_go.py"
    report = sdebench.check_estimator(
        str(path), problems=["brownian_linear"], paths=0.125, time_limit=None
    )
    assert report.passed
    assert report.class_name == "RewardToGo"
    assert not [check for check in report.checks if check.status == "note"]
    for command in (("check",), ("format", "--check")):
        ruff = [sys.executable, "-m", "ruff", *command, "--line-length", "88", path]
        done = subprocess.run(ruff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Mixed", "lower-case"),
        ("two words", "lower-case"),
        ("class", "lower-case"),
        ("torch", "would hide it"),
    ],
)
def test_names_that_cannot_be_files(name, error, tmp_path):
    with pytest.raises(ParameterError, match=error):
        write_new("estimator", name, tmp_path)


def test_nothing_is_overwritten(tmp_path, capsys):
    assert run("new", "estimator", "mine", "--folder", tmp_path) == 0
    assert str(tmp_path / "mine.py") in capsys.readouterr().out
    assert run("new", "estimator", "mine", "--folder", tmp_path) == 2
    assert "mine.py exists; choose another name" in capsys.readouterr().err
    assert run("new", "estimator", "pathwise", "--folder", tmp_path) == 2
    assert "pathwise is in the catalogue" in capsys.readouterr().err
    assert run("new", "problem", "mine", "--folder", tmp_path / "new") == 0


# ---- the command --------------------------------------------------------------------


def test_validate_prints_json_and_exits_with_the_verdict(write, capsys):
    path = write(ESTIMATOR.format(name="Mine"))
    options = ("--problem", "brownian_linear", "--paths", "0.125", "--quiet")
    assert run("validate", path, *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert {check["name"] for check in report["checks"]} >= {"unbiased", "dtype"}
    assert len(report["rows"]) == 8
    assert run("validate", f"{path}:scale=1.5", *options) == 1
    text = capsys.readouterr().out
    assert "✗  unbiased" in text
    assert "biased in" in text


@pytest.mark.slow
def test_what_a_file_prints_is_no_part_of_the_report(write, capfd):
    loud = "print('y')\n        total = 0.0"
    text = ESTIMATOR.format(name="Mine").replace("total = 0.0", loud)
    path = write("print('x')\n" + text)
    options = ("--problem", "brownian_linear", "--paths", "0.125", "--quiet")
    assert run("validate", path, *options, "--json") == 0
    seen = capfd.readouterr()
    assert json.loads(seen.out)["passed"] is True
    assert "x" in seen.err
    assert "y" in seen.err


def test_a_traceback_comes_with_debug_only(write, capsys, monkeypatch):
    text = ESTIMATOR.format(name="Mine").replace("total = 0.0", "total = 1 / 0")
    path = write(text)
    monkeypatch.chdir(path.parent)
    path = path.name  # relative, as it is usually typed
    options = ("--problem", "brownian_linear", "--quiet", "--jobs", 1)
    assert run("validate", path, *options) == 1
    seen = capsys.readouterr()
    text = " ".join(seen.out.split())
    assert "ZeroDivisionError: division by zero (mine.py, line 14)" in text
    assert "Traceback" not in seen.out + seen.err
    assert run("validate", path, *options, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_validate_a_problem(tmp_path, capsys):
    path = write_new("problem", "mine", tmp_path)
    assert run("validate", path, "--quiet", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert run("validate", path, "--paths", 2) == 2
    assert "--paths is for estimators" in capsys.readouterr().err


def test_validate_what_is_not_there(capsys):
    assert run("validate", "pathwize") == 2
    assert "neither a file ending in .py nor" in capsys.readouterr().err
    assert run("validate", "absent.py") == 2
    assert "there is no file absent.py" in capsys.readouterr().err
