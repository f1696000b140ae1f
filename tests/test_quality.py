"""The package is formatted, linted and typed, and its layout is what tools expect."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)]
)
def test_tool_is_clean(command):
    if importlib.util.find_spec(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: pip install -e '.[test]'")
    code, text = run(*command)
    assert code == 0, text


def test_catalogue_folders_are_links_to_the_top_level():
    for name in ("problems", "estimators"):
        link = ROOT / "sdebench" / name
        assert link.resolve() == ROOT / name


def test_nothing_imports_the_catalogue_under_its_top_level_name():
    # Two names for one file would make two modules of it.
    code = (
        "import sdebench, sys;"
        "[sdebench.problem(n) for n in sdebench.problem_names()];"
        "[sdebench.estimator(n) for n in sdebench.estimator_names()];"
        "assert 'problems' not in sys.modules and 'estimators' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0
