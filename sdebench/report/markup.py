"""A table of finished texts as Markdown, LaTeX, HTML and for the terminal."""

from __future__ import annotations

import html
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdebench.report.format import latex, markdown

_NAMES = ("problem", "estimator")
# What a narrow terminal loses first.
_EXPENDABLE = ("tail", "time", "own", "efficiency", "discretization", "cost", "sample")
_GAP = 2  # blanks between the columns of a terminal table


@dataclass(frozen=True)
class Sheet:
    """A table ready to be set: texts by column, the best entries, the caption."""

    headings: dict[str, str]
    numeric: dict[str, bool]
    texts: dict[str, list[str]]
    best: dict[str, set[int]]
    notes: list[str]

    def __len__(self) -> int:
        return len(next(iter(self.texts.values())))

    def caption(self, mark: str) -> str:
        """Return the caption; ``mark`` says how the best entries are marked."""
        notes = list(self.notes)
        if any(self.best.values()):
            notes.insert(
                0,
                f"{mark}: best of its estimand on the problem, shown only where the "
                "interval lies apart from all others.",
            )
        return " ".join(notes)

    def rows(
        self, escape: Callable[[str], str], mark: Callable[[str], str]
    ) -> list[list[str]]:
        """Return the rows with each text escaped and the best entries marked."""
        return [
            [
                mark(escape(texts[i])) if i in self.best[key] else escape(texts[i])
                for key, texts in self.texts.items()
            ]
            for i in range(len(self))
        ]

    def starts(self) -> list[bool]:
        """Return for each row whether its problem differs from the row above."""
        names = self.texts.get("problem", [""] * len(self))
        return [i == 0 or names[i] != names[i - 1] for i in range(len(self))]


def to_markdown(sheet: Sheet) -> str:
    """Return an aligned pipe table with its caption below."""
    from tabulate import tabulate

    text: str = tabulate(
        sheet.rows(markdown, lambda t: f"**{t}**" if t else t),
        headers=list(sheet.headings.values()),
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["right" if n else "left" for n in sheet.numeric.values()],
    )
    return f"{text}\n\n{markdown(sheet.caption('Bold'))}\n"


def to_latex(sheet: Sheet) -> str:
    """Return a floating table with booktabs rules; a name stands for the rows below."""
    import pandas as pd

    rows = sheet.rows(latex, lambda t: rf"\textbf{{{t}}}")
    if next(iter(sheet.texts)) == "problem":
        for row, start in zip(rows, sheet.starts(), strict=True):
            row[0] = row[0] if start else ""
    frame = pd.DataFrame(rows, columns=[latex(h) for h in sheet.headings.values()])
    text: str = frame.style.hide(axis="index").to_latex(
        hrules=True,
        column_format="".join("r" if n else "l" for n in sheet.numeric.values()),
        caption=latex(sheet.caption("Bold")),
        label="tab:sdebench",
        position="tbp",
        position_float="centering",
    )
    return "% needs \\usepackage{booktabs}\n" + text


_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .6rem; }
th, td { padding: .2rem .7rem; white-space: nowrap; text-align: left; }
thead th { border-bottom: 1px solid; border-top: 2px solid; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 2px solid; }
tbody tr.first > * { border-top: 1px solid #8886; }
tbody th { font-weight: normal; }
.number { text-align: right; }
"""


def to_html(sheet: Sheet) -> str:
    """Return a whole page without external parts; headings carry their scope."""

    def cell(tag: str, key: str, text: str, scope: str = "") -> str:
        kind = ' class="number"' if sheet.numeric[key] else ""
        return f"<{tag}{scope}{kind}>{text}</{tag}>"

    head = "".join(
        cell("th", k, html.escape(h), ' scope="col"') for k, h in sheet.headings.items()
    )
    body = []
    rows = sheet.rows(html.escape, lambda t: f"<strong>{t}</strong>")
    for row, start in zip(rows, sheet.starts(), strict=True):
        cells = "".join(
            cell("th", k, t, ' scope="row"') if k in _NAMES else cell("td", k, t)
            for k, t in zip(sheet.texts, row, strict=True)
        )
        body.append(f'<tr class="first">{cells}</tr>' if start else f"<tr>{cells}</tr>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>sdebench: measured estimators</title>\n<style>\n{_STYLE}</style>\n"
        '</head>\n<body>\n<div class="scroll" tabindex="0" role="region" '
        'aria-label="Measured estimators">\n<table>\n'
        f"<caption>{html.escape(sheet.caption('Bold'))}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n"
        "</table>\n</div>\n</body>\n</html>\n"
    )


def _fold(name: str, width: int = 18) -> str:
    """Break a name behind underscores so that its lines stay within ``width``."""
    lines = [""]
    for part in name.replace("_", "_\0").replace("\n", "\n\0").split("\0"):
        if lines[-1].endswith("\n"):
            lines[-1] = lines[-1][:-1]
            lines.append(part)
        elif len(lines[-1]) + len(part) > width:
            lines.append("  " + part)
        else:
            lines[-1] += part
    return "\n".join(lines)


def to_terminal(
    sheet: Sheet, width: int | None, color: bool | None, keep: Sequence[str] = ()
) -> str:
    """Return the table for a terminal; a narrow one loses columns and says which.

    Columns in ``keep`` stay.  Nothing is ever cut off: where even the names do not fit
    they are folded, and then lines may be longer than ``width``.
    """
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = width or shutil.get_terminal_size((160, 24)).columns
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    texts = {k: list(v) for k, v in sheet.texts.items()}
    starts = sheet.starts()
    for k in texts:
        for i in sheet.best[k]:
            texts[k][i] += " *"
    if "problem" in texts:
        texts["problem"] = [
            t if start else ""
            for t, start in zip(texts["problem"], starts, strict=True)
        ]

    least = {"verdict": 26}

    def needed() -> int:
        # Headings and verdicts may be folded between words, numbers and names never.
        out = 2  # the edges
        for key in shown:
            lines = [*sheet.headings[key].split()]
            for text in texts[key]:
                lines += text.split() if key == "verdict" else text.split("\n")
            widths[key] = max(least.get(key, 0), *map(cell_len, lines))
            out += widths[key] + _GAP
        return out

    shown, hidden = list(texts), []
    widths: dict[str, int] = {}
    if needed() > width:
        for key in set(_NAMES) & set(shown):
            texts[key] = [t.replace(":", ":\n  ") for t in texts[key]]
    for key in _EXPENDABLE:
        if needed() > width and key in shown and key not in keep:
            shown.remove(key)
            hidden.append(key)
    if needed() > width:
        least.clear()
        for key in {"problem", "estimator", "estimand"} & set(shown):
            texts[key] = [_fold(t) for t in texts[key]]
    total = max(width, needed())
    if "verdict" in widths:  # takes what is left, up to its longest text
        natural = max(map(cell_len, texts["verdict"]))
        spare = total - needed()
        widths["verdict"] += max(0, min(spare, natural - widths["verdict"]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for key in shown:
        table.add_column(
            sheet.headings[key],
            justify="right" if sheet.numeric[key] else "left",
            width=widths[key],
        )
    for i, start in enumerate(starts):
        if start and i:
            table.add_section()
        table.add_row(
            *(Text(texts[k][i], "bold" if i in sheet.best[k] else "") for k in shown)
        )
    caption = sheet.caption("*")
    if hidden:
        caption += (
            f" Hidden for want of width: {', '.join(hidden)}; choose columns or a "
            "wider format."
        )
    out = io.StringIO()
    console = Console(
        file=out, width=total, force_terminal=color, no_color=not color, highlight=False
    )
    console.print(table)
    console.width = width
    console.print(Text(caption))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
