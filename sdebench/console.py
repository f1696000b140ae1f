"""What the command line reads and prints: vectors and units in, tables and JSON out."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import click

from sdebench.errors import SDEBenchError


def _jsonable(value: Any) -> Any:
    """Return plain values; JSON has no NaN or infinity: null and their names."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def print_json(value: Any) -> None:
    """Print JSON; a number is the shortest text that reads back to the same bits."""
    click.echo(
        json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
    )


def text_of(value: Any, digits: int = 6) -> str:
    """Return a value for the eye."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if hasattr(value, "tolist"):
        return text_of(value.tolist(), digits)
    if isinstance(value, list | tuple):
        text = ", ".join(text_of(v, digits) for v in value)
        return text if value and isinstance(value[0], str) else f"[{text}]"
    if isinstance(value, set | frozenset):
        return ", ".join(sorted(map(str, value)))
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={text_of(v, digits)}" for k, v in value.items())
    return str(value)


def print_rows(
    rows: list[dict[str, Any]],
    format: str | None,
    digits: int = 6,
    leave_out: Container[str] = (),
    head: bool = True,
) -> None:
    """Print dictionaries with the same keys as a table.

    Without a format it is for the eye: a terminal is narrow, ``leave_out`` is not
    shown there.
    """
    if format == "json":
        print_json(rows)
        return
    texts = [{k: text_of(v, digits) for k, v in row.items()} for row in rows]
    if format is None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD if head else None, pad_edge=False, show_header=head
        )
        shown = [key for key in (rows[0] if rows else ()) if key not in leave_out]
        for i, key in enumerate(shown):
            table.add_column(key.replace("_", " "), overflow="fold", no_wrap=i == 0)
        for row in texts:
            table.add_row(*(row[key] for key in shown))
        Console(markup=False, highlight=False).print(table)
        return
    import pandas as pd

    exact = [{k: text_of(v, 17) for k, v in row.items()} for row in rows]
    if format == "csv":
        click.echo(pd.DataFrame(exact).to_csv(index=False), nl=False)
    elif format == "html":
        click.echo(pd.DataFrame(texts).to_html(index=False))
    elif format == "latex":
        frame = pd.DataFrame(texts).style.format(escape="latex").hide(axis="index")
        click.echo(frame.to_latex(hrules=True), nl=False)
    else:
        click.echo(pd.DataFrame(texts).to_markdown(index=False, disable_numparse=True))


def print_one(record: dict[str, Any], format: str | None, digits: int = 10) -> None:
    """Print one record: its keys run downwards unless it is JSON."""
    if format == "json":
        print_json(record)
    else:
        pairs = [{"name": k.replace("_", " "), "value": v} for k, v in record.items()]
        print_rows(pairs, format, digits, head=format is not None)


def write_text(text: str, output: Path | None) -> None:
    """Print a finished text, or write it to a file and say so on standard error."""
    if output is None:
        click.echo(text, nl=not text.endswith("\n"))
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text if text.endswith("\n") else f"{text}\n", "utf-8")
    except OSError as error:
        raise SDEBenchError(f"cannot write {output}: {error.strerror}") from error
    click.echo(str(output), err=True)


class Vector(click.ParamType):
    """Numbers as JSON, ``[0.1, 2]`` or ``0.1``; other text stays as it is."""

    name = "JSON"

    def __init__(self, names: bool = False) -> None:
        self.names = names

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError:
            if self.names and not value.lstrip().startswith(("[", "{")):
                return value
            self.fail(f"{value!r} is not JSON, e.g. [0.1, -2]", param, ctx)
        if isinstance(found, int | float) and not isinstance(found, bool):
            found = [found]
        flat = found if isinstance(found, list) else [None]
        numbers = (v for r in flat for v in (r if isinstance(r, list) else [r]))
        if not all(type(v) in (int, float) for v in numbers):
            self.fail(f"{value!r} is not a list of numbers", param, ctx)
        return found


class Scaled(click.ParamType):
    """A positive number with a unit: ``1%`` or ``60s``, ``2m``, ``1h``."""

    def __init__(self, name: str, units: Mapping[str, float]) -> None:
        self.name = name
        self.units = units

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        unit = next((u for u in self.units if text.endswith(u)), "")
        try:
            number = float(text.removesuffix(unit)) * self.units.get(unit, 1.0)
        except ValueError:
            number = 0.0
        if not 0.0 < number < float("inf"):
            units = ", ".join(self.units)
            self.fail(f"{value!r} is not a positive number, as is or in {units}")
        return number
