"""The command line: what it prints, what it refuses, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdebench import cli, registry, store
from sdebench.errors import NumericalError

HEAVY = (
    "numpy",
    "torch",
    "numba",
    "scipy",
    "pandas",
    "pyarrow",
    "seaborn",
    "matplotlib",
)

ROW = {
    "problem": "brownian_linear",
    "estimator": "pathwise",
    "problem_parameters": "{}",
    "estimator_options": "{}",
    "point": "halfway",
    "n_steps": 20,
    "n_paths": 256,
    "n_replicates": 64,
    "backend": "numba",
    "dtype": "float64",
    "seed": 0,
    "estimand": "gradient",
    "parameter_names": ["a", "b"],
    "truth": [1 / 3, 0.0],
    "mean": [0.1 + 0.2, 0.0],
    "std_error": [1e-3, 0.0],
    "bias": [-0.03, 0.0],
    "bias_low": [-0.04, 0.0],
    "bias_high": [-0.02, 0.0],
    "relative_bias": 0.1,
    "relative_bias_low": 0.05,
    "relative_bias_high": 0.15,
    "relative_bias_own": float("nan"),
    "variance": float("inf"),
    "variance_low": 1.0,
    "variance_high": float("inf"),
    "ns_per_path_step": 10.0,
    "drift_evaluations": 20.0,
    "seconds": 0.1,
    "verdict": "biased",
    "status": "ok",
    "reason": "",
}


@pytest.fixture
def sdebench(capsys):
    """Call the command line; return exit code, output and errors."""

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


@pytest.fixture
def fake_measure(monkeypatch):
    from types import SimpleNamespace

    from sdebench import measure

    calls = []

    def fake(problem, estimator, **settings):
        calls.append((problem, estimator, settings))
        return SimpleNamespace(row=dict(ROW))

    monkeypatch.setattr(measure, "measure", fake)
    return calls


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )


# ---------------------------------------------------------------- start


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "sdebench", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("sdebench, version")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    """The budget of 0.4 s is met by what is not imported; clocks are noisy."""
    done = python(
        f"""
import sys
from sdebench import cli
try:
    cli.main({arguments!r})
except SystemExit as end:
    assert end.code == 0
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    )
    assert done.returncode == 0, done.stderr
    assert "sdebench" in done.stdout


def test_every_command_has_help(sdebench):
    _, out, _ = sdebench("--help")
    for name in ("problems", "estimators", "truth", "measure", "run", "table", "plot"):
        assert name in out
        assert sdebench(name, "--help")[0] == 0


def test_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -c 'from sdebench.cli import main; main([\"problems\"])'"
        " | head -n 1",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# ---------------------------------------------------------------- catalogue


@pytest.mark.parametrize("kind", ["problem", "estimator"])
def test_lists(sdebench, kind):
    names = getattr(registry, f"{kind}_names")()
    code, out, _ = sdebench(f"{kind}s", "--json")
    assert code == 0
    assert [row[kind] for row in json.loads(out)] == names
    for format in ("md", "csv", "latex", "html"):
        code, out, _ = sdebench(f"{kind}s", "--format", format)
        assert code == 0
        assert all(name.replace("_", r"\_") in out or name in out for name in names)
    code, out, _ = sdebench(f"{kind}s")
    assert code == 0
    assert all(name in out for name in names)


def test_describe(sdebench):
    code, out, _ = sdebench("problems", "brownian-linear", "--json")
    assert code == 0
    record = json.loads(out)
    problem = registry.problem("brownian_linear")
    assert record["problem"] == "brownian_linear"
    assert record["points"]["optimum"] == problem.points["optimum"].tolist()
    code, out, _ = sdebench("estimators", "pathwise", "--json")
    assert json.loads(out)["estimator"] == "pathwise"
    assert "pathwise" in sdebench("estimators", "pathwise")[1]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["problems", "brownian_linaer"], "did you mean brownian_linear"),
        (["estimators", "pathwize"], "did you mean pathwise"),
        (["truth", "brownian_liner"], "did you mean brownian_linear"),
        (["truth", "brownian_linear:dimm=3"], "unknown parameter"),
        (["truth", "brownian_linear", "--at", "halfwy"], "did you mean halfway"),
        (["truth", "brownian_linear", "--at", "[1, 2]"], "does not fit"),
        (["truth", "brownian_linear", "--at", "[1, NaN, 2]"], "finite"),
        (["truth", "brownian_linear", "--steps", "0"], "--steps"),
        (["truth", "brownian_linear", "--x", "[1, 2"], "not JSON"),
        (["truth", "brownian_linear", "--x", "[1, 2]"], "expected (..., 1)"),
        (["truth", "brownian_linear", "--x", "[1]", "--t", "9"], "outside"),
        (["truth", "brownian_linear", "--t", "0.5"], "give --x"),
        (["measure", "brownian_linear", "pathwize"], "did you mean pathwise"),
        (["measure", "brownian_linear", "pathwise", "--target", "-1%"], "positive"),
        (
            ["measure", "brownian_linear", "pathwise", "--budget", "1d"],
            "not a positive",
        ),
        (["measure", "brownian_linear", "pathwise", "--dtype", "float16"], "float32"),
        (["run", "quik"], "did you mean quick"),
        (["run", "--problem", "brownian_linaer"], "did you mean brownian_linear"),
        (["run", "--jobs", "0"], "--jobs"),
        (["table", "/absent"], "no results in /absent"),
        (["plot", "/absent"], "no results in /absent"),
        (["tabel"], "table"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(sdebench, arguments, hint):
    code, out, err = sdebench(*arguments)
    assert code == 2
    assert hint in err
    assert out == ""
    assert "Traceback" not in err


def test_debug_shows_the_traceback():
    with pytest.raises(store.ResultsError):
        cli.main(["table", "/absent", "--debug"])


# ---------------------------------------------------------------- truth


def test_truth_json_is_exact(sdebench):
    """Every number reads back to the bits that the library returns."""
    problem = registry.problem("ou_linear")
    theta = [0.1, 1 / 3, -0.7]
    arguments = ("truth", "ou-linear", "--at", json.dumps(theta), "--json")
    record = json.loads(sdebench(*arguments)[1])
    assert record["theta"] == theta
    assert record["gradient"] == problem.truth.gradient(theta).tolist()
    assert record["log_normalizer"] == problem.truth.log_normalizer()
    assert record["objective"] == problem.truth.objective(theta)
    discrete = json.loads(sdebench(*arguments, "--steps", "7")[1])
    assert discrete["gradient"] == problem.truth.gradient(theta, n_steps=7).tolist()
    assert discrete["gradient"] != record["gradient"]
    x = [0.1 * i for i in range(problem.dim)]
    record = json.loads(sdebench(*arguments, "--x", json.dumps(x), "--t", "0.25")[1])
    assert record["control"] == problem.truth.control(x, 0.25).tolist()
    assert record["value"] == float(problem.truth.value(x, 0.25))


def test_truth_says_what_is_not_exact(sdebench):
    record = json.loads(sdebench("truth", "two_modes", "--json")[1])
    assert record["matching_gradient"] is None
    assert "optimum" in record["not_exact"]["matching_gradient"]
    code, out, _ = sdebench("truth", "two_modes")
    assert code == 0
    assert "not exact" in out


# ---------------------------------------------------------------- measure


def test_measure_passes_the_settings_on(sdebench, fake_measure):
    code, out, _ = sdebench(
        *(
            "measure",
            "brownian-linear",
            "reinforce:baseline=mean",
            "--point",
            "[1,2,3]",
        ),
        *(
            "--steps",
            "10",
            "--target",
            "1%",
            "--budget",
            "2m",
            "--seed",
            str(2**64 - 1),
        ),
        "--json",
    )
    assert code == 0
    problem, estimator, settings = fake_measure[0]
    assert problem.name == "brownian_linear"
    assert estimator.options["baseline"] == "mean"
    assert settings["point"] == [1, 2, 3]
    assert settings["n_steps"] == 10
    assert settings["target"] == 0.01
    assert settings["budget"] == 120.0
    assert settings["seed"] == 2**64 - 1
    assert "n_paths" not in settings  # the library's default
    row = json.loads(out)
    assert row["mean"][0] == 0.1 + 0.2
    assert row["variance"] == "Infinity"
    assert row["relative_bias_own"] is None


def test_measure_for_the_eye(sdebench, fake_measure):
    _, out, _ = sdebench("measure", "brownian_linear", "pathwise")
    assert out.startswith("pathwise on brownian_linear at halfway: biased")
    assert "0.1  [0.05, 0.15]" in out
    assert "nan" not in out


def test_numerical_error_is_one_line(sdebench, monkeypatch):
    from sdebench import measure

    def fail(*arguments, **settings):
        raise NumericalError("pathwise returned NaN\nin replicate 3")

    monkeypatch.setattr(measure, "measure", fail)
    code, _, err = sdebench("measure", "brownian_linear", "pathwise")
    assert (code, err) == (2, "sdebench: pathwise returned NaN in replicate 3\n")


def test_interrupt(sdebench, monkeypatch):
    from sdebench import run

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    code, _, err = sdebench("run")
    assert code == 130
    assert "run the same command again" in err


# ---------------------------------------------------------------- run, table, plot


def test_run_table_plot(sdebench, tmp_path):
    """One real pair through the whole chain."""
    only = ("--problem", "brownian-*", "--estimator", "pathwise")
    command = ("run", "quick", "--jobs", "1", "--folder", str(tmp_path), *only)
    code, out, err = sdebench(*command)
    assert code == 0, err
    assert "pathwise" in out
    figures = [
        Path(line) for line in out.splitlines() if line.startswith(str(tmp_path))
    ]
    assert figures
    assert all(path.exists() for path in figures)
    assert "measuring" in err

    code, out, err = sdebench(*command, "--json", "--no-plot")
    assert code == 0
    assert "measuring 0 cells" in err
    rows = json.loads(out)["rows"]
    assert {row["problem"] for row in rows} == {"brownian_linear"}

    output = tmp_path / "new" / "table.csv"
    code, out, _ = sdebench("table", str(tmp_path), "--output", str(output))
    assert (code, out) == (0, "")
    assert len(output.read_text().splitlines()) == len(rows) + 1
    assert sdebench("table", str(tmp_path), "-o", "table.xyz")[0] == 2
    code, out, _ = sdebench("table", str(tmp_path / "quick"), "--format", "md")
    assert code == 0
    assert "brownian" in out
    short = ("table", str(tmp_path), "--headline", "--format", "csv")
    code, out, _ = sdebench(*short)
    assert {"point", "efficiency"}.isdisjoint(out.splitlines()[0].split(","))
    lines = len(out.splitlines())
    code, out, _ = sdebench(*short, "--point", "halfway", "--point", "optimum")
    assert {"point", "efficiency"} <= set(out.splitlines()[0].split(","))
    assert len(out.splitlines()) == 2 * lines - 1
    code, out, _ = sdebench("plot", str(tmp_path), "-o", str(tmp_path / "f"), "--json")
    assert code == 0
    assert all(Path(path).exists() for path in json.loads(out))


def test_failed_cells_give_exit_code_1(sdebench, tmp_path, monkeypatch):
    from sdebench import run

    failed = {**ROW, "status": "failed", "reason": "overflow"}
    frame = store.to_frame([ROW, failed])
    monkeypatch.setattr(run, "run", lambda *a, **k: frame)
    code, _, err = sdebench("run", "--no-plot", "--format", "csv")
    assert code == 1
    assert "1 of 2 cells failed, the first: brownian_linear × pathwise: overflow" in err
