"""Bias, variance and cost of gradient estimators, measured against exact answers.

>>> import sdebench
>>> problem = sdebench.problem("two_modes", beta=0.5)
>>> problem.truth.gradient("halfway")
>>> sdebench.measure(problem, "pathwise", point="halfway").verdict

Heavy libraries are imported when they are needed: importing sdebench is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    NumericalError,
    ParameterError,
    ResultsError,
    SDEBenchError,
    UnknownNameError,
    ValidationError,
)

if TYPE_CHECKING:
    from sdebench.composite import CompositeEstimator, Runner
    from sdebench.estimator import Estimator
    from sdebench.measure import Measurement, measure, measure_group
    from sdebench.problem import Problem, Truth
    from sdebench.registry import (
        estimator,
        estimator_names,
        problem,
        problem_names,
    )
    from sdebench.run import run
    from sdebench.simulate.paths import simulate
    from sdebench.store import load
    from sdebench.validate import (
        check_estimator,
        check_problem,
        parametrize_with_checks,
    )
    from sdebench.view import View

__version__ = "0.1.0"

__all__ = [
    "CompositeEstimator",
    "Estimator",
    "Measurement",
    "NotApplicableError",
    "NotExactError",
    "NumericalError",
    "ParameterError",
    "Problem",
    "ResultsError",
    "Runner",
    "SDEBenchError",
    "Truth",
    "UnknownNameError",
    "ValidationError",
    "View",
    "check_estimator",
    "check_problem",
    "estimator",
    "estimator_names",
    "load",
    "measure",
    "measure_group",
    "parametrize_with_checks",
    "problem",
    "problem_names",
    "run",
    "simulate",
]

# Where each public name lives; resolved on first use.
_LAZY = {
    "CompositeEstimator": "composite",
    "Runner": "composite",
    "Estimator": "estimator",
    "Measurement": "measure",
    "Problem": "problem",
    "Truth": "problem",
    "View": "view",
    "check_estimator": "validate",
    "check_problem": "validate",
    "parametrize_with_checks": "validate",
    "estimator_names": "registry",
    "load": "store",
    "measure_group": "measure",
    "problem_names": "registry",
}
_CALLABLE = ("problem", "estimator", "measure", "run", "simulate")


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
