"""Words and formulae of a page: LaTeX as MathML, links to papers, parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from sdebench.errors import NotExactError, ParameterError
from sdebench.problem import Problem
from sdebench.report.format import MISSING, plain

_DIGITS = 8  # of exact answers
_ROUNDING = 1e-13  # an exact answer that is smaller is zero
_MATHML = {
    *("math", "mrow", "mstyle", "mspace", "mpadded", "mphantom", "mmultiscripts"),
    *("mi", "mn", "mo", "mtext", "mfrac", "msqrt", "mroot", "mtable", "mtr", "mtd"),
    *("msub", "msup", "msubsup", "munder", "mover", "munderover"),
}
# What the converter leaves undone: a relation, the room around norms and logarithms.
_REPAIRS = {
    "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>",
    '<mo stretchy="false">&#x0007C;</mo>': (
        '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;</mo>'
    ),
    "<mi>log</mi>": '<mi>log</mi><mspace width="0.17em" />',
}


def mathml(formula: str) -> str:
    """Return LaTeX as a MathML block.

    Raises
    ------
    ParameterError
        For LaTeX that cannot be converted.
    """
    from xml.etree import ElementTree

    from latex2mathml import converter, exceptions

    errors: tuple[Any, ...] = (
        ElementTree.ParseError,
        *filter(inspect.isclass, vars(exceptions).values()),
    )
    # The converter knows `aligned` by its other name.
    text = re.sub(r"\{aligned\}", "{split}", formula)
    try:
        markup: str = converter.convert(text, display="block")
        tree = ElementTree.fromstring(markup)  # the converter does not escape text
    except errors as error:
        raise _unusable(formula, type(error).__name__) from error
    if foreign := {e.tag.rpartition("}")[2] for e in tree.iter()} - _MATHML:
        raise _unusable(formula, f"unknown {', '.join(sorted(foreign))}")
    for found, better in _REPAIRS.items():
        markup = markup.replace(found, better)
    return markup


def _unusable(formula: str, reason: str) -> ParameterError:
    return ParameterError(
        f"formula {formula!r} cannot be converted to MathML ({reason}); use plain "
        "amsmath"
    )


@dataclass(frozen=True)
class Span:
    """A piece of text, with an address if it is a link."""

    text: str
    address: str = ""


def linked(source: str) -> list[Span]:
    """Return a source with each arXiv number linked to its abstract."""
    out, last = [], 0
    for found in re.finditer(r"arXiv:(\d{4}\.\d{4,5})", source):
        out.append(Span(source[last : found.start()]))
        out.append(Span(found[0], f"https://arxiv.org/abs/{found[1]}"))
        last = found.end()
    return [*out, Span(source[last:])]


@dataclass(frozen=True)
class Parameter:
    """A parameter with its value and what the docstring says about it."""

    name: str
    value: str
    meaning: str


def parameters(owner: Any, values: dict[str, Any]) -> list[Parameter]:
    """Return the parameters of a problem or the options of an estimator."""
    section = (inspect.getdoc(type(owner)) or "").partition("Parameters\n------")[2]
    meanings = {}
    entry = re.compile(r"^(\w[\w, ]*) : ((?:.|\n(?!\w))*)", re.M)
    for names, meaning in entry.findall(section):
        for name in names.split(","):
            meanings[name.strip()] = " ".join(meaning.replace("``", "").split())
    return [Parameter(k, str(v), meanings.get(k, "")) for k, v in values.items()]


def breakable(label: str) -> Markup:
    """Return a label as HTML that may be broken behind its punctuation."""
    return Markup(re.sub(r"([:,_])", r"\1<wbr>", str(escape(label))))


# ---- exact answers ------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    """An exact answer in continuous time and for the default number of steps."""

    quantity: str
    continuous: str
    bound: str
    discrete: str


@dataclass(frozen=True)
class Answers:
    """The exact answers of a problem, by evaluation point; reasons for the gaps."""

    groups: list[tuple[str, list[Answer]]]
    reasons: list[str]


def answers(problem: Problem) -> Answers:
    """Return all exact answers of a problem as text."""
    truth, steps = problem.truth, problem.default_steps
    reasons: list[str] = []

    def text(answer: Callable[[], Any]) -> str:
        try:
            numbers = np.atleast_1d(answer())
        except NotExactError as error:
            if str(error) not in reasons:
                reasons.append(str(error))
            return f"not exact ({reasons.index(str(error)) + 1})"
        least = _ROUNDING * max(1.0, float(np.max(np.abs(numbers))))
        numbers = np.where(np.abs(numbers) < least, 0.0, numbers)
        words = [plain(float(v), _DIGITS) for v in numbers]
        return words[0] if len(words) == 1 else f"({', '.join(words)})"

    def row(quantity: str, method: str, *theta: Any) -> Answer:
        answer = getattr(truth, method)
        shown = text(lambda: answer(*theta))
        return Answer(
            quantity,
            shown,
            _bound(problem, method, *theta) if "not exact" not in shown else MISSING,
            text(lambda: answer(*theta, n_steps=steps)),
        )

    groups = [
        (
            "at every θ",
            [
                row("log Z", "log_normalizer"),
                row("J(u*), the least cost", "optimal_cost"),
            ],
        )
    ]
    for point, theta in problem.points.items():
        shown = ", ".join(plain(float(v) + 0.0) for v in theta)  # -0 is 0
        rows = [
            row("J(θ)", "objective", theta),
            row("∇J(θ)", "gradient", theta),
            row("∇ of the adjoint-matching loss", "matching_gradient", theta),
            row("∇ of the cross-entropy", "cross_entropy_gradient", theta),
        ]
        groups.append((f"{point}, θ = ({shown})", rows))
    return Answers(groups, reasons)


def _bound(problem: Problem, quantity: str, theta: Any = None) -> str:
    """Return the error bound of a continuous answer; rounding only is 0."""
    value = float(problem.truth.error_bound(quantity, theta))
    return f"± {plain(value, 2)}" if value else "rounding"
