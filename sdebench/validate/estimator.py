"""`check_estimator`: is an estimator what it says it is?  On every problem."""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import joblib

from sdebench import registry
from sdebench.errors import ParameterError, SDEBenchError, unknown
from sdebench.estimator import Estimator
from sdebench.files import file_spec
from sdebench.problem import Problem
from sdebench.progress import Progress
from sdebench.provenance import provenance, scrub
from sdebench.validate.cells import plan
from sdebench.validate.isolate import (
    NOT_APPLICABLE,
    OK,
    Candidate,
    Result,
    run_tasks,
)
from sdebench.validate.report import FAILED, NOTE, PASSED, SKIPPED, Check, Report
from sdebench.validate.tasks import (
    CompileTask,
    ContractTask,
    KernelTask,
    StatisticsTask,
    Tasks,
)
from sdebench.validate.verdicts import (
    order_check,
    tail_check,
    unbiased_check,
    weak_orders,
    where,
)

if TYPE_CHECKING:
    import pandas as pd

FALSE_ALARM = 1e-3
TIME_LIMIT = 60.0
COMPILE_FACTOR = 10.0
"""Kernels are compiled in a task of their own, which may take this much longer."""

CONTRACT = {
    "interface": "statistics has the right type and shape",
    "finite": "no NaN, no infinity",
    "dtype": "float32 and float64 are kept",
    "device": "statistics stay on the view's device",
    "accelerator": "the same on CUDA",
    "inputs_unchanged": "the view's paths, times and theta are left alone",
    "deterministic": "the same paths give the same bits, whatever the global seed",
    "paths_independent": "a path's row does not depend on the other paths of its block",
    "declared_needs": "every derivative it takes is declared",
    "combine": "combine returns the estimate's shape",
    "kernel_agrees": "the numba kernel agrees with the torch function path by path",
}
"""What a passed check of the interface means."""
OUTCOMES = ("completes", "unbiased", "tails", "weak_order")
CHECK_NAMES = (*CONTRACT, *OUTCOMES)


@dataclass(frozen=True, kw_only=True, repr=False)
class EstimatorReport(Report):
    """Everything that a validation found; printing it gives the readable report.

    Attributes
    ----------
    estimator, estimand, needs, unbiased, declared_bias : as the estimator declares.
    checks : outcomes by name, in order.
    rows : one dictionary per statistical cell.
    orders : weak order by problem, where the data determine it.
    false_alarm : probability that a correct estimator is called biased.
    backend : of the statistical cells: "numba" if there is a kernel and it agrees.
    """

    estimator: str
    class_name: str
    summary: str
    estimand: str
    needs: tuple[str, ...]
    unbiased: str
    declared_bias: str
    backend: str
    false_alarm: float
    seed: int
    seconds: float
    checks: tuple[Check, ...]
    rows: tuple[dict[str, Any], ...]
    orders: tuple[dict[str, Any], ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """The estimator's label."""
        return self.estimator

    @property
    def frame(self) -> pd.DataFrame:
        """The statistical cells, one row each."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def parts(self) -> list[Any]:
        """Return the report as rich renderables, for a terminal."""
        from sdebench.validate.text import estimator_parts

        return estimator_parts(self)


def candidate_of(estimator: Estimator | type[Estimator] | str) -> Candidate:
    """Return what a process needs to build the estimator, after building it here.

    Raises
    ------
    SDEBenchError
        If it cannot be built without arguments, or is no estimator.
    """
    if isinstance(estimator, str):
        spec = file_spec(estimator)
        file = str(spec.path.resolve()) if spec else None
        _build(lambda: registry.estimator(estimator), estimator)
        return Candidate(estimator, None, file)
    import cloudpickle

    if isinstance(estimator, type):
        if not issubclass(estimator, Estimator):
            raise SDEBenchError(
                f"{estimator.__name__} is not an estimator: it must be a subclass of "
                "sdebench.Estimator"
            )
        if inspect.isabstract(estimator):
            missing = ", ".join(sorted(estimator.__abstractmethods__))
            raise SDEBenchError(f"{estimator.__name__} lacks {missing}; write it")
        built = _build(estimator, estimator.__name__)
    else:
        built = estimator
    if not isinstance(built, Estimator):
        raise SDEBenchError(
            f"{built!r} is not an estimator; give a subclass of sdebench.Estimator, an "
            "instance, or a file"
        )
    try:
        file = inspect.getsourcefile(type(built))
    except (TypeError, OSError):  # a class of an interactive session
        file = None
    module = sys.modules.get(type(built).__module__)
    by_value = module is not None and type(built).__module__.startswith("sdebench_file")
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return Candidate(None, cloudpickle.dumps(built), file)
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)


def _build(make: Any, name: str) -> Any:
    """Call ``make``, with a sentence for what may go wrong."""
    try:
        return make()
    except SDEBenchError:
        raise
    except Exception as error:
        raise SDEBenchError(
            f"{name} cannot be built without arguments: {type(error).__name__}: "
            f"{error}; give every option a default, or hand in an instance"
        ) from error


def _problems(patterns: str | Iterable[str] | None) -> dict[str, Problem]:
    """Return the problems of the catalogue that match, or those specified."""
    names = registry.problem_names()
    if patterns is None:
        return {name: registry.problem(name) for name in names}
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ParameterError("problems is empty; give names, or None for all of them")
    found: dict[str, Problem] = {}
    for pattern in patterns:
        matching = [n for n in names if fnmatchcase(n, pattern.replace("-", "_"))]
        for spec in matching or [pattern]:
            problem = registry.problem(spec)
            # The specification, as a worker has to find the problem again.
            found[spec if file_spec(spec) else problem.label] = problem
    return found


def check_estimator(
    estimator: Estimator | type[Estimator] | str,
    *,
    problems: str | Iterable[str] | None = None,
    seed: int = 0,
    false_alarm: float = FALSE_ALARM,
    paths: float = 1.0,
    jobs: int | None = None,
    time_limit: float | None = TIME_LIMIT,
    on_fail: str = "raise",
    progress: bool = False,
) -> EstimatorReport:
    """Validate an estimator on every problem, against the exact answers.

    Interface, inputs, noise, declared needs and both backends are checked on every
    problem; bias, variance, tail and cost are measured at every evaluation point, on a
    ladder of step counts, in float64 and float32.

    Parameters
    ----------
    estimator : a class with a default for every option, an instance, or a
        specification such as ``"my_file.py:MyClass"`` or ``"reinforce:baseline=mean"``.
    problems : glob patterns or specifications; default: the whole catalogue.
    seed : of the noise; every cell draws its own from it.
    false_alarm : probability that an unbiased estimator is called biased.
    paths : multiple of the default number of paths: more find smaller biases.
    jobs : worker processes; default: all cores.
    time_limit : seconds for one cell; None runs everything in this process, with no
        limit.
    on_fail : "raise" or "report".
    progress : show progress on the standard error stream.

    Returns
    -------
    EstimatorReport
        Prints as text; ``passed``, ``checks``, ``frame`` and ``to_dict()`` for use.

    Raises
    ------
    ValidationError
        If a check failed and ``on_fail`` is "raise"; an `AssertionError` too.
    SDEBenchError
        If there is nothing to check.
    """
    if on_fail not in ("raise", "report"):
        raise unknown("value of on_fail", on_fail, ("raise", "report"))
    if not 0.0 < false_alarm < 1.0:
        raise ParameterError(f"false_alarm = {false_alarm} must lie between 0 and 1")
    if not 0.0 < paths < math.inf:
        raise ParameterError(f"paths = {paths} must be a positive multiple")
    begin = time.monotonic()
    candidate = candidate_of(estimator)
    built = candidate.build()
    chosen = _problems(problems)
    run = _Run(
        candidate,
        jobs or joblib.cpu_count(),
        time_limit,
        Progress(visible=progress),
    )
    with run.progress:
        rows, backend = run.everything(built, chosen, seed, false_alarm, paths)
    orders = weak_orders(rows)
    unbiased = unbiased_check(built, rows, false_alarm)
    checks = [
        *run.contract(built),
        run.completes(),
        unbiased,
        tail_check(rows),
        order_check(orders, rows, unbiased),
    ]
    report = EstimatorReport(
        estimator=built.label,
        class_name=type(built).__name__,
        summary=built.summary,
        estimand=built.estimand,
        needs=tuple(sorted(built.needs)),
        unbiased=built.unbiased,
        declared_bias=built.declared_bias,
        backend=backend,
        false_alarm=false_alarm,
        seed=seed,
        seconds=time.monotonic() - begin,
        checks=tuple(checks),
        rows=tuple(rows),
        orders=tuple(orders),
        provenance=provenance(),
    )
    return report if on_fail == "report" else report.raise_if_failed()


class _Run:
    """The tasks of one validation and what became of them."""

    def __init__(
        self,
        candidate: Candidate,
        jobs: int,
        time_limit: float | None,
        progress: Progress,
    ) -> None:
        self.candidate, self.jobs, self.time_limit = candidate, jobs, time_limit
        self.progress = progress
        self.done: list[tuple[Any, Result]] = []

    def _run(self, tasks: Tasks, factor: float = 1.0) -> list[Result]:
        """Run tasks and return their results in order."""
        limit = None if self.time_limit is None else factor * self.time_limit
        results: dict[int, Result] = {}
        for i, result in run_tasks(
            tasks, self.candidate, jobs=self.jobs, time_limit=limit
        ):
            results[i] = result
            status = "failed" if result.status not in (OK, NOT_APPLICABLE) else "ok"
            if tasks[i].counted:
                self.progress.done(tasks[i], status, result.reason)
        found = [results[i] for i in range(len(tasks))]
        self.done += zip(tasks, found, strict=True)
        return found

    def everything(
        self,
        built: Estimator,
        problems: Mapping[str, Problem],
        seed: int,
        false_alarm: float,
        paths: float,
    ) -> tuple[list[dict[str, Any]], str]:
        """Run all tasks; return the statistical rows and the backend behind them."""
        first: list[Any] = [ContractTask(spec) for spec in problems]
        both = "numba" in built.backends
        kernels = [KernelTask(spec) for spec in problems if both]

        def statistics(problems: Mapping[str, Problem], backend: str) -> list[Any]:
            cells = plan(
                problems,
                backend=backend,
                seed=seed,
                false_alarm=false_alarm,
                paths_factor=paths,
            )
            return [StatisticsTask(cell) for cell in cells]

        hoped = statistics(problems, "numba" if kernels else "torch")
        planned = [*first, *kernels, *hoped]
        self.progress.start(planned, len(planned))
        results = self._run(first)
        # A problem on which the interface fails would only fail again in every cell.
        good = {
            spec: problem
            for (spec, problem), result in zip(problems.items(), results, strict=True)
            if result.status == OK
            and not any(
                check.status == FAILED and check.name in ("interface", "finite")
                for _, check in result.value
            )
        }
        backend = "torch"
        if kernels and good:
            found = self._run(kernels, COMPILE_FACTOR)
            if all(
                result.status in (OK, NOT_APPLICABLE)
                and all(check.status == PASSED for _, check in result.value or ())
                for result in found
            ):
                backend = "numba"
                kinds = {
                    type(problem.tables(None, problem.time_grid(1))): spec
                    for spec, problem in good.items()
                }
                compiling = [
                    CompileTask(spec, dtype)
                    for spec in kinds.values()
                    for dtype in ("float64", "float32")
                ]
                self._run(compiling, COMPILE_FACTOR)
        tasks = statistics(good, backend)
        order = {str(task): i for i, task in enumerate(tasks)}
        # The longest first, so that no core waits for the last one.
        tasks.sort(key=lambda task: -task.work)
        rows = [r.value for r in self._run(tasks) if r.status == OK]
        rows.sort(key=lambda row: order[where(row)])
        return rows, backend

    # ---- checks -------------------------------------------------------------------
    def contract(self, built: Estimator) -> list[Check]:
        """Return one check per part of the interface, over all problems."""
        found: dict[str, list[tuple[str, Check]]] = {name: [] for name in CONTRACT}
        used: set[str] = set()
        for task, result in self.done:
            if result.status != OK or not isinstance(task, ContractTask | KernelTask):
                continue
            for dtype, check in result.value:
                found[check.name].append((f"{task.problem}, {dtype}", check))
                used |= set(check.details.get("used", ()))
        checks = []
        for name, outcomes in found.items():
            failed = [(p, c) for p, c in outcomes if c.status == FAILED]
            if failed:
                place, check = failed[0]
                message = f"on {place}: {check.message}"
                if len(failed) > 1:
                    message += f" (and {len(failed) - 1} more like it)"
                checks.append(Check(name=name, status=FAILED, message=message))
            elif not outcomes:
                why = "no kernel" if name == "kernel_agrees" else "never got that far"
                checks.append(Check(name=name, status=SKIPPED, message=why))
            elif all(c.status == SKIPPED for _, c in outcomes):
                checks.append(outcomes[0][1])
            else:
                checks.append(Check(name=name, status=PASSED, message=CONTRACT[name]))
        unused = sorted(set(built.needs) - used)
        if unused and used:
            index = next(i for i, c in enumerate(checks) if c.name == "declared_needs")
            if checks[index].status == PASSED:
                names = ", ".join(unused)
                message = f"declares {names} and used it on none of these problems"
                checks[index] = Check(
                    name="declared_needs", status=NOTE, message=message
                )
        return checks

    def completes(self) -> Check:
        """Return whether every task came to its end."""
        bad = [(t, r) for t, r in self.done if r.status not in (OK, NOT_APPLICABLE)]
        refused = [(t, r) for t, r in self.done if r.status == NOT_APPLICABLE]
        total = sum(task.counted for task, _ in self.done)
        details = {
            "failed": [
                {"cell": str(t), "status": r.status, "reason": scrub(r.reason)}
                for t, r in bad
            ],
            "not_applicable": sorted({f"{t.problem}: {r.reason}" for t, r in refused}),
        }
        if bad:
            task, result = bad[0]
            more = f"; {len(bad) - 1} more" if len(bad) > 1 else ""
            return Check(
                name="completes",
                status=FAILED,
                message=f"{len(bad)} of {total} tasks did not finish: {task}: "
                f"{scrub(result.reason)}{more}",
                details=details,
                traceback=result.traceback,
            )
        if refused and len(refused) == total:
            return Check(
                name="completes",
                status=FAILED,
                message=f"not applicable to any problem: {refused[0][1].reason}",
                details=details,
            )
        message = f"all {total} tasks finished"
        if refused:
            message += f"; {len(refused)} not applicable: {refused[0][1].reason}"
        return Check(name="completes", status=PASSED, message=message, details=details)
