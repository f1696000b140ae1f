"""The units of a validation, as picklable functions of the estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sdebench import registry
from sdebench.errors import NotApplicableError
from sdebench.estimator import Estimator
from sdebench.measure.cell import DTYPES, make_request, refusal
from sdebench.problem import Problem
from sdebench.validate.cells import (
    GROUP,
    CellTest,
    ValidationCell,
    built_ins,
)
from sdebench.validate.contract import N_STEPS as CONTRACT_STEPS
from sdebench.validate.contract import contract_checks, device_check, kernel_check
from sdebench.validate.report import Check
from sdebench.validate.sample import collect


@cache
def problem_of(spec: str) -> Problem:
    """Return a problem; its exact answers are computed once per process."""
    return registry.problem(spec)


def _refuse(
    estimator: Estimator, problem: Problem, n_steps: int, backend: str = "torch"
) -> None:
    request = make_request(problem, n_steps=n_steps, n_paths=GROUP, backend=backend)
    if reason := refusal(request, estimator):
        raise NotApplicableError(reason)


@dataclass(frozen=True)
class ContractTask:
    """Shapes, precision, inputs, noise and needs on one problem."""

    problem: str

    work = 1000
    counted = True

    def __call__(self, estimator: Estimator) -> list[tuple[str, Check]]:
        """Return the checks with the precision they were made at."""
        problem = problem_of(self.problem)
        _refuse(estimator, problem, CONTRACT_STEPS)
        found = [
            (dtype, check)
            for dtype in DTYPES
            for check in contract_checks(estimator, problem, dtype)
        ]
        return [*found, ("float64", device_check(estimator, problem))]

    def __str__(self) -> str:
        """Return what is done, in words."""
        return f"interface on {self.problem}"


@dataclass(frozen=True)
class KernelTask:
    """The numba kernel against the torch function, path by path."""

    problem: str

    work = 50_000
    counted = True

    def __call__(self, estimator: Estimator) -> list[tuple[str, Check]]:
        """Return one check for each precision."""
        problem = problem_of(self.problem)
        _refuse(estimator, problem, CONTRACT_STEPS + 1)
        return [(d, kernel_check(estimator, problem, d)) for d in DTYPES]

    def __str__(self) -> str:
        """Return what is done, in words."""
        return f"numba kernel on {self.problem}"


@dataclass(frozen=True)
class CompileTask:
    """Compile the kernels of the built-ins to compare with, outside the time limit."""

    problem: str
    dtype: str

    work = 0
    counted = False

    def __call__(self, estimator: Estimator) -> None:
        """Run every kernel once."""
        problem = problem_of(self.problem)
        request = make_request(problem, n_steps=2, n_paths=GROUP)
        others = [e for e in built_ins(estimator) if refusal(request, e) is None]
        collect(
            problem,
            [estimator, *others],
            problem.theta("halfway"),
            problem.time_grid(2),
            n_paths=GROUP,
            backend="numba",
            dtype=self.dtype,
        )

    def __str__(self) -> str:
        """Return what is done, in words."""
        return f"compiling for {self.problem}, {self.dtype}"


@dataclass(frozen=True)
class StatisticsTask:
    """Bias, variance, tail and cost in one cell."""

    cell: ValidationCell

    counted = True

    @property
    def problem(self) -> str:
        """The problem's specification."""
        return self.cell.problem

    @property
    def work(self) -> int:
        """Path-steps, the unit of the time left."""
        return self.cell.n_paths * self.cell.n_steps

    def __call__(self, estimator: Estimator) -> dict[str, Any]:
        """Return the cell's row."""
        problem = problem_of(self.cell.problem)
        _refuse(estimator, problem, self.cell.n_steps, self.cell.backend)
        return CellTest(self.cell, problem, estimator).row()

    def __str__(self) -> str:
        """Return the cell, in words."""
        return str(self.cell)


Task = ContractTask | KernelTask | CompileTask | StatisticsTask
Tasks = Sequence[Task]
