"""Measure the false alarms and the power of `sdebench validate`.

*False alarms.*  Every built-in estimator with every variant is validated on the whole
catalogue with several seeds.  All are right, so an alarm is false; at the rate a and n
runs their number is below its mean n a plus chance.  The p-values of the single cells
say more: each should be below a level in at most that share of the cells.

*Power.*  Estimators with one mistake each (tests/_mutants.py) are validated likewise.

`python -m bench.validation` writes the page results/validation/README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import joblib
import pandas as pd
from scipy.stats import beta

from sdebench import registry
from sdebench.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
LEVELS = (0.1, 0.01, 0.001)
FALSE_ALARM = 1e-3
FEWER = 0.125
"""Multiple of the default number of paths; calibration does not need more."""
MUTANT_PATHS = 0.25


def _mutants() -> list[Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    import _mutants

    return list(_mutants.MUTANTS)


def validate(estimator: Any, seed: int, paths: float) -> dict[str, Any]:
    """Validate one estimator in this process; return verdict and p-values."""
    import torch

    from sdebench.validate import check_estimator

    torch.set_num_threads(1)
    if isinstance(estimator, int):
        estimator = _mutants()[estimator]
    report = check_estimator(
        estimator,
        seed=seed,
        paths=paths,
        false_alarm=FALSE_ALARM,
        time_limit=None,
        on_fail="report",
    )
    unbiased = report.check("unbiased")
    return {
        "estimator": report.class_name if report.backend == "torch" else report.subject,
        "summary": report.summary,
        "seed": seed,
        "alarm": unbiased.status == "failed",
        "other": [
            check.name
            for check in report.checks
            if check.status == "failed" and check.name != "unbiased"
        ],
        "p_value": unbiased.details["p_value"],
        "power": unbiased.details["detectable_bias"],
        "cells": [row["p_value"] for row in report.rows if row["tested"]],
        "found": sum(r["p_value"] < r["significance"] for r in report.rows),
        "worst": unbiased.details["worst"][0],
    }


def _share(found: int, total: int) -> str:
    """Return a share in percent with its 95 % interval (Clopper and Pearson)."""
    low = float(beta.ppf(0.025, found, total - found + 1)) if found else 0.0
    high = float(beta.ppf(0.975, found + 1, total - found))
    return f"{100 * found / total:.2g} [{100 * low:.2g}, {100 * high:.2g}] %"


def _calibration(runs: list[dict[str, Any]]) -> str:
    frame = pd.DataFrame(runs)
    rows = []
    for name, mine in [*frame.groupby("estimator"), ("all", frame)]:
        cells = pd.Series([p for run in mine["cells"] for p in run])
        shares = {
            f"p < {level:g}": _share(int((cells < level).sum()), len(cells))
            for level in LEVELS
        }
        rows.append(
            {
                "estimator": name,
                "runs": len(mine),
                "false alarms": int(mine["alarm"].sum()),
                "other checks failed": int(mine["other"].map(bool).sum()),
                "cells": len(cells),
                **shares,
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _power(runs: list[dict[str, Any]]) -> str:
    rows = [
        {
            "mutant": run["estimator"],
            "caught": "yes" if run["alarm"] else "**no**",
            "p-value": f"{run['p_value']:.0e}",
            "in cells": f"{run['found']} of {len(run['cells'])}",
            "worst": run["worst"],
        }
        for run in runs
    ]
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def page(right: list[dict[str, Any]], wrong: list[dict[str, Any]], seeds: int) -> str:
    """Return the page."""
    origin = provenance()
    alarms = sum(run["alarm"] for run in right)
    caught = sum(run["alarm"] for run in wrong)
    return f"""\
# Validation, validated

`sdebench validate` at its default false-alarm rate, {100 * FALSE_ALARM:g} % for the \
whole bias test of an estimator.

## False alarms

{alarms} in {len(right)} runs: every built-in estimator with every variant, \
{seeds} seeds, {FEWER:g} times the default number of paths. Expected: at most \
{len(right) * FALSE_ALARM:.2g}. The p-values of the single cells should be below a \
level in at most that share of the cells (95 % intervals, as if the cells of different \
estimators were independent, which those of the same seed are not).

{_calibration(right)}

## Power

{caught} of {len(wrong)} estimators with one mistake each (`tests/_mutants.py`) are \
caught, with {MUTANT_PATHS:g} times the default number of paths and one seed each.

{_power(wrong)}

Made by `python -m bench.validation --seeds {seeds}`, sdebench \
{origin["sdebench_version"]}, commit {origin["commit"]}.
"""


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=10)
@click.option("--jobs", type=click.IntRange(min=1), default=joblib.cpu_count())
@click.option("--output", type=Path, default=ROOT / "results/validation/README.md")
def main(seeds: int, jobs: int, output: Path) -> None:
    """Measure the false alarms and the power of `sdebench validate`."""
    variants = [
        registry.estimator(name, **options).label
        for name in registry.estimator_names()
        for options in registry.estimator(name).variants
    ]
    first = 1000  # seeds that no test uses
    tasks = [(e, first + s, FEWER) for s in range(seeds) for e in variants]
    tasks += [(i, first, MUTANT_PATHS) for i in range(len(_mutants()))]
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator", batch_size=1)
    runs = []
    for run in parallel(joblib.delayed(validate)(*task) for task in tasks):
        runs.append(run)
        verdict = "alarm" if run["alarm"] else "no alarm"
        click.echo(
            f"{len(runs)}/{len(tasks)} {run['estimator']} seed {run['seed']}: "
            f"{verdict}, p = {run['p_value']:.2g}",
            err=True,
        )
    count = seeds * len(variants)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs[:count], runs[count:], seeds), "utf-8")
    click.echo(str(output))


if __name__ == "__main__":
    main()
