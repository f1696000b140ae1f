from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_as_track_accepts_nonnegative_numbers():
    from bench.accuracy import as_track

    for value in (0, 1.5, np.float32(2.0), np.float64(3.0), np.array(4.0)):
        result = as_track(value)
        assert type(result) is float
        assert result == float(value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1.0, True, "1", np.ones(2), {"a": 1}, [1.0]]
)
def test_as_track_refuses_what_asv_cannot_compare(value):
    from bench.accuracy import as_track

    with pytest.raises(ValueError, match=r"not a number|must be finite"):
        as_track(value)


def test_as_track_skips_what_does_not_exist():
    pytest.importorskip("asv_runner")
    from bench.accuracy import as_track

    # asv's own class is a NotImplementedError
    with pytest.raises(NotImplementedError):
        as_track(None)


def test_bench_imports_without_asv_and_jax():
    names = [
        f"bench.{file.stem}"
        for file in sorted((ROOT / "bench").glob("*.py"))
        if file.stem != "__init__"
    ]
    code = (
        "import sys\n"
        "for name in ('asv', 'asv_runner', 'jax', 'jaxlib'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {names}:\n"
        "    __import__(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_asv_takes_no_other_class_for_a_benchmark():
    allowed = {"kernels", "accuracy"}
    prefixes = ("time_", "timeraw_", "mem_", "peakmem_", "track_")
    for file in (ROOT / "bench").glob("*.py"):
        module = importlib.import_module(f"bench.{file.stem}")
        for name, thing in vars(module).items():
            if name.startswith("_") or not isinstance(thing, type):
                continue
            found = [m for m in dir(thing) if m.startswith(prefixes)]
            assert not found or (file.stem in allowed), (file.stem, name, found)


def test_accuracy_cell_is_deterministic_and_trackable(monkeypatch):
    from bench import accuracy

    settings = {**accuracy.SETTINGS, "n_steps": 4, "n_paths": 64, "n_replicates": 4}
    monkeypatch.setattr(accuracy, "SETTINGS", settings)
    first = accuracy.cell("brownian_linear", "pathwise")
    assert first == accuracy.cell("brownian_linear", "pathwise")
    assert all(accuracy.as_track(value) >= 0 for value in first)


@pytest.mark.parametrize("name", ["linear_1", "linear_2", "mixture_9"])
def test_peers_compute_the_same_problem(name):
    """Mean costs agree; 9 comparisons at 5 standard errors: false alarm 5e-6."""
    import sdebench
    from bench import peers
    from bench.cases import process

    problem = process(name)
    tables = problem.tables(problem.theta("halfway"), problem.time_grid(10))
    ours = sdebench.simulate(problem, point="halfway", n_steps=10, n_paths=4096)
    mixture = name.startswith("mixture")
    makers = (
        [peers.mixture_torch]
        if mixture
        else [peers.linear_numpy, peers.linear_torch, peers.linear_numba]
    )
    for make in makers:
        cost = make(tables, 4096)()
        spread = np.hypot(cost.std(), ours.cost.std()) / 64
        assert abs(cost.mean() - ours.cost.mean()) < 5 * spread, make.__name__


def test_torch_gradient_peer_is_unbiased():
    """Five components at 5 standard errors: false alarm 3e-6."""
    from bench import peers
    from bench.cases import process

    problem = process("linear_2")
    theta = problem.theta("halfway")
    tables = problem.tables(theta, problem.time_grid(10))
    rows = peers.gradient_torch(tables, theta, 4096)()
    exact = problem.truth.gradient(theta, n_steps=10)
    error = rows.std(1) / 64
    assert np.all(np.abs(rows.mean(1) - exact) < 5 * error + 1e-12)


def test_ratio_knows_its_direction():
    from bench.ratios import Ratio

    assert Ratio("a", 6.0, 5.0).met is True
    assert Ratio("a", 4.0, 5.0).met is False
    assert Ratio("a", 4.0, 5.0, at_most=True).met is True
    assert Ratio("a", 6.0, 5.0, at_most=True).met is False
    assert Ratio("a", 5.0, 5.0).met is Ratio("a", 5.0, 5.0, at_most=True).met is True
    assert Ratio("a", None, 5.0).met is None


def test_report_is_markdown():
    from bench.ratios import Ratio, Report, Speed, markdown

    report = Report(
        ratios=[Ratio("fast vs slow", 2.0, 5.0), Ratio("absent", None, 5.0)],
        speeds=[Speed("kernel", 4.0, 1.0)],
    )
    text = markdown(report)
    assert "| fast vs slow | 2x | >= 5x |  | **no** |" in text
    assert "| absent |  | >= 5x |  | not measured |" in text
    assert "| kernel | 4 | 1.00 | 25 % |" in text


def test_asv_check_passes(tmp_path):
    pytest.importorskip("asv")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "asv", "check", "--python=same"),
            *("--config", str(ROOT / "bench" / "asv.conf.json")),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
