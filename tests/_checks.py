"""The checks of the mathematics, at the false-alarm rate of the tests.

False alarms of the statistical checks: every call spends ``ALARM`` and divides it by
its number of comparisons, so that fewer than 400 calls raise a false alarm with
probability below 1e-4 altogether.  Seeds are fixed.
"""

from __future__ import annotations

import copy
from functools import partial

import sdebench
from sdebench.validate import problem_checks, problem_simulation
from sdebench.validate.problem_checks import (
    check_discrete_order,
    check_gradient,
    check_hjb,
    check_stationary,
    check_terminal_condition,
    fineness,
    reduced,
    thetas,
    visited,
)
from sdebench.validate.problem_second_route import (
    check_linear_by_ode,
    check_matching_by_ode,
    check_tilting_quadrature,
    grid_dim,
)
from sdebench.validate.problem_simulation import check_log_weights, has_chain
from sdebench.validate.problem_tables import (
    check_exponential_scheme,
    check_parameter_tables,
    check_tables,
    table_step,
)

__all__ = [
    "all_problems",
    "check_discrete_order",
    "check_exponential_scheme",
    "check_feynman_kac",
    "check_gradient",
    "check_hjb",
    "check_linear_by_ode",
    "check_log_weights",
    "check_matching_by_ode",
    "check_optimal_law",
    "check_parameter_tables",
    "check_regret",
    "check_regret_by_simulation",
    "check_stationary",
    "check_tables",
    "check_terminal_condition",
    "check_tilting_quadrature",
    "fineness",
    "grid_dim",
    "has_chain",
    "mutate",
    "reduced",
    "require_zero",
    "table_step",
    "thetas",
    "visited",
]

ALARM = 1e-4 / 400

require_zero = partial(problem_checks.require_zero, alarm=ALARM)
check_feynman_kac = partial(problem_simulation.check_feynman_kac, alarm=ALARM)
check_optimal_law = partial(problem_simulation.check_optimal_law, alarm=ALARM)
check_regret = partial(problem_simulation.check_regret, alarm=ALARM)
check_regret_by_simulation = partial(
    problem_simulation.check_regret_by_simulation, alarm=ALARM
)


def all_problems():
    """Return every problem of the catalogue with every one of its variants."""
    return [
        sdebench.problem(name, **variant)
        for name in sdebench.problem_names()
        for variant in type(sdebench.problem(name)).variants
    ]


def with_slow(problems, slow):
    """Return the parameters of a test; it is a slow one where ``slow(problem)``."""
    import pytest

    return pytest.mark.parametrize(
        "problem",
        [
            pytest.param(p, id=p.label, marks=pytest.mark.slow if slow(p) else ())
            for p in problems
        ],
    )


def mutate(thing, **overrides):
    """Return a copy of a problem, truth or process with some members replaced."""
    cls = type(thing)
    namespace = {k: v for k, v in overrides.items() if callable(v)}
    mutant = copy.copy(thing)
    mutant.__dict__.update({k: v for k, v in overrides.items() if not callable(v)})
    object.__setattr__(
        mutant,
        "__class__",
        type(cls.__name__, (cls,), {"__module__": cls.__module__, **namespace}),
    )
    return mutant
