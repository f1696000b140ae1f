"""The files of experiments: record, evidence, figure, and the page of a folder.

An experiment leaves ``NAME.json`` (the record), ``NAME.csv`` (the evidence) and its
figure; ``README.md`` is written anew from all records in the folder, so that running
one experiment leaves the others as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sdebench.errors import ResultsError
from sdebench.provenance import provenance
from sdebench.report.format import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
# What made a number; the time and the machine have no part in it.
_ORIGIN = ("sdebench_version", "commit", "python", "numpy", "numba")
# Dates are left out: the same numbers give the same files.
_NO_DATE = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
_DESCRIPTION = {"png": "Description", "svg": "Description", "pdf": "Subject"}


@dataclass(frozen=True)
class Outcome:
    """A finished experiment: ``record`` is what the page and ``--json`` show."""

    record: dict[str, Any]
    figure: Path | None


def complete(fields: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the record of an experiment: its fields, the seed and what made it."""
    origin = provenance()
    made = {name: origin[name] for name in _ORIGIN}
    return {"schema_version": SCHEMA_VERSION, **fields, "seed": seed, **made}


def write(
    folder: Path,
    record: dict[str, Any],
    evidence: pd.DataFrame,
    figure: Figure | None,
    formats: Sequence[str] = ("png",),
    command: str = "",
) -> Outcome:
    """Write the files of an experiment.

    Parameters
    ----------
    formats : of the figure; the first is the one of the page.
    command : what made the files, to be written into evidence and figure.

    Raises
    ------
    ResultsError
        If the folder cannot be written.
    """
    name = record["name"]
    drawn = [folder / f"{name}.{form}" for form in formats] if figure else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in drawn:
            _draw(figure, path, command)
        table = evidence.to_csv(index=False, float_format="%.10g")
        head = f"# {command}\n" if command else ""
        (folder / f"{name}.csv").write_text(head + table, "utf-8")
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", "utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return Outcome(record, drawn[0] if drawn else None)


def read_evidence(path: Path) -> pd.DataFrame:
    """Return the evidence in a file that `write` wrote."""
    return pd.read_csv(path, comment="#", dtype={"printed": str})


def write_page(
    folder: Path, command: str, page: Callable[[Sequence[dict[str, Any]]], str]
) -> Path:
    """Write ``README.md`` from all records in ``folder``.

    Parameters
    ----------
    command : "claims" or "studies", which writes the records.
    page : makes the text from the records.
    """
    found = [_read(path, command) for path in sorted(folder.glob("*.json"))]
    path = folder / "README.md"
    try:
        path.write_text(page(found), "utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return path


def markdown_table(rows: Iterable[dict[str, Any]]) -> str:
    """Return rows of texts as a table of the page, escaped."""
    texts = [{markdown(k): markdown(str(v)) for k, v in row.items()} for row in rows]
    return overview(texts)


def overview(rows: Iterable[dict[str, str]]) -> str:
    """Return rows of Markdown as a table of the page."""
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def made_by(record: dict[str, Any], command: str) -> str:
    """Return the last line of a section: the evidence and what made it."""
    name = record["name"]
    origin = ", ".join(
        f"{key.removesuffix('_version')} {record[key]}" for key in _ORIGIN
    )
    return (
        f"All numbers: [{name}.csv]({name}.csv). Made by "
        f"`{command_of(record, command)}` ({origin})."
    )


def command_of(record: dict[str, Any], command: str) -> str:
    """Return the command line that makes a record."""
    return f"sdebench {command} {record['name']} --seed {record['seed']}"


def _draw(figure: Any, path: Path, command: str) -> None:
    from sdebench.report.style import style

    form = path.suffix[1:]
    about = {_DESCRIPTION[form]: command} if command else {}
    with style():
        figure.savefig(path, dpi=200, metadata=_NO_DATE[form] | about)


def _read(path: Path, command: str) -> dict[str, Any]:
    again = f"delete it and run `sdebench {command}` again"
    try:
        record = json.loads(path.read_text("utf-8"))
        version = record["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{path} is not a record of `sdebench {command}` ({type(error).__name__}); "
            f"{again}"
        ) from error
    if version != SCHEMA_VERSION:
        raise ResultsError(
            f"{path} has version {version}, this is version {SCHEMA_VERSION}; {again}"
        )
    return dict(record)


def _unwritable(folder: Path, error: OSError) -> ResultsError:
    return ResultsError(
        f"{folder} cannot be written: {error.strerror}; choose another with --folder"
    )
