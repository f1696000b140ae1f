"""Validate a problem: its exact answers against each other, and against simulation.

The stochastic checks together raise a false alarm with probability at most
``false_alarm``: each gets an equal share and divides it by the number of its
comparisons (Bonferroni; no assumption on their dependence).  The others are
deterministic given the problem: they compare a largest relative error with a
tolerance.  The order at which log-weights shrink is fitted to simulated paths, but its
tolerance is many times its noise; it is held to be deterministic.
"""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from rich.console import Console

from sdebench import registry
from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    ParameterError,
    SDEBenchError,
    ValidationError,
    unknown,
)
from sdebench.files import file_spec
from sdebench.linear_problem import LinearProblem
from sdebench.problem import Problem
from sdebench.simulate.noise import split_seed
from sdebench.validate import problem_checks as exact
from sdebench.validate import problem_interface as interface
from sdebench.validate import problem_second_route as second
from sdebench.validate import problem_simulation as simulation
from sdebench.validate import problem_tables as tables
from sdebench.validate.problem_report import ProblemCheck, ProblemReport
from sdebench.validate.report import FAILED, NOTE, PASSED, SKIPPED, describe

SMALLEST_SHARE = 0.3
"""Effective share of the paths from which the mean of their weights is normal enough.

Lognormal weights with this share have skewness 8, which leaves the mean of 2^14 paths
tail probabilities at z = 4 that are right within a factor of two (Edgeworth).
"""
NOT_WRITTEN = (
    "a method of Truth is not written: write it, or raise NotExactError with the reason"
)
Outcome = exact.Comparison
Run = Callable[..., Outcome]


def check_problem(
    problem: Problem | type[Problem] | str,
    *,
    seed: int = 0,
    false_alarm: float = 1e-3,
    only: Sequence[str] | None = None,
    on_fail: str = "raise",
    progress: bool = False,
) -> ProblemReport:
    """Validate a problem against its equations, simulation and built-in estimators.

    Parameters
    ----------
    problem : object, class, or specification such as ``"path/file.py:dim=3"``.
    seed : of all simulations.
    false_alarm : probability that a correct problem fails a stochastic check.
    only : names of the checks to run, e.g. while one is being mended; default: all.
    on_fail : "raise", or "report": return the report whatever it says.
    progress : show on a terminal's standard error which check is running.

    Returns
    -------
    ProblemReport

    Raises
    ------
    ValidationError
        If a check failed and ``on_fail`` is "raise"; its ``report`` has all checks.
    SDEBenchError
        For a specification that names no problem, or a file that does not import.
    """
    if on_fail not in ("raise", "report"):
        raise unknown("on_fail", on_fail, ("raise", "report"))
    if not 0.0 < false_alarm < 1.0:
        raise ParameterError(
            f"false_alarm {false_alarm!r} is not a probability; give one between 0 and "
            "1, e.g. 0.001"
        )
    split_seed(seed)  # refuses one that is out of range
    begin = time.monotonic()
    label, checks = _all_checks(problem, seed, false_alarm, only, progress)
    report = ProblemReport(
        problem=label,
        checks=tuple(checks),
        seed=seed,
        false_alarm=false_alarm,
        seconds=time.monotonic() - begin,
    )
    return report.raise_if_failed() if on_fail == "raise" else report


def _all_checks(
    given: Problem | type[Problem] | str,
    seed: int,
    false_alarm: float,
    only: Sequence[str] | None,
    progress: bool,
) -> tuple[str, list[ProblemCheck]]:
    """Return the problem's label and the outcomes of all checks."""
    built: list[Problem] = []

    def build(_: Any) -> Outcome:
        built.append(_instance(given))
        return Outcome(0.0, 0.0, "it can be built")

    failures: dict[str, str] = {}
    first = _outcome("construction", build, given, failures)
    if not built:
        name = given if isinstance(given, str) else getattr(given, "__name__", "")
        return str(name), [first]
    problem = built[0]
    plan = _plan(seed, false_alarm)
    for name in only or ():
        if name not in plan:
            raise unknown("check", name, plan)
    plan = {k: run for k, run in plan.items() if only is None or k in only}
    found = [first, _metadata(problem)]
    with Console(stderr=True, quiet=not progress).status("") as status:
        for done, (name, run) in enumerate(plan.items(), 1):
            status.update(f"{done}/{len(plan)} {name}")
            with np.errstate(all="ignore"):
                found.append(_outcome(name, run, problem, failures))
    return problem.label, found


def _instance(given: Problem | type[Problem] | str) -> Problem:
    if isinstance(given, str):
        return registry.problem(given)
    found = given() if isinstance(given, type) else given
    if not isinstance(found, Problem):
        raise ParameterError(
            f"{found!r} is not a problem; give a subclass of sdebench.Problem, an "
            "instance, or a specification"
        )
    return found


def _metadata(problem: Problem) -> ProblemCheck:
    missing = interface.missing_metadata(problem)
    return ProblemCheck(
        name="metadata",
        status=NOTE if missing else PASSED,
        message=f"{', '.join(missing)}: empty; write it, readers of tables will ask"
        if missing
        else f"named {problem.name}",
    )


def _outcome(
    name: str, run: Run, subject: Any, failures: dict[str, str]
) -> ProblemCheck:
    """Run one check and return what came of it; it never raises.

    ``failures`` maps the exceptions seen so far to the check that met them first: the
    same exception is reported once.
    """

    def outcome(status: str, message: str, details: str = "") -> ProblemCheck:
        return ProblemCheck(
            name=name, status=status, message=message, traceback=details
        )

    try:
        comparison = run(subject)
    except (NotApplicableError, NotExactError) as reason:
        return outcome(SKIPPED, str(reason))
    except exact.CheckFailedError as error:
        return _compared(name, FAILED, error.comparison)
    except ValidationError as error:
        return outcome(FAILED, str(error))
    except NotImplementedError as error:
        return outcome(FAILED, NOT_WRITTEN, _traceback(error))
    except Exception as error:
        if isinstance(subject, str) and isinstance(error, SDEBenchError):
            raise
        message = describe(error, _file(subject))
        if message in failures:
            return outcome(SKIPPED, f"stopped by the error of {failures[message]}")
        failures[message] = name
        return outcome(FAILED, message, _traceback(error))
    return _compared(name, PASSED, comparison)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _compared(name: str, status: str, comparison: Outcome) -> ProblemCheck:
    finite = np.isfinite(comparison.value)
    return ProblemCheck(
        name=name,
        status=status,
        message=comparison.what if status == PASSED else str(comparison),
        value=comparison.value if finite else None,
        limit=comparison.limit,
    )


def _file(subject: Any) -> str | None:
    """Return the file of a problem, its class or its specification."""
    if isinstance(subject, str):
        found = file_spec(subject)
        return str(found.path.resolve()) if found else None
    try:
        return inspect.getfile(subject if isinstance(subject, type) else type(subject))
    except (OSError, TypeError):
        return None


# ---- the plan ----------------------------------------------------------------------


def _plan(seed: int, false_alarm: float) -> dict[str, Run]:
    """Return all checks by name."""
    base = 1000 * seed % 2**63
    return {
        "settings": interface.check_settings,
        **{
            name: partial(interface.check_function, name=name)
            for name in interface.FUNCTIONS
        },
        "diffusion": interface.check_diffusion,
        "exact answers": interface.check_answers,
        "HJB equation": _by_differences(exact.check_hjb, 0.01),
        "terminal condition": exact.check_terminal_condition,
        "second route": _second_route,
        "gradient": _by_differences(_gradients, 0.01),
        "stationary point": lambda p: exact.check_stationary(exact.reduced(p)),
        "matching gradient": _matching,
        "discrete gradients": _by_differences(_discrete_gradients, 0.01),
        "order in the time step": _discrete_orders,
        "coefficient tables": _tables,
        "parameter derivatives": _by_differences(_parameter_derivatives, 0.02),
        "exponential scheme": tables.check_exponential_scheme,
        "numba and torch": simulation.check_backends,
        "order of the log-weights": partial(
            simulation.check_log_weights, seed=base + 300, faster=np.inf
        ),
        **_stochastic(base, false_alarm),
    }


def _stochastic(base: int, false_alarm: float) -> dict[str, Run]:
    """Return the stochastic checks, which share the false-alarm rate equally."""
    feynman_kac = partial(
        simulation.check_feynman_kac,
        n_paths=2**14,
        seed=base + 100,
        smallest=SMALLEST_SHARE,
    )

    def start_steps(problem: Problem) -> int:
        # extrapolation to continuous time needs as many as the problem asks for
        chain = simulation.has_chain(problem)
        return 64 if chain else 64 * exact.fineness(problem)

    def under_base(problem: Problem, alarm: float) -> Outcome:
        return feynman_kac(
            problem, importance=False, n_steps=start_steps(problem), alarm=alarm
        )

    def under_optimum(problem: Problem, alarm: float) -> Outcome:
        # The weights spread with the time step, and more in many dimensions.
        check, first = partial(feynman_kac, alarm=alarm), start_steps(problem)
        steps = first, 4 * first
        return _refined(check, NotApplicableError, "n_steps", steps)(problem)

    def law(problem: Problem, alarm: float) -> Outcome:
        n_steps = 192 * exact.fineness(problem)
        return simulation.check_optimal_law(
            problem, n_steps=n_steps, seed=base + 200, alarm=alarm
        )

    def estimators(problem: Problem, alarm: float) -> Outcome:
        n_steps = 64 * exact.fineness(problem)
        return simulation.check_estimators(
            problem, n_steps=n_steps, seed=base + 500, alarm=alarm
        )

    checks: dict[str, Run] = {
        "log Z under the base": under_base,
        "log Z under u*": under_optimum,
        "law under u*": law,
        "regret": partial(_regret, seed=base + 400),
        "estimators": estimators,
    }
    share = false_alarm / len(checks)
    return {name: partial(check, alarm=share) for name, check in checks.items()}


def _refined(
    check: Run, error: type[Exception], name: str, values: Sequence[float]
) -> Run:
    """Return a check that tries the values of a setting until one raises no error.

    A difference quotient needs a step that suits the problem's scales, importance
    weights as many time steps as its rates ask for; no setting makes a wrong answer
    right.
    """

    def run(problem: Problem) -> Outcome:
        for value in values[:-1]:
            try:
                return check(problem, **{name: value})
            except error:
                continue
        return check(problem, **{name: values[-1]})

    return run


def _by_differences(check: Run, step: float) -> Run:
    """Return a check that tries the step, a tenth and a hundredth of it."""
    steps = (step, 0.1 * step, 0.01 * step)
    return _refined(check, exact.CheckFailedError, "step", steps)


def _regret(problem: Problem, seed: int, alarm: float) -> Outcome:
    problem = exact.reduced(problem)
    if isinstance(problem, LinearProblem):
        return simulation.check_regret(problem, "halfway", alarm=alarm)
    if second.grid_dim(problem) == 1:
        return _regret_on_a_line(problem, alarm)
    found = [
        simulation.check_regret_by_simulation(
            problem,
            "halfway",
            n_paths=2**12,
            n_steps=64 * exact.fineness(problem),
            seed=seed,
            alarm=alarm,
        )
    ]
    if second.grid_dim(problem):
        # Coarse in time and space; the paths are the finer test.
        coarse: dict[str, Any] = {"nodes": 10, "panels": 1, "refine": 3.0}
        regret = simulation.check_regret(
            problem, "halfway", tolerance=1e-4, alarm=alarm, **coarse
        )
        found.append(regret)
    return exact.closest(found)


def _regret_on_a_line(problem: Any, alarm: float) -> Outcome:
    """The regret by quadrature, with its own error if that is not small."""
    regret = partial(simulation.check_regret, problem, "halfway", alarm=alarm)
    try:
        return regret()
    except exact.CheckFailedError:
        coarse, fine = (
            second.control_gap(problem, problem.theta("halfway"), panels=panels)
            for panels in (2, 8)
        )
        return regret(tolerance=max(abs(fine - coarse), 1e-10), panels=8)


def _second_route(problem: Problem) -> Outcome:
    if isinstance(problem, LinearProblem):
        return second.check_linear_by_ode(problem)
    if second.grid_dim(problem):
        return second.check_tilting_quadrature(problem)  # type: ignore[arg-type]
    raise NotApplicableError(
        "quadrature needs a tilting problem with d <= 2, an ODE a linear one"
    )


def _gradients(problem: Problem, step: float) -> Outcome:
    problem = exact.reduced(problem)
    points = exact.thetas(problem)
    return exact.closest(
        exact.check_gradient(problem, points[name], step=step)
        for name in ("halfway", "random")
    )


def _matching(problem: Problem) -> Outcome:
    problem = exact.reduced(problem)
    if not isinstance(problem, LinearProblem):
        raise NotApplicableError("an ODE gives it for linear problems only")
    points = exact.thetas(problem)
    return exact.closest(
        second.check_matching_by_ode(problem, points[name])
        for name in ("zero", "random")
    )


def _with_chain(problem: Problem) -> Problem:
    if not simulation.has_chain(problem):
        raise NotApplicableError("the N-step chain has no exact answers")
    return exact.reduced(problem)


def _discrete_gradients(problem: Problem, step: float) -> Outcome:
    problem = _with_chain(problem)
    points = exact.thetas(problem)
    return exact.closest(
        exact.check_gradient(problem, points[name], n_steps=12, step=step)
        for name in ("zero", "random")
    )


def _discrete_orders(problem: Problem) -> Outcome:
    problem = _with_chain(problem)
    points = exact.thetas(problem)
    found = []
    quantities = ("gradient", "matching_gradient", "cross_entropy_gradient")
    for name, quantity in product(("zero", "random"), quantities):
        theta = points[name]
        if problem.truth.answer(quantity, theta, 12) is None:
            continue
        try:
            found.append(exact.check_discrete_order(problem, theta, quantity))
        except exact.CheckFailedError:
            # Stiff, or with a small term of order one: look closer.
            found.append(exact.check_discrete_limit(problem, theta, quantity))
    return exact.closest(found)


def _tables(problem: Problem) -> Outcome:
    return exact.closest(
        tables.check_tables(problem, theta) for theta in (None, "halfway")
    )


def _parameter_derivatives(problem: Problem, step: float) -> Outcome:
    problem = exact.reduced(problem)
    return tables.check_parameter_tables(problem, "halfway", n_steps=4, step=step)
