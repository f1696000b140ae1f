"""Commands that measure: one cell, or a suite of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sdebench.cli.options import (
    COUNT,
    DURATION,
    PERCENT,
    POINT,
    POINT_HELP,
    SEED,
    output,
)
from sdebench.cli.results import draw_figures, print_table, shorten
from sdebench.console import print_json, print_one, print_rows, text_of

EXIT_FAILED_CELLS = 1


@click.command()
@click.argument("problem")
@click.argument("estimator")
@click.option("--point", "--at", type=POINT, default="halfway", help=POINT_HELP)
@click.option("--steps", type=COUNT, help="Time steps; default: the problem's.")
@click.option("--paths", type=COUNT, help="Paths of one replicate.")
@click.option("--replicates", type=click.IntRange(min=2), help="Replicates.")
@click.option(
    "--backend",
    type=click.Choice(["numba", "torch"]),
    help="Default: numba, where the problem has it.",
)
@click.option("--dtype", type=click.Choice(["float64", "float32"]), default="float64")
@click.option("--device", default="cpu", help="For torch: cpu, cuda.")
@click.option("--scheme", default="euler_maruyama", help="Time-stepping scheme.")
@click.option("--seed", type=SEED, default=0)
@click.option("--threads", type=COUNT, default=1)
@click.option(
    "--target",
    type=PERCENT,
    help="Go on until the bias interval is this small, e.g. 1% of the truth.",
)
@click.option("--budget", type=DURATION, help="Stop after this time, e.g. 60s.")
@output
def measure(
    problem: str,
    estimator: str,
    point: Any,
    steps: int | None,
    paths: int | None,
    replicates: int | None,
    format: str | None,
    **settings: Any,
) -> None:
    """Measure bias, variance and cost of ESTIMATOR on PROBLEM.

    Both take parameters: ou_quadratic_easy:dim=50, reinforce:baseline=mean.
    """
    from sdebench import registry
    from sdebench.measure import measure as measure_one

    given = {"n_steps": steps, "n_paths": paths, "n_replicates": replicates}
    settings |= {name: value for name, value in given.items() if value is not None}
    terminal = sys.stderr.isatty()

    def progress(done: int, planned: int) -> None:
        if terminal:
            click.echo(f"\r{done}/{planned} replicates ", nl=False, err=True)

    found = measure_one(
        registry.problem(problem),
        registry.estimator(estimator),
        point=point,
        progress=progress,
        **settings,
    )
    if terminal:
        click.echo("\r\x1b[K", nl=False, err=True)
    if format == "json":
        print_json(found.row)
    elif format is not None:
        print_rows([found.row], format)
    else:
        _print_measurement(found.row)


def _between(row: Mapping[str, Any], name: str) -> str:
    """Return a number with its interval."""
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    text = "–" if value is None or value != value else text_of(value, 4)
    if text == "–":
        return text
    return text if low is None else f"{text}  [{text_of(low, 4)}, {text_of(high, 4)}]"


def _print_measurement(row: Mapping[str, Any]) -> None:
    """Print a measurement for the eye: the verdict, then what it rests on."""
    click.echo(
        f"{row['estimator']} on {row['problem']} at {row['point']}: "
        f"{row.get('verdict') or row['status']}"
    )
    if row.get("reason"):
        click.echo(str(row["reason"]))
    if row["status"] != "ok":
        return
    facts = {
        "estimand": row["estimand"],
        "sample": f"{row['n_replicates']} replicates of {row['n_paths']} paths, "
        f"{row['n_steps']} steps, {row['backend']} {row['dtype']}, seed {row['seed']}",
        "relative bias": _between(row, "relative_bias"),
        "of the estimator itself": _between(row, "relative_bias_own"),
        "variance per path": _between(row, "variance"),
        "tail index": _between(row, "tail_index"),
        "ns per path and step": row["ns_per_path_step"],
        "drift evaluations per path": row["drift_evaluations"],
        "seconds": row["seconds"],
    }
    print_one(facts, None, digits=4)
    click.echo()
    heads = {"parameter_names": "parameter"}
    for name in ("truth", "mean", "std_error", "bias", "bias_low", "bias_high"):
        heads[name] = name.replace("_", " ")
    if all(row.get(name) is not None for name in heads):
        lines = zip(*(row[name] for name in heads), strict=True)
        table = [dict(zip(heads.values(), line, strict=True)) for line in lines]
        print_rows(table, None, digits=4)


@click.command()
@click.argument("suite", default="quick")
@click.option("--jobs", "-j", type=COUNT, help="Worker processes; default: all cores.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option("--seed", type=SEED, default=0)
@click.option("--problem", multiple=True, metavar="GLOB", help="Only these problems.")
@click.option(
    "--estimator", multiple=True, metavar="GLOB", help="Only these estimators."
)
@click.option("--fresh", is_flag=True, help="Discard finished cells first.")
@click.option("--plot/--no-plot", default=True, help="Draw the figures at the end.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@output
def run(
    suite: str,
    jobs: int | None,
    folder: Path,
    seed: int,
    problem: tuple[str, ...],
    estimator: tuple[str, ...],
    fresh: bool,
    plot: bool,
    quiet: bool,
    format: str | None,
) -> None:
    """Run SUITE (quick, gradients or full), resuming; print table and figures."""
    # The workers get the same; here it counts for --jobs 1, before numpy is loaded.
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    from sdebench.run import run as run_suite

    frame = run_suite(
        suite,
        jobs=jobs,
        folder=folder,
        seed=seed,
        problems=problem or None,
        estimators=estimator or None,
        progress=not quiet,
        resume=not fresh,
    )
    if format is None:
        shown, columns = shorten(frame)
        print_table(shown, None, columns=columns)
        if len(shown) < len(frame):
            click.echo(
                f"{len(shown)} of {len(frame)} cells: every setting at its default; "
                f"all of them: sdebench table {folder / suite}"
            )
    else:
        print_table(frame, format)
    if plot and (frame["status"] == "ok").any():
        drawn = folder / suite / "figures"
        paths = draw_figures(frame, drawn, ("png",))
        # A figure that is a file per problem is named once, by its folder.
        for path in dict.fromkeys(drawn / p.relative_to(drawn).parts[0] for p in paths):
            click.echo(str(path), err=format is not None)
    failed = frame[frame["status"] == "failed"]
    if len(failed):
        first = failed.iloc[0]
        click.echo(
            f"{len(failed)} of {len(frame)} cells failed, the first: "
            f"{first['problem']} × {first['estimator']}: {first['reason']}; "
            "run the same command again to retry them",
            err=True,
        )
        raise click.exceptions.Exit(EXIT_FAILED_CELLS)
