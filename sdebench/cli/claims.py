"""The command that runs statements from the literature as experiments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdebench.cli.options import SEED, debug
from sdebench.console import print_json, print_rows

if TYPE_CHECKING:
    from sdebench.claims._claim import Claim, Progress


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """Show how far a claim is, on standard error and only on a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results/claims"),
    show_default=True,
    help="Where page, figures and numbers go.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise.")
@click.option("--list", "only_list", is_flag=True, help="List the claims, run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcomes as JSON.")
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

    records: list[dict[str, Any]] = []
    failed = 0
    for one in chosen:
        click.echo(f"running {one.name}", err=True)
        try:
            with _progress(one.name) as progress:
                outcome = run(one, folder, seed, progress)
        except Exception as error:  # the other claims still run
            failed += 1
            reason = f"{type(error).__name__}: {error}"
            click.echo(f"failed: {one.name}: {reason}", err=True)
            records.append({"name": one.name, "error": reason})
            continue
        records.append(outcome.record | {"figure": str(outcome.figure)})
        if not as_json:
            _print_outcome(records[-1])
    if failed < len(chosen):
        click.echo(str(write_page(folder)), err=True)
    if as_json:
        print_json(records)
    return int(failed > 0)
