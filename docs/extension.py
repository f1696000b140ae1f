"""What the site needs beyond Sphinx: the catalogue, our docstrings, and MathML.

The catalogue's pages are Jinja templates over the registry, so that a new problem or
estimator has its entry without an edit.  Formulas become MathML, which browsers show
without fetching a script.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from docutils import nodes
from jinja2 import Environment, StrictUndefined
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, NumpyDocstring
from sphinx.util.rst import escape

import sdebench
from sdebench import registry
from sdebench.cli import cli
from sdebench.estimator import Estimator
from sdebench.problem import ESTIMANDS, Problem
from sdebench.report.format import markdown
from sdebench.report.site_text import linked, mathml
from sdebench.simulate.paths import simulate
from sdebench.view import NEEDS

RESULTS = "../results"  # from this folder
TEMPLATES = ("problems", "estimators", "claims", "studies", "command_line")
# "name, other : what it is", as all docstrings of this package write it.
_ENTRY = re.compile(r"(\*{0,2}\w+(?:, \w+)*) : (.*)")
NAPOLEON = Config(
    napoleon_attr_annotations=False,
    napoleon_custom_sections=[("Class attributes", "Attributes")],
    napoleon_use_ivar=True,
    napoleon_use_rtype=False,
)
_HEADINGS = ("Parameters", "Attributes", "Class attributes")


# ---- pages of the catalogue ---------------------------------------------------------
def commands() -> dict[str, str]:
    """Return the help text of every command of the command line."""
    outer = click.Context(cli, info_name="sdebench", **cli.context_settings)
    return {
        name: command.get_help(click.Context(command, outer, name, terminal_width=80))
        for name, command in sorted(cli.commands.items())
    }


def written(kind: str) -> str:
    """Return the page of the claims or studies, with links that lead somewhere."""
    folder = f"{RESULTS}/{kind}"
    page = (Path(__file__).parent / folder / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((\w+\.\w+)\)", rf"]({folder}/\1)", page)


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Render a page of the catalogue."""
    if page not in TEMPLATES:
        return
    template = Environment(undefined=StrictUndefined).from_string(source[0])
    source[0] = template.render(
        problems=[registry.problem(name) for name in registry.problem_names()],
        estimators=[registry.estimator(name) for name in registry.estimator_names()],
        estimands={name: markdown(text) for name, text in ESTIMANDS.items()},
        claims=written("claims"),
        studies=written("studies"),
        commands=commands(),
    )


# ---- docstrings ---------------------------------------------------------------------
def numpydoc(lines: list[str]) -> list[str]:
    """Return a docstring as napoleon reads it.

    The meaning of a parameter goes below its name, as behind the colon is its type; a
    list of attributes gets its heading; the bars of |u|^2 are not markup.
    """
    left = [line if "``" in line else line.replace("|", r"\|") for line in lines]
    out: list[str] = []
    inside = False
    while left:
        line = left.pop(0)
        if left and left[0] and set(left[0]) == {"-"}:
            inside = line in _HEADINGS
        entry = _ENTRY.fullmatch(line)
        if entry and not inside and out and not out[-1]:
            out += ["Attributes", "----------"]
            inside = True
        if not (entry and inside):
            out.append(line)
            continue
        names, meaning = entry.groups()
        while left and left[0].startswith(" "):
            meaning += f" {left.pop(0).strip()}"
        for name in names.split(", "):
            out += [name, f"    {meaning}"]
    return out


def problem_facts(problem: Problem) -> dict[str, str]:
    """Return what the catalogue says of a problem besides its docstring."""
    return {
        "Why it is hard": problem.hardness,
        "Source": problem.source,
        "Kind": f"{problem.problem_class}, {problem.dim}-dimensional by default",
        "Control parameters": ", ".join(problem.parameter_names),
        "Time steps": f"{problem.default_steps} unless given",
    }


def estimator_facts(estimator: Estimator) -> dict[str, str]:
    """Return what the catalogue says of an estimator besides its docstring."""
    return {
        "Estimates": ESTIMANDS[estimator.estimand],
        "Expectation": estimator.unbiased,
        "Needs": ", ".join(NEEDS[need] for need in sorted(estimator.needs))
        or "forward paths and their costs only",
        "Source": estimator.source,
    }


def with_links(source: str) -> str:
    """Return a text as reStructuredText, with links to the papers it names."""
    return "".join(
        f"`{span.text} <{span.address}>`__" if span.address else escape(span.text)
        for span in linked(source)
    )


def add_facts(lines: list[str], cls: type[Problem] | type[Estimator]) -> None:
    """Add formula and facts to the docstring of a class of the catalogue."""
    item = cls()
    facts = problem_facts if isinstance(item, Problem) else estimator_facts
    added = [f"| **{name}:** {with_links(fact)}" for name, fact in facts(item).items()]
    if cls.formula:
        formula = (f"   {line}" for line in cls.formula.splitlines())
        added[:0] = [".. math::", "", *formula, ""]
    lines[1:1] = ["", *added, ""]


def mend_docstring(
    app: Sphinx, kind: str, name: str, item: Any, options: Any, lines: list[str]
) -> None:
    """Turn a docstring into reStructuredText."""
    # Of an attribute, napoleon would take all before a colon for its type.
    kind = "method" if kind in ("property", "attribute") else kind
    numpy_style = NumpyDocstring(
        numpydoc(lines), NAPOLEON, app, kind, name, item, options
    )
    lines[:] = numpy_style.lines()
    catalogue = tuple(f"{package}." for package in registry.KINDS.values())
    if kind == "class" and name.startswith(catalogue):
        add_facts(lines, item)


def functions_for_callable_modules() -> None:
    """Let ``sdebench.measure`` be the function that calling the module calls."""
    for name in sdebench.__all__:
        value = getattr(sdebench, name)
        if isinstance(value, ModuleType):
            setattr(sdebench, name, type(value).__call__.__wrapped__)
    sdebench.simulate = simulate  # calling the module only hands its arguments on


# ---- formulas -----------------------------------------------------------------------
def visit_inline(translator: Any, node: nodes.math) -> None:
    """Write a formula of a line."""
    formula = mathml(node.astext()).replace('display="block"', 'display="inline"', 1)
    translator.body.append(formula)
    raise nodes.SkipNode


def visit_display(translator: Any, node: nodes.math_block) -> None:
    """Write a formula that stands alone."""
    translator.body.append(f'<div class="formula">{mathml(node.astext())}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the parts with Sphinx."""
    functions_for_callable_modules()
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", mend_docstring)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
