"""The command that runs statements from the literature as experiments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdebench.cli.experiments import folder_option, json_option, run_all, seed_option
from sdebench.cli.options import debug
from sdebench.console import print_rows

if TYPE_CHECKING:
    from sdebench.claims._claim import Claim


def _print_list(chosen: list[Claim], as_json: bool) -> None:
    rows = [
        {"claim": c.name, "statement": c.statement, "source": c.source} for c in chosen
    ]
    print_rows(rows, "json" if as_json else None, leave_out=("source",))


def _print_outcome(record: dict[str, Any]) -> None:
    click.echo(f"{record['name']}: {record['verdict']}")
    for key in ("statement", "sentence", "figure"):
        click.echo(f"  {record[key]}")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@folder_option("results/claims")
@seed_option
@click.option("--list", "only_list", is_flag=True, help="List the claims, run nothing.")
@json_option
@debug
def claims(
    names: tuple[str, ...], folder: Path, seed: int, only_list: bool, as_json: bool
) -> int:
    """Run statements from the literature as experiments: all, or those named.

    Prints for each claim whether it is supported, refuted or undecided, the numbers,
    and the figure behind it, and renews the page FOLDER/README.md.  The exit code is
    0 whatever the verdicts, and 1 if an experiment failed.
    """
    from sdebench.claims import claim, claim_names

    chosen = [claim(name) for name in names or claim_names()]
    if only_list:
        _print_list(chosen, as_json)
        return 0
    from sdebench.claims._page import run, write_page

    show = None if as_json else _print_outcome
    return run_all(chosen, run, write_page, folder, seed, show)
