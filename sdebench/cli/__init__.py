"""The command line: parse, call, print.

Nothing heavy is imported before a command needs it: ``sdebench --help`` loads neither
numpy nor torch, numba, pandas or matplotlib.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NoReturn

import click

from sdebench.cli import catalogue, claims, measuring, results, studies, validation
from sdebench.cli.options import debug
from sdebench.errors import SDEBenchError

EXIT_USER_ERROR = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "--version", package_name="sdebench")
@debug
def cli() -> None:
    """Bias, variance and cost of gradient estimators, against exact answers.

    \b
    sdebench run                              measure everything, quickly
    sdebench measure ou_linear pathwise       one estimator on one problem
    sdebench truth two_modes:beta=0.1         the exact answers
    sdebench validate my_estimator.py         your own estimator or problem
    """  # noqa: D301 (click reads the backspace)


for _module in (catalogue, claims, studies, measuring, results, validation):
    for _command in vars(_module).values():
        if isinstance(_command, click.Command):
            cli.add_command(_command)


def report_interrupt(error: KeyboardInterrupt) -> int:
    """Say what is kept; return the exit code, 128 + the number of the signal."""
    run_module = sys.modules.get("sdebench.run")
    stopped = run_module is not None and isinstance(error, run_module.Terminated)
    kept = ": finished cells are kept; run the same command again to do the rest"
    click.echo(
        f"\n{'terminated' if stopped else 'interrupted'}{kept if run_module else ''}",
        err=True,
    )
    return 143 if stopped else 130


def _fail(error: BaseException) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    click.echo(f"sdebench: {text}", err=True)
    return EXIT_USER_ERROR


def main(arguments: Iterable[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 for failed cells, 2 for a user's error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(given, prog_name="sdebench", standalone_mode=False)
        sys.stdout.flush()
    except SDEBenchError as error:
        if "--debug" in given:
            raise
        code = _fail(error)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        if "--debug" in given:
            raise
        interrupt = error.__context__ if isinstance(error, click.Abort) else error
        if not isinstance(interrupt, KeyboardInterrupt):
            interrupt = KeyboardInterrupt()
        code = report_interrupt(interrupt)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
