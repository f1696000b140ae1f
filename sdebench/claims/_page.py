"""Run claims, keep their outcomes in a folder and write its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sdebench.claims._claim import Check, Claim, Decision
from sdebench.experiments import files
from sdebench.experiments.experiment import Progress, signed
from sdebench.experiments.files import Outcome, markdown_table
from sdebench.report.format import interval, markdown


def run(claim: Claim, folder: Path, seed: int, progress: Progress) -> Outcome:
    """Run and decide a claim and write its files into ``folder``.

    Raises
    ------
    ResultsError
        If the folder cannot be written.
    """
    evidence = claim.experiment(seed, progress)
    fields = _fields(claim, claim.decide(evidence), claim.table(evidence))
    record = files.complete(fields, seed)
    return files.write(folder, record, evidence, claim.figure(evidence))


def write_page(folder: Path) -> Path:
    """Write ``README.md`` from all outcomes in ``folder``."""
    return files.write_page(folder, "claims", _page)


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


def _fields(claim: Claim, decision: Decision, table: pd.DataFrame) -> dict[str, Any]:
    return {
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
    }


def _page(records: Sequence[dict[str, Any]]) -> str:
    overview = [
        {
            "claim": f"[{record['name']}](#{record['name']})",
            "statement": markdown(record["statement"]),
            "verdict": f"**{record['verdict']}**",
        }
        for record in records
    ]
    parts = [
        "# Claims",
        "Statements from the literature, run as experiments by `sdebench claims`. "
        "Every number that decides has an interval and a region where it must lie: a "
        "claim is supported if all intervals lie in their regions, refuted if one lies "
        "outside, undecided otherwise.",
        files.overview(overview),
        *(_section(record) for record in records),
    ]
    return "\n\n".join(parts) + "\n"


def _section(record: dict[str, Any]) -> str:
    name = record["name"]
    checks = record["checks"]
    return "\n\n".join(
        [
            f"## {name}",
            f"**{markdown(record['statement'])}**",
            f"Verdict: **{record['verdict']}**. {markdown(record['sentence'])}",
            f"![{name}]({name}.png)",
            markdown_table(record["table"]),
            f"*Source.* {markdown(record['source'])}.",
            f"*Experiment.* {markdown(record['procedure'])}",
            f"*Rule.* {markdown(record['decision_rule'])}",
            f"<details><summary>The {len(checks)} numbers that decide</summary>",
            markdown_table(checks),
            "</details>",
            files.made_by(record, "claims"),
        ]
    )
