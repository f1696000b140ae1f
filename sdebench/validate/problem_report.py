"""What the validation of a problem returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdebench.report.format import plain
from sdebench.validate.report import (
    FAILED,
    MARKS,
    PASSED,
    SKIPPED,
    STYLES,
    Check,
    Report,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class ProblemCheck(Check):
    """One check of a problem; it passes if value <= limit.

    value : largest relative error, or |z|, or what the message says; None where
        nothing was compared.
    """

    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class ProblemReport(Report):
    """What a validation found; ``checks`` in the order in which they ran.

    false_alarm : probability that a correct problem fails a stochastic check.
    """

    problem: str
    checks: tuple[ProblemCheck, ...]
    seed: int
    false_alarm: float
    seconds: float

    @property
    def subject(self) -> str:
        """The problem's label."""
        return self.problem

    def parts(self) -> list[RenderableType]:
        """Return the parts of the report, for a rich console."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column()
        table.add_column("check", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("limit", justify="right", no_wrap=True)
        table.add_column("largest of", overflow="fold")
        for check in self.checks:
            style = STYLES[check.status]
            table.add_row(
                Text(MARKS[check.status], style),
                Text(check.name, style),
                _number(check.value),
                _number(check.limit),
                Text(check.message),
            )
        verdict = PASSED if self.passed else FAILED
        end = Text.assemble((verdict, STYLES[verdict]), f": {self._summary()}")
        return [Text(self.problem, "bold"), table, end]

    def _summary(self) -> str:
        counts = [
            f"{sum(check.status == status for check in self.checks)} {status}"
            for status in (PASSED, FAILED, SKIPPED)
        ]
        return (
            f"{', '.join(counts)}; a correct problem fails with probability "
            f"{self.false_alarm:g} at most ({self.seconds:.0f} s, seed {self.seed})"
        )


def _number(value: float | None) -> str:
    return "" if value is None else plain(value, 2)
