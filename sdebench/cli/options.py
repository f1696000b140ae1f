"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from sdebench.console import Scaled, Vector

FORMATS = ("md", "latex", "csv", "html", "json")

# Taken anywhere on the line; `sdebench.cli.main` looks for it among the arguments.
debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    help="Show the traceback of an error.",
)


def output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--format`` and its short form ``--json``."""
    choice = click.Choice(FORMATS)
    add_format = click.option("--format", type=choice, help="Print data in this form.")
    add_json = click.option(
        "--json", "format", flag_value="json", help="The same as --format json."
    )
    return debug(add_format(add_json(command)))


HEADLINE = click.option(
    "--headline",
    is_flag=True,
    help="Only the cells with every setting at its default, at halfway "
    "or the given points.",
)


def filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--problem``, ``--estimator`` and ``--point``, which choose rows."""
    for kind in ("point", "estimator", "problem"):
        option = click.option(
            f"--{kind}", multiple=True, metavar="GLOB", help=f"Only these {kind}s."
        )
        command = option(command)
    return command


POINT = Vector(names=True)
PERCENT = Scaled("PERCENT", {"%": 0.01})
DURATION = Scaled("DURATION", {"s": 1.0, "m": 60.0, "h": 3600.0})
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**64 - 1)
POINT_HELP = "zero, halfway, optimum, overshoot, or theta as JSON."
