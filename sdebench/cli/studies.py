"""The command that reproduces numbers of the literature, side by side with ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdebench.cli.experiments import folder_option, json_option, run_all, seed_option
from sdebench.cli.options import debug
from sdebench.console import print_rows

if TYPE_CHECKING:
    from sdebench.studies._study import Study


def _print_list(chosen: list[Study], as_json: bool) -> None:
    rows = [{"study": s.name, "subject": s.subject, "source": s.source} for s in chosen]
    print_rows(rows, "json" if as_json else None, leave_out=("source",))


def _print_outcome(record: dict[str, Any]) -> None:
    click.echo(f"{record['name']}: {record['sentence']}")
    if record["figure"]:
        click.echo(f"  {record['figure']}")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@folder_option("results/studies")
@seed_option
@click.option(
    "--list", "only_list", is_flag=True, help="List the studies, run nothing."
)
@json_option
@debug
def studies(
    names: tuple[str, ...], folder: Path, seed: int, only_list: bool, as_json: bool
) -> int:
    """Set published and derived numbers side by side with ours: all, or those named.

    A study has no verdict.  Prints for each its main numbers in one sentence and its
    figure, and renews the page FOLDER/README.md with all tables.  The exit code is 1
    if a study failed.
    """
    from sdebench.studies import study, study_names

    chosen = [study(name) for name in names or study_names()]
    if only_list:
        _print_list(chosen, as_json)
        return 0
    from sdebench.studies._page import run, write_page

    show = None if as_json else _print_outcome
    return run_all(chosen, run, write_page, folder, seed, show)
