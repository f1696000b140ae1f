"""What stands on each page of the report: tables, figures, formulae, exact answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdebench import registry
from sdebench.errors import NotExactError, ResultsError, SDEBenchError
from sdebench.problem import ESTIMANDS
from sdebench.report import plot, site_rows, site_text
from sdebench.report.format import parameters
from sdebench.report.selection import headline
from sdebench.report.site_pictures import problem_figure
from sdebench.report.site_svg import inline
from sdebench.report.style import COLUMN, PAGE
from sdebench.report.summarize import summary
from sdebench.view import NEEDS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from sdebench.estimator import Estimator
    from sdebench.problem import Problem

_CAPTIONS = {
    "bias": (
        "Relative bias with simultaneous intervals. Left all of it, with the exact "
        "discretization bias as a tick where it is known; right the estimator's own. "
        "An arrow is an interval that reaches zero."
    ),
    "variance": "Relative variance of one path, with its interval.",
    "work": (
        "Error against cost: the mean squared error of an average of n paths. Lower "
        "left is better; a line that flattens has reached its bias. Numbers without a "
        "scale are left out."
    ),
    "order": (
        "Bias against the step size. An arrow is an interval that reaches zero, the "
        "unmarked line the exact discretization bias, the slope the weak order."
    ),
    "steps": "Variance of one path against the number of time steps.",
}


@dataclass(frozen=True)
class Picture:
    """A figure on a page, with the words below it."""

    svg: str
    caption: str
    wide: bool = True


@dataclass(frozen=True)
class Subject:
    """A problem or an estimator in a list of the index."""

    label: str
    file: str
    about: str


def _stem(label: str) -> str:
    """Return a label without its parameters."""
    return label.partition(":")[0]


class Pages:
    """The contents of all pages.

    Attributes
    ----------
    problem_files, estimator_files : file names by the label of a problem (a page for
        every set of parameters) and by the name of an estimator (a page for all).
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame.reset_index(drop=True)
        self._table = summary(self._frame)
        self._command = self._table.attrs.get("command")
        cells: list[dict[str, Any]] = self._table.to_dict("records")  # type: ignore[assignment]
        names = dict.fromkeys(c["problem"] for c in cells)
        variants = dict.fromkeys(c["estimator"] for c in cells)
        self.problem_files = site_rows.file_names("problem", names)
        self.estimator_files = site_rows.file_names(
            "estimator", dict.fromkeys(map(_stem, variants))
        )
        links = {
            "problem": self.problem_files,
            "estimator": {v: self.estimator_files[_stem(v)] for v in variants},
        }
        self._make_table = site_rows.table_maker(cells, links)
        self._places = {name: place for place, name in enumerate(names)}
        self._problem_of = self._table["problem"]
        self._estimator_of = self._table["estimator"].map(_stem)

    def origin(self) -> dict[str, str]:
        """Return what made the numbers and when: the foot of every page."""
        out = {"command": self._command or "not recorded"}
        for key in ("sdebench_version", "commit", "machine", "created"):
            values = self._frame[key].dropna() if key in self._frame else ()
            found = sorted(
                {str(v)[:10] if key == "created" else str(v) for v in values}
            )
            if key == "created" and len(found) > 1:
                found = [f"{found[0]} to {found[-1]}"]
            out[key] = " and ".join(found) or "not recorded"
        return out

    def index(self) -> dict[str, Any]:
        """Return the contents of the first page."""
        short = self._defaults()
        shown = self._table[short] if short.any() else self._table
        plain = (self._problem_of.map(_stem) == self._problem_of) & (
            self._table["estimator"] == self._estimator_of
        )
        problems = [
            Subject(label, file, getattr(self._problem(label), "hardness", ""))
            for label, file in self.problem_files.items()
        ]
        estimators = [
            Subject(name, file, getattr(self._estimator(name), "summary", ""))
            for name, file in self.estimator_files.items()
        ]
        return {
            "cells": self._cells(short | True, short),
            "statuses": dict(Counter(self._table["status"])),
            "problems": problems,
            "estimators": estimators,
            "pictures": _pictures(shown, self._table[plain], "all"),
        }

    def problem(self, label: str) -> dict[str, Any]:
        """Return the contents of a problem's page."""
        mine = self._problem_of == label
        table = self._table[mine]
        problem = self._problem(label)
        content: dict[str, Any] = {
            "label": label,
            "problem": problem,
            "cells": self._cells(
                mine, self._defaults("problem", "estimator"), ("problem",)
            ),
            "pictures": _pictures(table, table, f"the estimators on {label}", COLUMN),
        }
        if problem is None:
            return content
        return content | {
            "formula": _formula(problem),
            "parameters": site_text.parameters(problem, problem.parameters),
            "source": site_text.linked(problem.source),
            "answers": site_text.answers(problem),
            "law": _law(problem),
        }

    def estimator(self, name: str) -> dict[str, Any]:
        """Return the contents of an estimator's page."""
        mine = self._estimator_of == name
        table = self._table[mine]
        estimator = self._estimator(name)
        content: dict[str, Any] = {
            "label": name,
            "estimator": estimator,
            "cells": self._cells(mine, self._defaults("problem", "estimator")),
            "pictures": _pictures(table, table, f"{name} on every problem"),
        }
        if estimator is None:
            return content
        return content | {
            "formula": _formula(estimator),
            "parameters": site_text.parameters(estimator, estimator.options),
            "source": site_text.linked(estimator.source),
            "estimand": ESTIMANDS.get(estimator.estimand, estimator.estimand),
            "needs": [
                words for need, words in NEEDS.items() if need in estimator.needs
            ],
        }

    # ---- parts --------------------------------------------------------------------
    def _problem(self, label: str) -> Problem | None:
        """Return a problem with the parameters measured, None if it is not known."""
        row = self._frame[self._problem_of == label].iloc[0]
        if row["problem"] not in registry.problem_names():
            return None
        values = parameters(row.get("problem_parameters"))
        try:
            return registry.problem(row["problem"], **values)
        except SDEBenchError:
            return None

    def _estimator(self, name: str) -> Estimator | None:
        known = name in registry.estimator_names()
        return registry.estimator(name) if known else None

    def _defaults(self, *free: str) -> pd.Series[bool]:
        """Return which rows a first look needs; ``free`` names may have options."""
        labels = {f"{kind}_label": self._frame[kind] for kind in free}
        chosen = headline(self._frame.assign(**labels))
        return self._frame.index.to_series().isin(chosen.index)

    def _place(self, i: int) -> tuple[Any, ...]:
        """Return what to sort a row by: refusals last, defaults before options."""
        status, problem, label = self._table.loc[i, ["status", "problem", "estimator"]]
        return status != "ok", self._places[problem], _stem(str(label)), label

    def _cells(
        self,
        mine: pd.Series[bool],
        short: pd.Series[bool],
        without: tuple[str, ...] = (),
    ) -> site_rows.Table:
        rows = [i for i, chosen in enumerate(mine) if chosen]
        if not mine.all():  # the index keeps the order of the run
            rows.sort(key=self._place)
        return self._make_table(rows, short.tolist(), self._command, without)


def _formula(subject: Problem | Estimator) -> str:
    return site_text.mathml(subject.formula) if subject.formula else ""


def _law(problem: Problem) -> Picture | None:
    """Return the picture of laws and control, None where there is no density."""
    try:
        figure, words = problem_figure(problem)
    except (NotExactError, NotImplementedError):
        return None
    return Picture(inline(figure, "law", words), words)


_MOST_ROWS = 250
"""Rows of a figure, eleven to an inch, before it is no picture any more."""


def _pictures(
    table: pd.DataFrame, ladder: pd.DataFrame, what: str, width: float = PAGE
) -> list[Picture]:
    """Return all figures that the cells have data for.

    Parameters
    ----------
    table : cells of the figures at one number of steps; of very many there are no
        figures with a row per cell, which the pages of the problems have.
    ladder : cells of the figures over the number of steps.
    what : what is compared, in words.
    width : inches, of all figures but the bias.
    """
    drawers: list[tuple[str, Callable[..., Figure], pd.DataFrame, float]] = [
        ("bias", plot.bias_figure, table, PAGE),
        ("work", plot.work_precision_figure, _relative(table), width),
        ("order", plot.order_figure, _relative(ladder), width),
        ("steps", _steps_figure, _relative(ladder), width),
    ]
    if width == PAGE:
        drawers.insert(1, ("variance", _variance_figure, table, width))
    if len(table) > _MOST_ROWS:
        drawers = [
            drawer for drawer in drawers if drawer[0] not in ("bias", "variance")
        ]
    out = []
    for name, draw, cells, inches in drawers:
        try:
            figure = draw(cells, width=inches)
        except ResultsError:
            continue  # nothing of this kind was measured
        text = f"{_CAPTIONS[name]} Shown: {what}."
        out.append(Picture(inline(figure, name, text), _CAPTIONS[name], inches == PAGE))
    return out


def _relative(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out absolute numbers: they do not share an axis with relative ones."""
    return table[~table["absolute"].astype(bool)]


def _steps_figure(table: pd.DataFrame, width: float) -> Figure:
    return plot.variance_figure(table, against="steps", width=width)


def _variance_figure(table: pd.DataFrame, width: float) -> Figure:
    return plot.variance_figure(table, against="problems", width=width)
