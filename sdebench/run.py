"""Run a suite: measure the missing cells, in parallel, and store each at once.

The unit shipped to a worker is a group of cells that share their simulated paths; the
worker itself stores every row, so that a finished group is on disk before anyone is
told.  Whatever kills the run, only the groups in flight are lost; the next run does
what is missing.  Noise is addressed by the cell's seed, never by the worker, so the
statistics do not depend on the number of jobs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from functools import cache
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from sdebench import plan, store
from sdebench.callable_module import make_callable
from sdebench.errors import (
    NotApplicableError,
    ParameterError,
    ResultsError,
    SDEBenchError,
    unknown,
)
from sdebench.plan import Cell
from sdebench.provenance import code_fingerprint, provenance, scrub

if TYPE_CHECKING:
    import pandas as pd

    from sdebench.progress import Progress

Task = Callable[[Sequence[Cell]], Iterable[dict[str, Any]]]
"""Measures the cells of one group and yields their rows in the same order."""


SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(Cell)
    if field.name not in ("problem", "estimator")
)
"""What a cell fixes besides problem and estimator: arguments and columns alike."""

SECONDS_BETWEEN_LOOKS = 0.5


class Terminated(KeyboardInterrupt):
    """The system asked the run to end (SIGTERM)."""


class Outcome(NamedTuple):
    """What became of one cell."""

    cell: Cell
    status: str
    reason: str


Outcomes = Generator[list[Outcome], None, None]


def row_of(cell: Cell, status: str, reason: str) -> dict[str, Any]:
    """Return the row of a cell that has no numbers."""
    from sdebench import registry

    row: dict[str, Any] = {"status": status, "reason": scrub(reason)}
    for kind, values in (("problem", "parameters"), ("estimator", "options")):
        spec = getattr(cell, kind)
        name, given = registry.parse(spec)
        label = spec
        with contextlib.suppress(Exception):  # it may be what failed
            thing = getattr(registry, kind)(spec)
            given, label = getattr(thing, values), thing.label
            if kind == "estimator":
                row["estimand"] = thing.estimand
        row |= {kind: name, f"{kind}_{values}": json.dumps(given)}
        row[f"{kind}_label"] = label
    return row | {name: getattr(cell, name) for name in SETTINGS}


def _reason(error: Exception) -> str:
    text = str(error) or "no message"
    named = isinstance(error, SDEBenchError)  # a sentence that explains itself
    return text if named else f"{type(error).__name__}: {text}"


def measure_cells(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Measure a group; a cell that fails gives a row that says why.

    All estimators of the group share the forward pass.  If one of them fails, each is
    measured on its own, so that it takes no other with it.
    """
    from sdebench import registry
    from sdebench.measure import measure_group

    first = cells[0]
    settings: dict[str, Any] = {name: getattr(first, name) for name in SETTINGS}
    try:
        problem = registry.problem(first.problem)
        chosen = [registry.estimator(cell.estimator) for cell in cells]
        measured = measure_group(problem, chosen, **settings)
        rows = [measurement.row for measurement in measured]
    except Exception as error:
        if len(cells) > 1:
            for cell in cells:
                yield from measure_cells([cell])
        elif isinstance(error, NotApplicableError):
            yield row_of(first, "not applicable", str(error))
        else:
            yield row_of(first, "failed", _reason(error))
    else:
        yield from rows


@cache
def _follow(parent: int) -> None:
    """Make this worker end with its parent, and only then.

    A worker whose parent was killed would wait for tasks for minutes.  And loky
    replaces workers that grew by 300 MB, which compiled kernels and torch explain.
    """
    from joblib.externals.loky import process_executor

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    process_executor._MAX_MEMORY_LEAK_SIZE = sys.maxsize
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _work(cells: list[Cell], folder: Path, task: Task, parent: int) -> list[Outcome]:
    """Measure and store one group (in a worker or, with ``--jobs 1``, here)."""
    if parent != os.getpid():
        _follow(parent)
    outcomes = []
    for cell, row in zip(cells, task(cells), strict=True):
        row = {"schema_version": store.SCHEMA_VERSION, **provenance(), **row}
        code = code_fingerprint(*cell.names)
        store.write(store.cell_file(folder, cell.key), row, code)
        outcomes.append(Outcome(cell, str(row["status"]), str(row.get("reason", ""))))
    return outcomes


def _parallel(
    waiting: list[list[Cell]], folder: Path, task: Task, jobs: int
) -> Outcomes:
    """Yield the outcomes of groups as they finish, whatever happens to the workers.

    A worker that dies (out of memory, a crash in compiled code) takes all workers with
    it.  The groups then in flight are repeated one at a time, so that the culprit is
    known and recorded, and the others go on.
    """
    import joblib
    from joblib.externals.loky.process_executor import BrokenProcessPool

    def tasks(these: Sequence[list[Cell]], sent: list[int]) -> Iterator[Any]:
        for i, cells in enumerate(these):
            sent.append(i)
            yield joblib.delayed(_indexed)(i, cells, folder, task, os.getpid())

    def attempt(these: Sequence[list[Cell]], sent: list[int]) -> Iterator[Any]:
        # One task per message: a batch would hold finished cells back.
        threads = joblib.parallel_config("loky", inner_max_num_threads=1)
        with threads, _interrupts_held_back():
            results = joblib.Parallel(
                n_jobs=max(2, jobs),  # 1 would mean this very process
                return_as="generator_unordered",
                batch_size=1,
                pre_dispatch="n_jobs",
            )(tasks(these, sent))
        try:
            yield from results
        finally:
            with warnings.catch_warnings():  # that an early end loses work is known
                warnings.simplefilter("ignore")
                results.close()

    while waiting:
        sent: list[int] = []
        done: set[int] = set()
        try:
            for i, outcomes in attempt(waiting, sent):
                done.add(i)
                yield outcomes
            return
        except BrokenProcessPool:
            for i in sorted(set(sent) - done):
                try:
                    for _, outcomes in attempt([waiting[i]], []):
                        yield outcomes
                except BrokenProcessPool:
                    yield _work(waiting[i], folder, _dead, os.getpid())
            waiting = [g for i, g in enumerate(waiting) if i not in {*sent, *done}]


def _dead(cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Stand in for the measurement of cells that killed their worker."""
    reason = "the worker process died: out of memory, or a crash in compiled code"
    return (row_of(cell, "failed", reason) for cell in cells)


def _indexed(i: int, *arguments: Any) -> tuple[int, list[Outcome]]:
    return i, _work(*arguments)


def _serial(waiting: list[list[Cell]], folder: Path, task: Task) -> Outcomes:
    for cells in waiting:
        yield _work(cells, folder, task, os.getpid())


def missing(
    cells: Sequence[Cell], folder: Path, say: Callable[[str], None]
) -> list[Cell]:
    """Return the cells that have no valid, up-to-date, successful result yet."""
    why: Counter[str] = Counter()
    left = []
    for cell in cells:
        path = store.cell_file(folder, cell.key)
        if not path.exists():
            left.append(cell)
            continue
        try:
            row, code = store.read_code(path)
        except ResultsError as error:
            say(f"measuring again: {error}")
            left.append(cell)
            continue
        if row.get("status") == "failed":
            why["failed before"] += 1
        elif code != code_fingerprint(*cell.names):
            why["made by other code"] += 1
        else:
            continue
        left.append(cell)
    for reason, count in why.items():
        say(f"measuring again {count} cells {reason}")
    return left


def choose(
    cells: Sequence[Cell],
    kind: str,
    patterns: str | Sequence[str] | None,
) -> list[Cell]:
    """Return the cells whose problem or estimator matches: see `matching`."""
    if patterns is None:
        return list(cells)
    chosen = matching(kind, {getattr(cell, kind) for cell in cells}, patterns)
    return [cell for cell in cells if getattr(cell, kind) in chosen]


def matching(
    kind: str, specs: Collection[str], patterns: str | Sequence[str]
) -> set[str]:
    """Return the specifications that match one of the glob patterns.

    Hyphens may stand for underscores; a pattern is matched against the name and
    against the whole specification.

    Raises
    ------
    UnknownNameError
        For a pattern that matches nothing, with the nearest names.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[str] = set()
    for pattern in patterns:
        glob = pattern.replace("-", "_")
        found = {
            s
            for s in specs
            if fnmatch.fnmatchcase(s.partition(":")[0], glob)
            or fnmatch.fnmatchcase(s, glob)
        }
        if not found:
            raise unknown(kind, pattern, {s.partition(":")[0] for s in specs})
        chosen |= found
    return chosen


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does; only the main thread may say so."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach; one pressed now comes after.

    The parent alone decides what Ctrl-C means, and a process interrupted while it
    starts would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Its start would let signals through again (CPython before 3.12).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_cells(
    cells: Sequence[Cell],
    folder: str | Path,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    task: Task = measure_cells,
) -> pd.DataFrame:
    """Measure the cells that are missing in ``folder`` and return all their rows.

    Parameters
    ----------
    cells : the plan; the rows come back in its order.
    folder : the suite's folder; files go to ``folder/cells``.
    jobs : worker processes; 1 stays in this process, None takes all cores.
    progress : where progress is shown.
    resume : keep the valid cells that are there; else measure all again.
    task : what measures one group of cells.

    Raises
    ------
    ResultsError
        When the disk is full; everything finished before is kept.
    """
    import joblib

    from sdebench.progress import Progress

    folder = Path(folder)
    jobs = jobs or joblib.cpu_count()
    with contextlib.ExitStack() as stack:
        shown = progress or stack.enter_context(Progress(visible=False))
        stack.enter_context(_sigterm_as_interrupt())
        store.sweep(folder)
        if not resume:
            for cell in cells:
                store.cell_file(folder, cell.key).unlink(missing_ok=True)
        left = missing(cells, folder, shown.say)
        waiting = plan.groups(left)
        shown.start(left, len(cells))
        results: Outcomes
        if jobs == 1:
            results = _serial(waiting, folder, task)
        else:
            results = _parallel(waiting, folder, task, jobs)
        with contextlib.closing(results):
            for outcomes in results:
                for outcome in outcomes:
                    shown.done(*outcome)
    return store.to_frame(store.read(store.cell_file(folder, c.key)) for c in cells)


def run(
    suite: str = "quick",
    *,
    jobs: int | None = None,
    folder: str | Path = "results",
    seed: int = 0,
    problems: str | Sequence[str] | None = None,
    estimators: str | Sequence[str] | None = None,
    progress: bool = True,
    resume: bool = True,
) -> pd.DataFrame:
    """Run a suite and return its results, one row per cell.

    What is already in ``folder/suite`` is not measured again, unless it failed, is
    damaged or was made by other code: an interrupted run is simply started again.

    Parameters
    ----------
    suite : ``"quick"`` or ``"full"``.
    jobs : worker processes; 1 stays in this process, None takes all cores.  The
        statistics are the same bit by bit.
    folder : where results go: ``folder/suite/cells/*.parquet``.
    seed : seed of the noise.
    problems, estimators : glob patterns that restrict the suite.
    progress : show progress on the standard error stream.
    resume : False discards the finished cells of the selection first.

    Raises
    ------
    UnknownNameError
        For a suite or pattern that names nothing.
    ResultsError
        When results cannot be written; everything finished before is kept.
    """
    from sdebench.progress import Progress

    if jobs is not None and jobs < 1:
        raise ParameterError(f"jobs = {jobs} must be at least 1")
    cells = plan.suite(suite, seed)
    cells = choose(cells, "problem", problems)
    cells = choose(cells, "estimator", estimators)
    target = Path(folder) / suite
    with Progress(visible=progress, stream=sys.stderr) as shown:
        if problems is None and estimators is None:
            known = {cell.key for cell in cells}
            files = (target / store.CELLS).glob("*.parquet")
            if others := sum(file.stem not in known for file in files):
                shown.say(f"keeping {others} results of other settings in {target}")
        frame = run_cells(cells, target, jobs=jobs, progress=shown, resume=resume)
    frame.attrs["command"] = store.command(
        suite, seed, problem=problems, estimator=estimators
    )
    return frame


make_callable(__name__, run)
