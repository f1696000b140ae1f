"""Run claims, keep their outcomes in a folder and write its page.

Each claim leaves ``NAME.json`` (the decision), ``NAME.csv`` (the evidence) and
``NAME.png`` (the figure); ``README.md`` is written anew from all outcomes in the
folder, so that running one claim leaves the others as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sdebench.claims._claim import Check, Claim, Decision, Progress, signed
from sdebench.errors import ResultsError
from sdebench.provenance import provenance
from sdebench.report.format import interval, markdown

SCHEMA_VERSION = 1
# What made a number; the time and the machine have no part in it.
_ORIGIN = ("sdebench_version", "commit", "python", "numpy", "numba")


@dataclass(frozen=True)
class Outcome:
    """A decided claim: ``record`` is what the page and ``--json`` show."""

    record: dict[str, Any]
    figure: Path


def run(claim: Claim, folder: Path, seed: int, progress: Progress) -> Outcome:
    """Run and decide a claim and write its files into ``folder``.

    Raises
    ------
    ResultsError
        If the folder cannot be written.
    """
    evidence = claim.experiment(seed, progress)
    record = _record(claim, claim.decide(evidence), claim.table(evidence), seed)
    figure = folder / f"{claim.name}.png"
    drawn = claim.figure(evidence)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        evidence.to_csv(folder / f"{claim.name}.csv", index=False, float_format="%.10g")
        drawn.savefig(figure, dpi=200, metadata={"Software": None})
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / f"{claim.name}.json").write_text(f"{text}\n", "utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return Outcome(record, figure)


def write_page(folder: Path) -> Path:
    """Write ``README.md`` from all outcomes in ``folder``."""
    records = [_read(path) for path in sorted(folder.glob("*.json"))]
    page = folder / "README.md"
    try:
        page.write_text(_page(records), "utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return page


def text_of(check: Check) -> str:
    """Return the number of a check as text."""
    unit = f" {check.unit}" if check.unit else ""
    value, low, high = check.interval
    if low == high and abs(value) < 1e-9:
        return f"0{unit}"  # rounding
    if low < 0.0:
        return f"{signed(check.interval)}{unit}"
    return interval(value, low, high, check.unit)


def requirement(check: Check) -> str:
    """Return where the number of a check must be."""
    unit = f" {check.unit}" if check.unit else ""
    least, most = f"{check.least:g}", f"{check.most:g}"
    if check.least == -check.most:
        return f"within ±{most}{unit}"
    if check.least == float("-inf"):
        return f"≤ {most}{unit}"
    if check.most == float("inf"):
        return f"≥ {least}{unit}"
    return f"{least} to {most}{unit}"


def _record(
    claim: Claim, decision: Decision, table: pd.DataFrame, seed: int
) -> dict[str, Any]:
    origin = provenance()
    return {
        "schema_version": SCHEMA_VERSION,
        "name": claim.name,
        "statement": claim.statement,
        "source": claim.source,
        "procedure": claim.procedure,
        "decision_rule": claim.decision_rule,
        "verdict": decision.verdict,
        "sentence": decision.sentence,
        "checks": [
            {
                "quantity": check.quantity,
                "value": text_of(check),
                "required": requirement(check),
                "outcome": check.outcome,
            }
            for check in decision.checks
        ],
        "table": table.to_dict("records"),
        "seed": seed,
        **{name: origin[name] for name in _ORIGIN},
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
        version = record["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{path} is not the outcome of a claim ({type(error).__name__}); delete it "
            "and run `sdebench claims` again"
        ) from error
    if version != SCHEMA_VERSION:
        raise ResultsError(
            f"{path} has version {version}, this is version {SCHEMA_VERSION}; delete "
            "it and run `sdebench claims` again"
        )
    return dict(record)


def _unwritable(folder: Path, error: OSError) -> ResultsError:
    return ResultsError(
        f"{folder} cannot be written: {error.strerror}; choose another with --folder"
    )


def _markdown_table(rows: Iterable[dict[str, Any]]) -> str:
    texts = [{markdown(k): markdown(str(v)) for k, v in row.items()} for row in rows]
    return str(pd.DataFrame(texts).to_markdown(index=False, disable_numparse=True))


def _page(records: Sequence[dict[str, Any]]) -> str:
    overview = [
        {
            "claim": f"[{record['name']}](#{record['name']})",
            "statement": markdown(record["statement"]),
            "verdict": f"**{record['verdict']}**",
        }
        for record in records
    ]
    table = pd.DataFrame(overview).to_markdown(index=False, disable_numparse=True)
    parts = [
        "# Claims",
        "Statements from the literature, run as experiments by `sdebench claims`. "
        "Every number that decides has an interval and a region where it must lie: a "
        "claim is supported if all intervals lie in their regions, refuted if one lies "
        "outside, undecided otherwise.",
        table,
        *(_section(record) for record in records),
    ]
    return "\n\n".join(parts) + "\n"


def _section(record: dict[str, Any]) -> str:
    name = record["name"]
    checks = record["checks"]
    origin = ", ".join(
        f"{key.removesuffix('_version')} {record[key]}" for key in _ORIGIN
    )
    return "\n\n".join(
        [
            f"## {name}",
            f"**{markdown(record['statement'])}**",
            f"Verdict: **{record['verdict']}**. {markdown(record['sentence'])}",
            f"![{name}]({name}.png)",
            _markdown_table(record["table"]),
            f"*Source.* {markdown(record['source'])}.",
            f"*Experiment.* {markdown(record['procedure'])}",
            f"*Rule.* {markdown(record['decision_rule'])}",
            f"<details><summary>The {len(checks)} numbers that decide</summary>",
            _markdown_table(checks),
            "</details>",
            f"All numbers: [{name}.csv]({name}.csv). Made by "
            f"`sdebench claims {name} --seed {record['seed']}` ({origin}).",
        ]
    )
