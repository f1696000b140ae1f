"""Summary of measured cells and its rendering for paper, page and terminal.

`summary` turns rows of measurements into one row of plain numbers per cell; `render`
sets them with their uncertainty.  Bold is a statement, not a minimum: an entry is bold
only where its interval lies apart from those of all competitors for the same estimand
on the same problem, at the same point with the same steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdebench.errors import ParameterError, unknown
from sdebench.report import markup
from sdebench.report.format import MISSING, finite, interval, plain
from sdebench.report.summarize import INFINITE, SETTINGS, summary

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "FORMATS", "render", "summary"]

FORMATS = ("markdown", "latex", "csv", "html", "json", "terminal")
_GROUP = ("problem", "point", "steps", "estimand", *SETTINGS)


@dataclass(frozen=True)
class _Column:
    """A column of the shown table: heading, text of a cell, and who is best."""

    heading: str
    text: Callable[[dict[str, Any]], str]
    numeric: bool = True
    best: tuple[str, str] | None = None  # (stem of the interval, "min" or "max")
    sources: tuple[str, ...] = ()  # columns of the summary behind it


def _ends(stem: str) -> tuple[str, ...]:
    return (stem, f"{stem}_low", f"{stem}_high")


def _bias_text(stem: str) -> Callable[[dict[str, Any]], str]:
    def text(cell: dict[str, Any]) -> str:
        if cell["absolute"]:
            shown = interval(*(cell[k] for k in _ends(stem)))
            return shown if shown in (MISSING, "0 (exact)") else f"{shown} †"
        value, low, high = (100.0 * cell[k] for k in _ends(stem))
        return interval(value, low, high, unit="%")

    return text


def _discretization_text(cell: dict[str, Any]) -> str:
    value = cell["relative_bias_discretization"]
    if value == 0.0 or math.isnan(value):
        return plain(value)
    return f"{plain(value)} †" if cell["absolute"] else f"{plain(100.0 * value)} %"


def _variance_text(cell: dict[str, Any]) -> str:
    shown = interval(*(cell[k] for k in _ends("relative_variance")))
    if shown in (MISSING, "0 (exact)"):
        return shown
    note = " ∞?" if cell["verdict"] == INFINITE else ""
    return f"{shown}{note} †" if cell["absolute"] else f"{shown}{note}"


def _cost_text(cell: dict[str, Any]) -> str:
    drift, vjp = cell["drift_evaluations"], cell["vjp_evaluations"]
    return plain(drift) if not vjp > 0.0 else f"{plain(drift)} + {plain(vjp)}"


def _efficiency_text(cell: dict[str, Any]) -> str:
    if cell["relative_variance"] == 0.0 and cell["relative_bias"] == 0.0:
        return "∞"
    return interval(*(cell[k] for k in _ends("efficiency")))


def _verdict_text(cell: dict[str, Any]) -> str:
    if cell["status"] == "ok":
        return cell["verdict"] or MISSING
    return f"{cell['status']}: {cell['reason'] or 'no reason recorded'}"


def _sample_text(cell: dict[str, Any]) -> str:
    return f"{_integer(cell['n_replicates'])} × {_integer(cell['n_paths'])}"


def _integer(x: Any) -> str:
    value = finite(x) if x is not None and x == x else math.nan
    return MISSING if math.isnan(value) else f"{value:.0f}"


def _plain_column(key: str, heading: str, numeric: bool = False) -> _Column:
    def text(cell: dict[str, Any]) -> str:
        return _integer(cell[key]) if numeric else cell[key] or MISSING

    return _Column(heading, text, numeric, sources=(key,))


COLUMNS: dict[str, _Column] = {
    "problem": _plain_column("problem", "problem"),
    "estimator": _plain_column("estimator", "estimator"),
    "point": _plain_column("point", "point"),
    "steps": _plain_column("steps", "steps", numeric=True),
    "estimand": _plain_column("estimand", "estimand"),
    **{key: _plain_column(key, key) for key in SETTINGS},
    "bias": _Column(
        "relative bias",
        _bias_text("relative_bias"),
        best=("relative_bias", "min"),
        sources=_ends("relative_bias"),
    ),
    "discretization": _Column(
        "of discretization (exact)",
        _discretization_text,
        sources=("relative_bias_discretization",),
    ),
    "own": _Column(
        "of estimator",
        _bias_text("relative_bias_own"),
        best=("relative_bias_own", "min"),
        sources=_ends("relative_bias_own"),
    ),
    "variance": _Column(
        "relative variance",
        _variance_text,
        best=("relative_variance", "min"),
        sources=_ends("relative_variance"),
    ),
    "tail": _Column(
        "tail index",
        lambda c: interval(*(c[k] for k in _ends("tail_index"))),
        sources=_ends("tail_index"),
    ),
    "cost": _Column(
        "drift + vjp per path",
        _cost_text,
        sources=("drift_evaluations", "vjp_evaluations"),
    ),
    "time": _Column(
        "ns per path-step",
        lambda c: plain(c["ns_per_path_step"]),
        sources=("ns_per_path_step",),
    ),
    "efficiency": _Column(
        "efficiency",
        _efficiency_text,
        best=("efficiency", "max"),
        sources=_ends("efficiency"),
    ),
    "verdict": _Column(
        "verdict", _verdict_text, numeric=False, sources=("verdict", "status", "reason")
    ),
    "sample": _Column(
        "replicates × paths", _sample_text, sources=("n_replicates", "n_paths")
    ),
}
_KEYS = ("problem", "estimator")
# What goes into the caption instead of a column when it is the same in every row.
_CONSTANT = ("point", "steps", "estimand", *SETTINGS, "sample")


def best_rows(cells: list[dict[str, Any]], column: _Column) -> set[int]:
    """Return the rows whose interval lies apart from all competitors', per group."""
    if column.best is None:
        return set()
    stem, sense = column.best
    groups: dict[tuple[Any, ...], list[tuple[float, float, int]]] = {}
    for i, cell in enumerate(cells):
        low, high = cell[f"{stem}_low"], cell[f"{stem}_high"]
        # An interval under suspicion of infinite variance cannot be believed.
        if cell["status"] != "ok" or cell["verdict"] == INFINITE or not low <= high:
            continue
        key = tuple(str(cell[k]) for k in _GROUP)
        if sense == "max":
            low, high = -high, -low
        groups.setdefault(key, []).append((low, high, i))
    out = set()
    for members in groups.values():
        members.sort(key=lambda m: m[1])
        if len(members) > 1 and members[0][1] < min(m[0] for m in members[1:]):
            out.add(members[0][2])
    return out


def render(
    frame: pd.DataFrame,
    format: str = "markdown",
    columns: Sequence[str] | None = None,
    *,
    command: str | None = None,
    width: int | None = None,
    color: bool | None = None,
) -> str:
    """Return the table of measured cells as text that ends with its origin.

    Parameters
    ----------
    frame : measured rows, or what `summary` made of them.
    format : ``markdown`` (or ``md``), ``latex``, ``csv``, ``html``, ``json`` or
        ``terminal``.  csv and json carry the numbers of `summary` to full precision and
        the origin in columns of their own; the others show rounded numbers.
    columns : names from ``COLUMNS``, in the order wanted; csv and json also take
        columns of `summary`.  By default all that have something to show; what is the
        same in every row is said once, in the caption.
    command : the command that made the numbers; default ``frame.attrs["command"]``.
    width, color : of the terminal; found out by default.

    Raises
    ------
    UnknownNameError
        For an unknown format or column.
    ParameterError
        For a frame without the columns that name a cell.
    """
    format = {"md": "markdown", "tex": "latex"}.get(format, format)
    if format not in FORMATS:
        raise unknown("table format", format, FORMATS)
    known = set(frame.columns)
    if len(frame) and not {"problem", "estimator"} <= known:
        raise ParameterError(
            f"a frame with columns {sorted(map(str, known))[:5]} is no measurement; "
            "pass the frame of sdebench.run, sdebench.load or sdebench.measure"
        )
    table = frame if "absolute" in known and "steps" in known else summary(frame)
    command = command or table.attrs.get("command")
    if format in ("csv", "json"):
        return _data(table, format, columns, command)
    for name in columns or ():
        if name not in COLUMNS:
            raise unknown("column", name, COLUMNS)
    cells: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    chosen = list(columns) if columns is not None else worth_showing(cells)
    notes = table_notes(cells, chosen, columns is None, command)
    if not cells:
        return "no measured cells\n"
    sheet = markup.Sheet(
        headings={k: COLUMNS[k].heading for k in chosen},
        numeric={k: COLUMNS[k].numeric for k in chosen},
        texts={k: column_texts(cells, COLUMNS[k]) for k in chosen},
        best={k: best_rows(cells, COLUMNS[k]) for k in chosen},
        notes=notes,
    )
    if format == "markdown":
        return markup.to_markdown(sheet)
    if format == "latex":
        return markup.to_latex(sheet)
    if format == "html":
        return markup.to_html(sheet)
    return markup.to_terminal(sheet, width, color, keep=columns or ())


def column_texts(cells: list[dict[str, Any]], column: _Column) -> list[str]:
    """Return the column's text; an unmeasured row has words only, never a number."""
    quantity = column.numeric and column.sources != ("steps",)
    return ["" if quantity and c["status"] != "ok" else column.text(c) for c in cells]


def worth_showing(cells: list[dict[str, Any]]) -> list[str]:
    """Return the columns that differ between rows or hold a measured number."""
    out = []
    for key, column in COLUMNS.items():
        texts = column_texts(cells, column)
        ok = [t for t, c in zip(texts, cells, strict=True) if c["status"] == "ok"]
        if key in _CONSTANT:
            shown = len({t for t in texts if t and t != MISSING}) > 1
        else:
            shown = key in _KEYS or key == "verdict" or any(t != MISSING for t in ok)
        if shown:
            out.append(key)
    return out


def _values(cells: list[dict[str, Any]], key: str) -> list[str]:
    """Return the different texts of a column, in order, without missing ones."""
    texts = (COLUMNS[key].text(c) for c in cells)
    return list(dict.fromkeys(t for t in texts if t and t != MISSING))


def _span(cells: list[dict[str, Any]], key: str, noun: str) -> str:
    found = [finite(c[key]) for c in cells if c[key] is not None and c[key] == c[key]]
    if not found:
        return ""
    low, high = min(found), max(found)
    return f"{low:.0f} {noun}" if low == high else f"{low:.0f} to {high:.0f} {noun}"


def _origin(cells: list[dict[str, Any]], key: str) -> str:
    found = dict.fromkeys(str(c[key]) for c in cells if c.get(key))
    return " and ".join(found) or "not recorded"


def table_notes(
    cells: list[dict[str, Any]], chosen: list[str], drop: bool, command: str | None
) -> list[str]:
    """Return the sentences of the caption: what holds for all rows, and the origin."""
    if not cells:
        return []
    ok = [c for c in cells if c["status"] == "ok"]
    constant = [k for k in _CONSTANT if drop and k not in chosen and k != "sample"]
    common = [(COLUMNS[k].heading, v) for k in constant for v in _values(cells, k)]
    levels = sorted({c["confidence"] for c in cells if c["confidence"] > 0.0})
    level = " and ".join(f"{plain(100.0 * x)} %" for x in levels) or "unrecorded"
    out = []
    if common:
        out.append(f"All rows: {', '.join(f'{k} {v}' for k, v in common)}.")
    sizes = [
        _span(ok or cells, "n_replicates", "replicates"),
        _span(ok or cells, "n_paths", "paths"),
    ]
    size = " of ".join(sizes) if all(sizes) else "Number of replicates not recorded"
    out.append(
        f"{size}; brackets and “<” are {level} confidence intervals, simultaneous over "
        "the components of a bias."
    )
    out.append(
        "Bias and variance (of one path) are relative to the norm of the exact answer "
        "and its square; where that is zero, to those at the point zero, and for log Z "
        "to 1."
    )
    if "efficiency" in chosen:
        out.append("Efficiency is 1/(mean squared error × evaluations).")
    if any(c["absolute"] for c in ok):
        out.append("† absolute: the exact answer is zero or unknown.")
    if any(c["verdict"] == INFINITE for c in ok):
        out.append("∞? the variance may be infinite and its interval is not valid.")
    version = _origin(cells, "sdebench_version")
    out.append(
        f"sdebench {version}, commit {_origin(cells, 'commit')}, machine "
        f"{_origin(cells, 'machine')}; command: {command or 'not recorded'}."
    )
    return out


def _data(
    table: pd.DataFrame, format: str, columns: Sequence[str] | None, command: str | None
) -> str:
    """Return csv or json with 17 digits; NaN is an empty field or null."""
    names = [str(c) for c in table.columns]
    if columns is not None:
        names = []
        for name in columns:
            if name not in COLUMNS and name not in table.columns:
                raise unknown("column", name, [*COLUMNS, *map(str, table.columns)])
            sources = COLUMNS[name].sources if name in COLUMNS else (name,)
            names += [s for s in sources if s not in names]
    data = table[[n for n in names if n in table.columns]]
    if format == "csv":
        return data.assign(command=command or "").to_csv(
            index=False, float_format="%.17g", lineterminator="\n"
        )
    records: list[dict[str, Any]] = data.to_dict("records")  # type: ignore[assignment]
    rows = [{k: _json(v) for k, v in r.items()} for r in records]
    cells: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    origin: dict[str, Any] = {
        key: list(dict.fromkeys(_json(c[key]) for c in cells))
        for key in ("n_replicates", "n_paths", "confidence", "commit", "machine")
        if key in table
    }
    document = {"rows": rows, "origin": origin | {"command": command}}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _json(value: Any) -> Any:
    """Return a value that strict JSON can hold: what is not finite becomes null."""
    if value is None or isinstance(value, str | bool):
        return value
    x = finite(value)
    if not math.isfinite(x):
        return None
    return int(x) if isinstance(value, int) else x
