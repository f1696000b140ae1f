"""One pytest test per check: `parametrize_with_checks`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from sdebench.errors import SDEBenchError, ValidationError
from sdebench.estimator import Estimator
from sdebench.validate.estimator import (
    CHECK_NAMES,
    EstimatorReport,
    check_estimator,
)
from sdebench.validate.report import FAILED, SKIPPED


class EstimatorCheck:
    """A check as a function of the estimator, for `parametrize_with_checks`."""

    def __init__(self, name: str, report: Any) -> None:
        self.name, self._report = name, report

    def __call__(self, estimator: Estimator | type[Estimator] | str) -> None:
        """Raise `ValidationError` if the check failed; skip the test if it was skipped.

        The whole validation runs at the first check, once in every process.
        """
        import pytest

        __tracebackhide__ = True  # the message says it all
        report: EstimatorReport = self._report()
        check = report.check(self.name)
        if check.status == SKIPPED:
            pytest.skip(check.message)
        if check.status == FAILED:
            raise ValidationError(f"{report.estimator}: {check}\n{check.traceback}")

    def __repr__(self) -> str:
        """Return the name of the check."""
        return self.name


def parametrize_with_checks(
    estimators: Iterable[Estimator | type[Estimator] | str], **settings: Any
) -> Any:
    """Return a pytest decorator that runs every check on every estimator.

    Parameters
    ----------
    estimators : classes, instances or specifications, as for `check_estimator`.
    **settings : of `check_estimator`.

    Examples
    --------
    >>> @sdebench.parametrize_with_checks([MyEstimator])
    ... def test_my_estimator(estimator, check):
    ...     check(estimator)
    """
    try:
        import pytest
    except ImportError as error:
        raise SDEBenchError("the decorator needs pytest: pip install pytest") from error

    chosen = list(estimators)
    if not chosen:
        raise SDEBenchError("there is no estimator to check; give at least one")
    cases = []
    for estimator in chosen:

        @cache
        def report(estimator: Any = estimator) -> EstimatorReport:
            return check_estimator(estimator, on_fail="report", **settings)

        label = getattr(estimator, "__name__", None) or getattr(
            estimator, "label", str(estimator)
        )
        cases += [
            pytest.param(estimator, EstimatorCheck(name, report), id=f"{label}-{name}")
            for name in CHECK_NAMES
        ]
    return pytest.mark.parametrize(("estimator", "check"), cases)
