"""Commands for a user's own files: start one, and validate it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdebench.cli.options import COUNT, DURATION, PERCENT, SEED, debug
from sdebench.console import print_json
from sdebench.errors import ParameterError, SDEBenchError

if TYPE_CHECKING:
    from sdebench.validate.report import Check, Report

EXIT_NOT_PASSED = 1
KINDS = ("estimator", "problem")


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("name")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where to write it; default: here.",
)
@debug
def new(kind: str, name: str, folder: Path) -> None:
    """Write NAME.py, a commented, working file to start from."""
    from sdebench.validate.new import write_new

    path = write_new(kind, name, folder)
    click.echo(str(path))
    click.echo(f"now: sdebench validate {path}", err=True)


@click.command()
@click.argument("file", metavar="FILE[:CLASS][:OPTION=VALUE]")
@click.option(
    "--problem", multiple=True, metavar="GLOB", help="Only on these problems."
)
@click.option("--seed", type=SEED, default=0)
@click.option(
    "--false-alarm",
    type=PERCENT,
    default="0.1%",
    show_default=True,
    help="Probability that a correct one is called biased.",
)
@click.option(
    "--paths",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    help="Multiple of the number of paths: 4 finds biases half as large.",
)
@click.option("--jobs", "-j", type=COUNT, help="Worker processes; default: all cores.")
@click.option(
    "--time-limit", type=DURATION, default="60s", show_default=True, help="For a cell."
)
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--debug", is_flag=True, help="Show the tracebacks of errors.")
@click.pass_context
def validate(
    context: click.Context,
    file: str,
    quiet: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    r"""Validate an estimator or a problem against the exact answers.

    FILE is a Python file of your own (sdebench new writes one), or the name of
    something in the catalogue.  The exit code is 0 if every check passed, else 1.
    """
    options["progress"] = not quiet
    # What a user's file prints is no part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        check, is_problem = _checker(file)
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    if is_problem:
        refused = sorted(set(given) & {"problem", "paths", "jobs", "time_limit"})
        if refused:
            raise ParameterError(
                f"--{refused[0].replace('_', '-')} is for estimators, and {file} is a "
                "problem"
            )
        keep = ("seed", "false_alarm", "progress")
        options = {name: options[name] for name in keep}
    else:
        options["problems"] = options.pop("problem") or None
    with contextlib.redirect_stdout(sys.stderr):
        report = check(file, on_fail="report", **options)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)
    if debug:
        _print_tracebacks(report.checks)
    if not report.passed:
        raise click.exceptions.Exit(EXIT_NOT_PASSED)


def _checker(spec: str) -> tuple[Any, bool]:
    """Return the function that checks what the specification names."""
    from sdebench import registry
    from sdebench.files import file_spec, load_class
    from sdebench.problem import Problem

    if found := file_spec(spec):
        is_problem = issubclass(load_class(found.path, found.class_name), Problem)
    else:
        name = registry.parse(spec)[0]
        is_problem = name in registry.problem_names()
        if not is_problem and name not in registry.estimator_names():
            raise SDEBenchError(
                f"{spec!r} is neither a file ending in .py nor an estimator or problem "
                "of the catalogue; `sdebench new estimator NAME` writes a file"
            )
    if is_problem:
        from sdebench.validate import check_problem

        return check_problem, True
    from sdebench.validate import check_estimator

    return check_estimator, False


def _print(report: Report) -> None:
    """Print a report, in colors on a terminal."""
    if not sys.stdout.isatty():
        click.echo(str(report))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in report.parts():
        console.print(part)


def _print_tracebacks(checks: tuple[Check, ...]) -> None:
    for check in checks:
        if check.traceback:
            click.echo(f"\n{check.name}:\n{check.traceback}", err=True)
