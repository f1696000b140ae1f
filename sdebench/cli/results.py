"""Commands that show stored results: tables, figures and a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdebench.cli.options import FORMATS, HEADLINE, debug, filters, output
from sdebench.console import print_json, write_text
from sdebench.errors import ParameterError

if TYPE_CHECKING:
    import pandas as pd


def draw_figures(
    frame: pd.DataFrame, folder: Path, formats: tuple[str, ...] = ()
) -> list[Path]:
    """Draw all figures of a frame and return their paths."""
    from sdebench.report.plot import FORMATS, figures

    return [Path(path) for path in figures(frame, folder, formats or FORMATS)]


def print_table(
    frame: pd.DataFrame,
    format: str | None,
    output: Path | None = None,
    columns: tuple[str, ...] | None = None,
) -> None:
    """Print a frame as a table, or write it to a file."""
    from sdebench.report.table import render

    kind = format or ("md" if output else "terminal")
    write_text(render(frame, kind, columns), output)


def shorten(
    frame: pd.DataFrame, every_point: bool = False
) -> tuple[pd.DataFrame, tuple[str, ...] | None]:
    """Return the rows and columns of a first look, or everything if there are none.

    At "halfway", or at ``every_point`` of the frame with the efficiency as well.
    """
    from sdebench.report.selection import HEADLINE_COLUMNS, headline

    if not every_point:
        chosen = headline(frame)
        return (chosen, HEADLINE_COLUMNS) if len(chosen) else (frame, None)
    chosen = headline(frame, set(frame["point"]))
    problem, estimator, *others, verdict = HEADLINE_COLUMNS
    columns = (problem, estimator, "point", *others, "efficiency", verdict)
    return (chosen, columns) if len(chosen) else (frame, None)


def chosen_rows(folder: Path, patterns: dict[str, tuple[str, ...]]) -> pd.DataFrame:
    """Return the stored rows that match the patterns of `filters`."""
    from sdebench.report.selection import LABELS
    from sdebench.run import matching
    from sdebench.store import load

    frame = load(folder)
    for kind, globs in patterns.items():
        if globs:
            labels = frame[LABELS[kind]]
            wanted = matching(kind, set(labels), globs)
            attributes = frame.attrs
            frame = frame[labels.isin(wanted)]
            frame.attrs.update(attributes)
    return frame


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Write to a file."
)
@HEADLINE
@filters
@output
def table(
    folder: Path,
    output: Path | None,
    headline: bool,
    format: str | None,
    **patterns: tuple[str, ...],
) -> None:
    """Print the table of the results in FOLDER."""
    if format is None and output is not None:
        endings = {".tex": "latex", ".htm": "html"}
        suffix = output.suffix.lower()
        format = endings.get(suffix, suffix.removeprefix("."))
        if format not in FORMATS:
            raise ParameterError(
                f"--output {output} does not tell the format; add --format "
                f"{'|'.join(FORMATS)}"
            )
    frame = chosen_rows(folder, patterns)
    every_point = bool(patterns["point"])
    shown, columns = shorten(frame, every_point) if headline else (frame, None)
    print_table(shown, format, output, columns)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder of the figures; default: FOLDER/figures.",
)
@HEADLINE
@filters
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(("png", "svg", "pdf")),
    help="File formats; default: all three.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON.")
@debug
def plot(
    folder: Path,
    output: Path | None,
    headline: bool,
    formats: tuple[str, ...],
    as_json: bool,
    **patterns: tuple[str, ...],
) -> None:
    """Draw the figures of the results in FOLDER and print their paths."""
    frame = chosen_rows(folder, patterns)
    shown = shorten(frame, bool(patterns["point"]))[0] if headline else frame
    paths = [str(p) for p in draw_figures(shown, output or folder / "figures", formats)]
    if as_json:
        print_json(paths)
    else:
        click.echo("\n".join(paths))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder of the pages; default: FOLDER/report.",
)
@click.option("--open", "show", is_flag=True, help="Open the first page in a browser.")
@debug
def report(folder: Path, output: Path | None, show: bool) -> None:
    """Write the results in FOLDER as a static site and print its first page."""
    from sdebench.report.site import write_site
    from sdebench.store import load

    index = write_site(load(folder), output or folder / "report")
    click.echo(index)
    if show:
        click.launch(str(index))
