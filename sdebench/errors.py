"""Errors that a user can cause, each with one clear sentence.

Every message says what was given, what is allowed and what to do.  The command
line prints the sentence and exits with 2; library callers catch ``SDEBenchError``
or the standard class it derives from.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class SDEBenchError(Exception):
    """Base of all errors raised on purpose by sdebench."""


class UnknownNameError(SDEBenchError, KeyError):
    """A problem, estimator, suite or parameter that does not exist."""

    def __str__(self) -> str:
        """Return the sentence itself: KeyError would show its quoted repr."""
        return str(self.args[0])


class ParameterError(SDEBenchError, ValueError):
    """A parameter outside its range."""


class NotExactError(SDEBenchError, LookupError):
    """An exact answer that does not exist in closed form for this problem."""


class NotApplicableError(SDEBenchError):
    """An estimator outside its assumptions on a problem; carries the reason."""


class ValidationError(SDEBenchError, AssertionError):
    """A problem or an estimator that did not pass its checks.

    ``report``: every check, passed or not.
    """

    report: Any = None


class NumericalError(SDEBenchError, ArithmeticError):
    """NaN or overflow in an estimator or a simulation."""


class ResultsError(SDEBenchError):
    """A results file that is truncated, of another version or cannot be written."""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UnknownNameError:
    """Return the error for an unknown name, with the nearest valid ones.

    Parameters
    ----------
    kind : what the name should name, e.g. ``"problem"``.
    given : the name as typed.
    allowed : all valid names.
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"choose from {', '.join(names)}"
    )
    return UnknownNameError(f"unknown {kind} {given!r}; {hint}")
