"""Running: order, parallelism, failures, and kills at any moment."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdebench import plan, provenance, run, store
from sdebench.errors import (
    ParameterError,
    ResultsError,
    SDEBenchError,
    UnknownNameError,
)
from sdebench.plan import Cell
from sdebench.progress import Progress

PROVENANCE = {"created", "commit", "machine", "seconds", "worker"}


def cells(n_problems=4, estimators=("a", "b", "c"), **settings):
    chosen = {"point": "halfway", "n_steps": 8, "n_paths": 16, "n_replicates": 4}
    chosen |= settings
    return [
        Cell(f"problem_{i}", e, **chosen) for i in range(n_problems) for e in estimators
    ]


def measure(cells):
    """Stand in for the measurement: rows that depend on the cell alone."""
    if run.code_fingerprint is provenance.code_fingerprint:
        run.code_fingerprint = same_code  # a worker or script: no fixture there
    for cell in cells:
        numbers = random.Random(cell.key)
        yield {
            "problem": cell.problem,
            "estimator": cell.estimator,
            "point": cell.point,
            "mean": [numbers.gauss(0, 1) for _ in range(3)],
            "truth_discrete": None,
            "tail_index": float("inf"),
            "status": "ok",
            "reason": "",
            "worker": os.getpid(),
        }


def same_code(problem, estimator):
    return "code"


@pytest.fixture(autouse=True)
def fixed_code(monkeypatch):
    """An edit of the package while the tests run must not disturb them."""
    monkeypatch.setattr(run, "code_fingerprint", same_code)


def statistics(frame):
    return repr(frame.drop(columns=PROVENANCE & set(frame.columns)).to_dict("records"))


# ---------------------------------------------------------------- plan


def test_key_is_fixed_for_ever():
    """Files of today must be found by the code of tomorrow."""
    cell = Cell("two_modes:beta=0.1", "pathwise", "halfway", 64, 256, 32)
    assert cell.key == "98e5ffb53001aeea960cd582ea877464898c8b39"
    assert (
        Cell("a", "b", "zero", 1, 2, 3, seed=1).key
        != Cell("a", "b", "zero", 1, 2, 3).key
    )


def test_groups_share_all_but_the_estimator():
    found = plan.groups(cells() + cells(1, backend="torch") + cells(1, n_steps=64))
    assert [len(g) for g in found] == [3] * 6
    assert found[0][0].backend == "torch"
    assert found[1][0].n_steps == 64
    assert all(len({c.group for c in g}) == 1 for g in found)


@pytest.fixture
def catalogue(monkeypatch):
    """Two families of problems and two estimators, with variants."""
    from sdebench import registry

    both = {"backends": ("numba", "torch")}
    linear, mixture = type("Linear", (), both), type("Mixture", (), both)
    monkeypatch.setattr(plan, "_family", lambda p: type(p).__mro__[1].__name__)

    def build(base, name, **attributes):
        attributes["__module__"] = f"sdebench.problems.{name}"
        return type(name, (base,), attributes)()

    things = {
        "ou_linear": build(linear, "OULinear", default_steps=64, effort=1),
        "ou_quadratic": build(linear, "OUQuadratic", default_steps=3, effort=1),
        "two_modes": build(
            mixture,
            "Two",
            default_steps=32,
            effort=1,
            variants=[{"beta": 0.1}, {"beta": 1.0}],
        ),
        "pathwise": [{}],
        "reinforce": [{}, {"baseline": "mean"}],
    }

    def estimator(spec):
        name, _, options = spec.partition(":")
        return SimpleNamespace(options=options, variants=things[name])

    kinds = {"problem": list(things)[:3], "estimator": list(things)[3:]}
    for kind, names in kinds.items():
        monkeypatch.setattr(registry, f"{kind}_names", lambda names=names: names)
    monkeypatch.setattr(registry, "problem", lambda s: things[s.partition(":")[0]])
    monkeypatch.setattr(registry, "estimator", estimator)
    return things


def test_quick_covers_the_catalogue(catalogue):
    quick = plan.suite("quick", seed=5)
    assert len(set(quick)) == len(quick)
    problems = {"ou_linear", "ou_quadratic", "two_modes:beta=0.1", "two_modes:beta=1.0"}
    estimators = {"pathwise", "reinforce", "reinforce:baseline=mean"}
    plain = {
        (c.problem, c.estimator, c.point)
        for c in quick
        if (c.backend, c.dtype) == ("numba", "float64")
    }
    defaults = estimators - {"reinforce:baseline=mean"}
    # At one point alone: other variants, on the first problem of each family, and
    # further variants of a problem.
    first, further = ("ou_linear", "two_modes:beta=0.1"), {"two_modes:beta=1.0"}
    assert plain == {
        *itertools.product(problems - further, defaults, plan.QUICK_POINTS),
        *itertools.product(further, defaults, plan.QUICK_POINTS[:1]),
        *itertools.product(first, estimators - defaults, plan.QUICK_POINTS[:1]),
    }
    # One ladder, torch and float32 cell per family, on its first problem.
    for special in ("torch", "float32"):
        found = [c for c in quick if special in (c.backend, c.dtype)]
        assert {c.problem for c in found} == {"ou_linear", "two_modes:beta=0.1"}
    assert {c.n_steps for c in quick if c.problem == "ou_linear"} == {16, 32, 64, 128}
    assert {c.n_steps for c in quick if c.problem == "ou_quadratic"} == {3}
    assert {c.seed for c in quick} == {5}


def test_full_has_all_points_and_keeps_steps_positive(catalogue):
    full = plan.suite("full")
    assert {c.point for c in full} == set(plan.FULL_POINTS)
    assert {c.n_steps for c in full if c.problem == "ou_quadratic"} == {1, 2, 3, 6, 12}
    assert {(c.backend, c.dtype) for c in full} == set(
        itertools.product(("numba", "torch"), ("float64", "float32"))
    )


def test_unknown_suite_and_seed():
    with pytest.raises(UnknownNameError, match="did you mean quick"):
        plan.suite("quik")
    with pytest.raises(ParameterError, match="seed"):
        plan.suite("quick", seed=-1)


def test_broken_file_is_named(catalogue, monkeypatch):
    from sdebench import registry

    def broken(spec):
        raise NameError("name 'nump' is not defined")

    monkeypatch.setattr(registry, "problem", broken)
    with pytest.raises(
        SDEBenchError, match=r"problem ou_linear cannot be loaded.*nump"
    ):
        plan.suite("quick")


def test_choose():
    given = cells()
    assert run.choose(given, "problem", None) == given
    assert {c.problem for c in run.choose(given, "problem", "problem-[01]")} == {
        "problem_0",
        "problem_1",
    }
    with pytest.raises(UnknownNameError, match="did you mean problem_"):
        run.choose(given, "problem", ["problem_1", "problem_9"])


# ---------------------------------------------------------------- run


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_statistics_do_not_depend_on_jobs(tmp_path, jobs):
    """Same plan, any number of workers: equal to the last bit, in the plan's order."""
    plain = [row for cell in cells() for row in measure([cell])]
    frame = run.run_cells(cells(), tmp_path, jobs=jobs, task=measure)
    assert frame["problem"].tolist() == [row["problem"] for row in plain]
    assert frame["mean"].tolist() == [row["mean"] for row in plain]
    assert (os.getpid() in set(frame["worker"])) == (jobs == 1)


def test_resume_measures_only_what_is_missing(tmp_path):
    calls = []

    def counting(group):
        calls.extend(group)
        return measure(group)

    given = cells()
    run.run_cells(given[:5], tmp_path, jobs=1, task=counting)
    calls.clear()
    first = run.run_cells(given, tmp_path, jobs=1, task=counting)
    assert set(calls) == set(given[5:])
    calls.clear()
    second = run.run_cells(given, tmp_path, jobs=1, task=counting)
    assert calls == []
    assert repr(first.to_dict("records")) == repr(second.to_dict("records"))
    run.run_cells(given, tmp_path, jobs=1, task=counting, resume=False)
    assert set(calls) == set(given)


def test_damaged_and_outdated_cells_are_measured_again(tmp_path, capsys, monkeypatch):
    given = cells()
    first = run.run_cells(given, tmp_path, jobs=1, task=measure)
    damaged = store.cell_file(tmp_path, given[0].key)
    damaged.write_bytes(damaged.read_bytes()[:100])
    with Progress(stream=sys.stdout) as shown:
        again = run.run_cells(given, tmp_path, jobs=1, task=measure, progress=shown)
    assert statistics(again) == statistics(first)
    said = capsys.readouterr().out
    assert "truncated" in said
    assert "measuring 1 cells, 11 of 12 kept" in said
    monkeypatch.setattr(run, "code_fingerprint", lambda p, e: f"new {e}")
    with Progress(stream=sys.stdout) as shown:
        run.run_cells(given, tmp_path, jobs=1, task=measure, progress=shown)
    assert "measuring again 12 cells made by other code" in capsys.readouterr().out


@pytest.fixture
def fake_package(catalogue, monkeypatch):
    """Make the real task measure with a function that fails for estimator ``b``."""
    from sdebench import measure as room
    from sdebench import registry
    from sdebench.errors import NotApplicableError

    state = {"broken": True}

    def measure_group(problem, estimators, **settings):
        assert set(settings) == set(run.SETTINGS)
        for name in estimators:
            if name == "b" and state["broken"]:
                raise FloatingPointError(f"overflow in {Path.home()}/x.py")
            if name == "c":
                raise NotApplicableError("needs a differentiable reward")
        return [
            SimpleNamespace(row={"status": "ok", "reason": "", "estimator": name})
            for name in estimators
        ]

    monkeypatch.setattr(room, "measure_group", measure_group, raising=False)
    monkeypatch.setattr(registry, "problem", lambda spec: spec)
    monkeypatch.setattr(registry, "estimator", lambda spec: spec)
    return state


def test_failing_cell_is_recorded_and_retried(tmp_path, fake_package):
    frame = run.run_cells(cells(2), tmp_path, jobs=1)
    assert frame["status"].tolist() == ["ok", "failed", "not applicable"] * 2
    assert "FloatingPointError: overflow" in frame["reason"][1]
    assert str(Path.home()) not in frame["reason"][1]
    assert frame["reason"][2] == "needs a differentiable reward"
    # A cell without numbers still says what it was.
    assert frame["n_steps"].tolist()[1:3] == [8, 8]
    assert frame["problem"][1] == "problem_0"
    fake_package["broken"] = False
    frame = run.run_cells(cells(2), tmp_path, jobs=1)
    assert frame["status"].tolist() == ["ok", "ok", "not applicable"] * 2


def test_dead_worker_takes_no_other_cell_with_it(tmp_path):
    """A crash in compiled code or the kernel's out-of-memory killer."""

    def deadly(group):
        if group[0].problem == "problem_1":
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(group)

    frame = run.run_cells(cells(6), tmp_path, jobs=2, task=deadly)
    bad = frame["problem"] == "problem_1"
    assert set(frame["status"][bad]) == {"failed"}
    assert set(frame["status"][~bad]) == {"ok"}
    assert frame["reason"][bad].str.contains("worker process died").all()


@pytest.mark.parametrize("jobs", [1, 2])
def test_full_disk_keeps_what_is_finished(tmp_path, jobs, monkeypatch):
    """The error ends the run; the finished cells are there for the next one."""

    def filling(group):
        if group[0].problem == "problem_2":
            store.os.replace = no_space
        return measure(group)

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", os.replace)  # restored afterwards
    with pytest.raises(ResultsError, match=r"No space left on device.*run again"):
        run.run_cells(cells(8), tmp_path, jobs=jobs, task=filling)
    kept = list(tmp_path.glob("cells/*.parquet"))
    assert len(kept) >= 3  # the other worker may not even have started
    assert all(store.read(file)["status"] == "ok" for file in kept)
    # The next run finishes the rest, and removes what a worker left half written.
    monkeypatch.undo()
    monkeypatch.setattr(run, "code_fingerprint", same_code)
    frame = run.run_cells(cells(8), tmp_path, jobs=1, task=measure)
    assert len(frame) == 24
    assert set(frame["status"]) == {"ok"}
    assert not list(tmp_path.glob("cells/.*"))


SCRIPT = """
    import signal, sys, time
    # A background job of a shell starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, {tests!r})
    from test_run import cells, measure, same_code
    from sdebench import run
    from sdebench.cli import report_interrupt
    from sdebench.progress import Progress

    run.code_fingerprint = same_code

    def slow(group):
        for cell, row in zip(group, measure(group)):
            time.sleep({pause})
            yield row

    try:
        with Progress() as shown:
            run.run_cells(
                cells(20), {folder!r}, jobs={jobs}, task=slow, progress=shown
            )
    except KeyboardInterrupt as interrupt:
        sys.exit(report_interrupt(interrupt))
"""


def start(folder, jobs, pause=0.02):
    tests = str(Path(__file__).parent)
    script = SCRIPT.format(tests=tests, folder=str(folder), jobs=jobs, pause=pause)
    code = textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(folder, count, process):
    while len(list(folder.glob("cells/*.parquet"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_any_moment_and_resumed(tmp_path, jobs):
    """kill -9 again and again: every file left is whole, and the end is the same."""
    moments = random.Random(jobs)
    for kill in range(2):
        process = start(tmp_path, jobs)
        before = len(list(tmp_path.glob("cells/*.parquet")))
        wait_for(tmp_path, before + 3 + moments.randrange(8), process)
        time.sleep(moments.random() * 0.05)
        if kill == 0:
            os.kill(process.pid, signal.SIGKILL)  # the run alone: workers must notice
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)  # ends when the last worker has gone
        for file in tmp_path.glob("cells/*.parquet"):
            store.read(file)
    time.sleep(0.2)
    left = len(list(tmp_path.glob("cells/*.parquet")))
    assert left < 60  # workers without a parent stop
    measured = []

    def counting(group):
        measured.extend(group)
        return measure(group)

    frame = run.run_cells(cells(20), tmp_path, jobs=1, task=counting)
    assert len(measured) == 60 - left
    whole = run.run_cells(cells(20), tmp_path / "whole", jobs=1, task=measure)
    assert statistics(frame) == statistics(whole)
    assert not list(tmp_path.glob("cells/.*"))


@pytest.mark.parametrize(
    ("signum", "code", "jobs"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1)]
)
def test_interrupt_says_how_to_resume(tmp_path, signum, code, jobs):
    process = start(tmp_path, jobs, pause=0.3)  # far from done when the signal comes
    wait_for(tmp_path, 6, process)
    os.killpg(process.pid, signum)  # what a terminal's Ctrl-C does
    _, error = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in error
    assert "interrupted: finished" in error or "terminated: finished" in error
    assert "run the same command again" in error


def test_progress_lines(tmp_path, capsys):
    with Progress(stream=sys.stdout) as shown:
        run.run_cells(cells(1), tmp_path, jobs=1, task=measure, progress=shown)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "measuring 3 cells"
    assert last.startswith("3/3 cells")


def test_progress_bar_on_a_terminal(tmp_path):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(stream=stream) as shown:
        run.run_cells(cells(1), tmp_path, jobs=1, task=measure, progress=shown)
    assert "3/3" in stream.getvalue()
    assert "left" in stream.getvalue()


@pytest.mark.slow
def test_real_statistics_do_not_depend_on_jobs(tmp_path):
    """One worker, two, or half before and half after an interruption."""
    specs = ["pathwise", "reinforce:baseline=optimal", "rlr", "grpo", "truncated"]
    wanted = {"problems": "brownian-linear", "estimators": specs, "progress": False}
    frames = [
        run.run(folder=tmp_path / str(jobs), jobs=jobs, **wanted) for jobs in (1, 2)
    ]
    half = {**wanted, "estimators": specs[:2]}
    run.run(folder=tmp_path / "resumed", jobs=1, **half)
    frames.append(run.run(folder=tmp_path / "resumed", jobs=1, **wanted))
    assert set(frames[0]["status"]) <= {"ok", "not applicable"}
    timing = ["seconds", "ns_per_path_step", "peak_memory_bytes", "created"]
    timing += [c for c in frames[0] if c.startswith("efficiency_seconds")]
    first, *others = (frame.drop(columns=timing) for frame in frames)
    for other in others:
        unequal = [
            c for c in first if repr(first[c].tolist()) != repr(other[c].tolist())
        ]
        assert unequal == []
    command = "sdebench run quick --problem brownian-linear --estimator pathwise "
    assert frames[0].attrs["command"].startswith(command)


# ---------------------------------------------------------------- provenance


def test_provenance_identifies_code_and_machine_but_nobody():
    found = provenance.provenance()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "cores" in found["machine"]
    import getpass
    import socket

    for secret in (socket.gethostname(), str(Path.home()), str(Path.cwd())):
        assert secret not in repr(found)
    assert f" {getpass.getuser()}" not in repr(found)


def test_fingerprint_covers_what_a_pair_depends_on(tmp_path, monkeypatch):
    files = {
        "problems/base.py": "x = 1",
        "problems/derived.py": "from sdebench.problems.base import x",
        "problems/other.py": "y = 1",
        "estimators/pathwise.py": "z = 1",
        "simulate/noise.py": "n = 1",
        "cli.py": "c = 1",
    }

    def fingerprint(**changed):
        for cached in (provenance._shared_code, provenance._room):
            cached.cache_clear()
        provenance.code_fingerprint.cache_clear()
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(changed.get(path.stem, text))
        return provenance.code_fingerprint("derived", "pathwise")

    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    try:
        before = fingerprint()
        assert fingerprint(other="y = 2") == fingerprint(cli="c = 2") == before
        changes = [{"base": "x = 2"}, {"pathwise": "z = 2"}, {"noise": "n = 2"}]
        assert len({before, *(fingerprint(**c) for c in changes)}) == 4
    finally:
        for cached in (provenance._shared_code, provenance._room):
            cached.cache_clear()
        provenance.code_fingerprint.cache_clear()
