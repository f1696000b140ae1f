"""What a validation returns: named checks, each with one clear sentence."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sdebench.errors import SDEBenchError, ValidationError, unknown
from sdebench.report.format import plain

PASSED, FAILED, SKIPPED, NOTE = "passed", "failed", "skipped", "note"
STYLES = {PASSED: "green", FAILED: "bold red", SKIPPED: "dim", NOTE: "yellow"}
WIDTH = 124
"""Columns of a report that is not printed on a terminal."""
MARKS = {PASSED: "✓", FAILED: "✗", SKIPPED: "–", NOTE: "!"}


GRADIENT_HINT = (
    "; statistics runs without gradients: open torch.enable_grad(), and reach theta "
    "through view.control_parameter_vjp (help(sdebench.view) has an example)"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    status : "passed", "failed", "skipped" (could not be run: the message says why) or
        "note" (worth knowing, held against nobody).
    details : numbers behind the message, ready for JSON.
    traceback : of an exception in the code under test, else "".
    """

    name: str
    status: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""

    def __str__(self) -> str:
        """Return one line."""
        return f"{MARKS[self.status]} {self.name}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class Report:
    """What all validations have in common; ``checks`` in the order they ran."""

    checks: tuple[Check, ...]

    @property
    def subject(self) -> str:
        """What was validated."""
        raise NotImplementedError

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.status != FAILED for check in self.checks)

    def check(self, name: str) -> Any:
        """Return the outcome of one check.

        Raises
        ------
        UnknownNameError
            For a check that did not run.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise unknown("check", name, [check.name for check in self.checks])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        checks = [check.to_dict() for check in self.checks]
        return {"passed": self.passed, **vars(self), "checks": checks}

    def raise_if_failed(self) -> Self:
        """Return the report itself.

        Raises
        ------
        ValidationError
            If a check failed; names every one.
        """
        failed = [str(check) for check in self.checks if check.status == FAILED]
        if failed:
            error = ValidationError(
                f"{self.subject} did not pass {len(failed)} of {len(self.checks)} "
                f"checks: {'; '.join(failed)}"
            )
            error.report = self
            raise error
        return self

    def parts(self) -> list[Any]:
        """Return the report as rich renderables, for a terminal."""
        raise NotImplementedError

    def __str__(self) -> str:
        """Return the readable report."""
        import io

        from rich.console import Console

        console = Console(
            file=io.StringIO(),
            width=WIDTH,
            color_system=None,
            highlight=False,
            force_jupyter=False,
        )
        for part in self.parts():
            console.print(part)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    __repr__ = __str__


def describe(error: BaseException, file: str | None = None) -> str:
    """Return an exception in one line, with the last line of ``file`` it passed."""
    text = " ".join(str(error).split()) or "no message"
    if not isinstance(error, SDEBenchError):
        text = f"{type(error).__name__}: {text}"
    if "does not require grad" in text:
        text += GRADIENT_HINT
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file and frame.filename == file]
    return f"{text} ({Path(file).name}, line {lines[-1]})" if file and lines else text


def percent(ratio: float) -> str:
    """Return a ratio in percent, two digits."""
    return f"{plain(100.0 * ratio, 2)} %"
