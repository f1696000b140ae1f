"""The command line: parse, call, print.

Nothing heavy is imported before a command needs it: ``sdebench --help`` loads neither
numpy nor torch, numba, pandas or matplotlib.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sdebench.console import (
    Scaled,
    Vector,
    print_json,
    print_one,
    print_rows,
    text_of,
    write_text,
)
from sdebench.errors import NotExactError, ParameterError, SDEBenchError

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("md", "latex", "csv", "html", "json")
EXIT_USER_ERROR = 2
EXIT_FAILED_CELLS = 1


# Taken anywhere on the line; `main` looks for it among the arguments.
_debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    help="Show the traceback of an error.",
)


def _output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--format`` and its short form ``--json``."""
    choice = click.Choice(FORMATS)
    add_format = click.option("--format", type=choice, help="Print data in this form.")
    add_json = click.option(
        "--json", "format", flag_value="json", help="The same as --format json."
    )
    return _debug(add_format(add_json(command)))


_HEADLINE = click.option(
    "--headline",
    is_flag=True,
    help="Only the cells with every setting at its default, at halfway.",
)
_POINT = Vector(names=True)
_PERCENT = Scaled("PERCENT", {"%": 0.01})
_DURATION = Scaled("DURATION", {"s": 1.0, "m": 60.0, "h": 3600.0})
_COUNT = click.IntRange(min=1)
_SEED = click.IntRange(0, 2**64 - 1)
_POINT_HELP = "zero, halfway, optimum, overshoot, or theta as JSON."


# ---------------------------------------------------------------- commands


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "--version", package_name="sdebench")
@_debug
def cli() -> None:
    r"""Bias, variance and cost of gradient estimators, against exact answers.

    \b
    sdebench run                              measure everything, quickly
    sdebench measure ou_linear pathwise       one estimator on one problem
    sdebench truth two_modes:beta=0.1         the exact answers
    """


@cli.command()
@click.argument("name", required=False)
@_output
def problems(name: str | None, format: str | None) -> None:
    """List the problems, or describe one (NAME or NAME:parameter=value)."""
    from sdebench import registry

    if name is None:
        every = [registry.problem(n) for n in registry.problem_names()]
        print_rows(
            [
                {
                    "problem": p.name,
                    "dim": p.dim,
                    "n_params": p.n_params,
                    "default_steps": p.default_steps,
                    "hardness": p.hardness,
                    "source": p.source,
                }
                for p in every
            ],
            format,
            leave_out=("source",),
        )
        return
    p = registry.problem(name)
    record = {
        "problem": p.name,
        "summary": p.summary,
        "hardness": p.hardness,
        "source": p.source,
        "parameters": p.parameters,
        "dim": p.dim,
        "n_params": p.n_params,
        "parameter_names": p.parameter_names,
        "default_steps": p.default_steps,
        "points": {point: list(theta) for point, theta in p.points.items()},
        "variants": list(p.variants),
    }
    if format != "json":
        del record["variants"], record["points"]
        record |= {f"theta at {point}": theta for point, theta in p.points.items()}
    print_one(record, format)


@cli.command()
@click.argument("name", required=False)
@_output
def estimators(name: str | None, format: str | None) -> None:
    """List the estimators, or describe one (NAME or NAME:option=value)."""
    from sdebench import registry

    names = registry.estimator_names() if name is None else [name]
    records = []
    for e in map(registry.estimator, names):
        record = {
            "estimator": e.name,
            "estimand": e.estimand,
            "summary": e.summary,
            "unbiased": e.unbiased,
            "needs": sorted(e.needs),
            "source": e.source,
        }
        records.append(record if name is None else {**record, "options": e.options})
    if name is None:
        print_rows(records, format, leave_out=("unbiased", "needs", "source"))
    else:
        print_one(records[0], format)


def _answers(
    quantities: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the exact answers, and the reasons for those that do not exist."""
    found: dict[str, Any] = {}
    reasons = {}
    for name, quantity in quantities.items():
        try:
            found[name] = quantity()
        except NotExactError as error:
            found[name] = None
            reasons[name] = str(error)
    return found, reasons


@cli.command()
@click.argument("problem")
@click.option("--at", type=_POINT, default="halfway", help=_POINT_HELP)
@click.option("--steps", type=_COUNT, help="Answers of the N-step discretization.")
@click.option("--x", type=Vector(), help="State as JSON: control and value there.")
@click.option("--t", type=float, help="Time of --x; default: the start.")
@_output
def truth(
    problem: str,
    at: Any,
    steps: int | None,
    x: list[Any] | None,
    t: float | None,
    format: str | None,
) -> None:
    """Print the exact answers of PROBLEM: log Z, objective, gradients, control.

    The control errors are the distances (E int |u_theta - u|^2 dt)^(1/2) from the
    optimum u* and from the optimum of the N-step chain.  JSON numbers read back to
    the same 64 bits.
    """
    import numpy as np

    from sdebench import registry

    p = registry.problem(problem)
    theta = p.theta(at)
    exact = p.truth
    record: dict[str, Any] = {
        "problem": p.name,
        "problem_parameters": p.parameters,
        "point": at if isinstance(at, str) else None,
        "theta": theta,
        "parameter_names": p.parameter_names,
        "n_steps": steps,
    }
    found, reasons = _answers(
        {
            "log_normalizer": lambda: float(exact.log_normalizer(n_steps=steps)),
            "objective": lambda: float(exact.objective(theta, n_steps=steps)),
            "gradient": lambda: exact.gradient(theta, n_steps=steps),
            "matching_gradient": lambda: exact.matching_gradient(theta, n_steps=steps),
            "optimal_cost": lambda: float(exact.optimal_cost(n_steps=steps)),
            "control_error": lambda: float(exact.control_error(theta)),
            "control_error_discrete": lambda: float(
                exact.control_error(theta, n_steps=steps or p.default_steps)
            ),
        }
    )
    bounds = {
        name: float(exact.error_bound(name, theta))
        for name, value in found.items()
        if value is not None
    }
    if t is not None and x is None:
        raise ParameterError(
            f"--t {t} has no state; give --x too, {p.dim} numbers as JSON"
        )
    if x is not None:
        state = np.asarray(x, dtype=float)
        time = p.time_span[0] if t is None else t
        here, why = _answers(
            {
                "control": lambda: exact.control(state, time),
                "value": lambda: exact.value(state, time),
            }
        )
        found |= {"x": state, "t": time, **here}
        reasons |= why
    record |= found
    if format == "json":
        print_json(record | {"error_bound": bounds, "not_exact": reasons})
        return
    for name, bound in bounds.items():
        if bound:
            record[f"error bound of {name}"] = bound
    for name, reason in reasons.items():
        record[name] = f"not exact: {reason}"
    print_one(record, format)


@cli.command()
@click.argument("problem")
@click.argument("estimator")
@click.option("--point", "--at", type=_POINT, default="halfway", help=_POINT_HELP)
@click.option("--steps", type=_COUNT, help="Time steps; default: the problem's.")
@click.option("--paths", type=_COUNT, help="Paths of one replicate.")
@click.option("--replicates", type=click.IntRange(min=2), help="Replicates.")
@click.option("--backend", type=click.Choice(["numba", "torch"]), default="numba")
@click.option("--dtype", type=click.Choice(["float64", "float32"]), default="float64")
@click.option("--device", default="cpu", help="For torch: cpu, cuda.")
@click.option("--scheme", default="euler_maruyama", help="Time-stepping scheme.")
@click.option("--seed", type=_SEED, default=0)
@click.option("--threads", type=_COUNT, default=1)
@click.option(
    "--target",
    type=_PERCENT,
    help="Go on until the bias interval is this small, e.g. 1% of the truth.",
)
@click.option("--budget", type=_DURATION, help="Stop after this time, e.g. 60s.")
@_output
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


def _figures(
    frame: pd.DataFrame, folder: Path, formats: tuple[str, ...] = ()
) -> list[Path]:
    from sdebench.report.plot import FORMATS, figures

    return [Path(path) for path in figures(frame, folder, formats or FORMATS)]


def _print_table(
    frame: pd.DataFrame,
    format: str | None,
    output: Path | None = None,
    columns: tuple[str, ...] | None = None,
) -> None:
    from sdebench.report.table import render

    kind = format or ("md" if output else "terminal")
    write_text(render(frame, kind, columns), output)


def _headline(frame: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...] | None]:
    """Return the rows and columns of a first look, or everything if there are none."""
    from sdebench.report.selection import HEADLINE_COLUMNS, headline

    chosen = headline(frame)
    return (chosen, HEADLINE_COLUMNS) if len(chosen) else (frame, None)


@cli.command()
@click.argument("suite", default="quick")
@click.option("--jobs", "-j", type=_COUNT, help="Worker processes; default: all cores.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option("--seed", type=_SEED, default=0)
@click.option("--problem", multiple=True, metavar="GLOB", help="Only these problems.")
@click.option(
    "--estimator", multiple=True, metavar="GLOB", help="Only these estimators."
)
@click.option("--fresh", is_flag=True, help="Discard finished cells first.")
@click.option("--plot/--no-plot", default=True, help="Draw the figures at the end.")
@click.option("--quiet", "-q", is_flag=True, help="No progress.")
@_output
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
    """Run SUITE (quick or full), resuming what is there; print table and figures."""
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
        shown, columns = _headline(frame)
        _print_table(shown, None, columns=columns)
        if len(shown) < len(frame):
            click.echo(
                f"{len(shown)} of {len(frame)} cells: every setting at its default; "
                f"all of them: sdebench table {folder / suite}"
            )
    else:
        _print_table(frame, format)
    if plot and (frame["status"] == "ok").any():
        for path in _figures(frame, folder / suite / "figures", ("png",)):
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


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Write to a file."
)
@_HEADLINE
@_output
def table(
    folder: Path, output: Path | None, headline: bool, format: str | None
) -> None:
    """Print the table of the results in FOLDER."""
    from sdebench.store import load

    if format is None and output is not None:
        endings = {".tex": "latex", ".htm": "html"}
        suffix = output.suffix.lower()
        format = endings.get(suffix, suffix.removeprefix("."))
        if format not in FORMATS:
            raise ParameterError(
                f"--output {output} does not tell the format; add --format "
                f"{'|'.join(FORMATS)}"
            )
    frame = load(folder)
    shown, columns = _headline(frame) if headline else (frame, None)
    _print_table(shown, format, output, columns)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder of the figures; default: FOLDER/figures.",
)
@_HEADLINE
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(("png", "svg", "pdf")),
    help="File formats; default: all three.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON.")
@_debug
def plot(
    folder: Path,
    output: Path | None,
    headline: bool,
    formats: tuple[str, ...],
    as_json: bool,
) -> None:
    """Draw the figures of the results in FOLDER and print their paths."""
    from sdebench.store import load

    frame = load(folder)
    shown = _headline(frame)[0] if headline else frame
    paths = [str(p) for p in _figures(shown, output or folder / "figures", formats)]
    if as_json:
        print_json(paths)
    else:
        click.echo("\n".join(paths))


# ---------------------------------------------------------------- entry point


def report_interrupt(error: KeyboardInterrupt) -> int:
    """Say how to resume; return the exit code, 128 + the number of the signal."""
    run_module = sys.modules.get("sdebench.run")
    stopped = run_module is not None and isinstance(error, run_module.Terminated)
    click.echo(
        f"\n{'terminated' if stopped else 'interrupted'}: finished cells are kept; "
        "run the same command again to do the rest",
        err=True,
    )
    return 143 if stopped else 130


def _fail(error: BaseException) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    click.echo(f"sdebench: {text}", err=True)
    return EXIT_USER_ERROR


def main(arguments: Iterable[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 1 for failed cells, 2 for a user's error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(given, prog_name="sdebench", standalone_mode=False)
        sys.stdout.flush()
    except SDEBenchError as error:
        if "--debug" in given:
            raise
        code = _fail(error)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        if "--debug" in given:
            raise
        interrupt = error.__context__ if isinstance(error, click.Abort) else error
        if not isinstance(interrupt, KeyboardInterrupt):
            interrupt = KeyboardInterrupt()
        code = report_interrupt(interrupt)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
