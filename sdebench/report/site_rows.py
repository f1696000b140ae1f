"""Measured cells as the rows of a page's table: text, number to sort by, links."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sdebench.report.format import finite
from sdebench.report.markup import Sheet
from sdebench.report.selection import HEADLINE_COLUMNS
from sdebench.report.table import (
    COLUMNS,
    best_rows,
    column_texts,
    table_notes,
    worth_showing,
)

Cell = dict[str, Any]

# Columns with few different entries: a choice each, some in the long form only.
CHOICES = {
    **dict.fromkeys(("problem", "estimator", "estimand", "verdict"), "always"),
    **dict.fromkeys(("point", "steps", "scheme", "backend", "dtype"), "long"),
}


@dataclass(frozen=True)
class Entry:
    """One entry of a row."""

    text: str
    value: str  # the number to sort by; a final "a" marks an absolute one
    best: bool
    link: str


@dataclass(frozen=True)
class Column:
    """A column of the table on a page."""

    key: str
    heading: str
    numeric: bool
    choice: str  # when it is offered as a choice: "always", "long" or never ""
    detail: bool  # hidden in the short form of the table


@dataclass(frozen=True)
class Row:
    """A row; those of the short form have every setting at its default."""

    entries: list[Entry]
    short: bool
    tone: str  # of the verdict: "good", "bad", "refused" or neither


@dataclass(frozen=True)
class Table:
    """The table of a page."""

    columns: list[Column]
    rows: list[Row]
    caption: str

    @property
    def n_short(self) -> int:
        """Number of rows of the short form; 0 if the table has none."""
        return sum(row.short for row in self.rows)


def file_names(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Return a file name for each label, safe on every system and all different."""
    out: dict[str, str] = {}
    for name in names:
        stem = f"{kind}-{re.sub(r'[^A-Za-z0-9_.]+', '-', name).strip('-')}"
        candidate, n = f"{stem}.html", 1
        # Some file systems do not tell capitals from small letters.
        while candidate.lower() in {used.lower() for used in out.values()}:
            n += 1
            candidate = f"{stem}-{n}.html"
        out[name] = candidate
    return out


def table_maker(
    cells: list[Cell], links: dict[str, dict[str, str]]
) -> Callable[..., Table]:
    """Return a function that makes the table of some of the cells.

    Which entry is best of all is decided here, among all cells.

    Parameters
    ----------
    cells : rows of `sdebench.report.summary`.
    links : pages by column, then by text.
    """
    best = {key: best_rows(cells, column) for key, column in COLUMNS.items()}

    def make(
        chosen: Sequence[int],
        short: Sequence[bool],
        command: str | None,
        without: tuple[str, ...] = (),
    ) -> Table:
        mine = [cells[i] for i in chosen]
        keys = [k for k in worth_showing(mine) if k not in (*without, "verdict")]
        # The verdict is what most readers look for: before the numbers.
        keys.insert(keys.index("estimator") + 1, "verdict")
        texts = {k: column_texts(mine, COLUMNS[k]) for k in keys}
        rows = []
        for n, i in enumerate(chosen):
            entries = [
                Entry(
                    texts[key][n],
                    _sort_value(mine[n], key) if texts[key][n] else "",
                    i in best[key],
                    links.get(key, {}).get(texts[key][n], ""),
                )
                for key in keys
            ]
            rows.append(Row(entries, short[i], _tone(mine[n])))
        columns = [
            Column(
                key,
                COLUMNS[key].heading,
                COLUMNS[key].numeric,
                CHOICES.get(key, ""),
                key not in HEADLINE_COLUMNS,
            )
            for key in keys
        ]
        notes = table_notes(mine, keys, True, command)[:-1]  # the foot says the origin
        marked = {key: best[key].intersection(chosen) for key in keys}
        caption = Sheet({}, {}, {}, marked, notes).caption("Bold")
        return Table(columns, rows, caption)

    return make


def _tone(cell: Cell) -> str:
    if cell["status"] != "ok":
        return "refused"
    if cell["verdict"].startswith(("unbiased", "discretization")):
        return "good"
    if cell["verdict"] == "biased":
        return "bad"
    # A total bias may be all discretization; a heavy tail decides nothing.
    doubtful = ("biased, not split", "undecided", "infinite")
    return "open" if cell["verdict"].startswith(doubtful) else ""


def _sort_value(cell: Cell, key: str) -> str:
    """Return the number that an entry shows; a limit sorts by the limit."""
    column = COLUMNS[key]
    if not column.numeric:
        return ""
    numbers = [finite(cell[source]) for source in column.sources]
    value = numbers[0]
    if key in ("cost", "sample"):
        pair = [x for x in numbers if math.isfinite(x)]
        value = sum(pair) if key == "cost" else math.prod(pair)
    elif len(numbers) == 3 and numbers[1] <= 0.0 <= numbers[2]:
        value = numbers[2]
    if not math.isfinite(value):
        return ""
    relative = key in ("bias", "discretization", "own", "variance")
    return f"{value:.6g}{'a' if relative and cell['absolute'] else ''}"
