"""What the commands that run claims and studies share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdebench.cli.options import SEED
from sdebench.console import print_json

if TYPE_CHECKING:
    from sdebench.experiments.experiment import Experiment, Progress
    from sdebench.experiments.files import Outcome

Run = Callable[[Any, Path, int, "Progress"], "Outcome"]

seed_option = click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Of the noise."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the outcomes as JSON."
)


def folder_option(default: str) -> Callable[..., Any]:
    """Return the option for the folder of the results."""
    return click.option(
        "--folder",
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path(default),
        show_default=True,
        help="Where page, figures and numbers go.",
    )


def run_all(
    chosen: Iterable[Experiment],
    run: Run,
    write_page: Callable[[Path], Path],
    folder: Path,
    seed: int,
    show: Callable[[dict[str, Any]], None] | None,
) -> int:
    """Run experiments one after the other and renew their page; return the exit code.

    Each record is handed to ``show``, or all are printed as JSON in the end.  One that
    fails does not stop the others.
    """
    records: list[dict[str, Any]] = []
    failed = 0
    for one in chosen:
        click.echo(f"running {one.name}", err=True)
        try:
            with _progress(one.name) as progress:
                outcome = run(one, folder, seed, progress)
        except Exception as error:  # the others still run
            failed += 1
            reason = f"{type(error).__name__}: {error}"
            click.echo(f"failed: {one.name}: {reason}", err=True)
            records.append({"name": one.name, "error": reason})
            continue
        figure = str(outcome.figure) if outcome.figure else None
        records.append(outcome.record | {"figure": figure})
        if show:
            show(records[-1])
    if failed < len(records):
        click.echo(str(write_page(folder)), err=True)
    if not show:
        print_json(records)
    return int(failed > 0)


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    """Show how far an experiment is, on standard error and only on a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
