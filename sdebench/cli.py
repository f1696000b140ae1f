"""The command line: parse, call, print.

Nothing heavy is imported before a command needs it: ``sdebench --help`` loads neither
numpy nor torch, numba, pandas or matplotlib.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sdebench.errors import NotExactError, ParameterError, SDEBenchError

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("md", "latex", "csv", "html", "json")
EXIT_USER_ERROR = 2
EXIT_FAILED_CELLS = 1


def _remember_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.find_root().meta["debug"] = debug_wanted(context) or value


def debug_wanted(context: click.Context) -> bool:
    """Return whether tracebacks are wanted."""
    return bool(context.find_root().meta.get("debug", False))


_debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
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


# ---------------------------------------------------------------- printing


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


def _print_json(value: Any) -> None:
    """Print JSON; a number is the shortest text that reads back to the same bits."""
    click.echo(
        json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)
    )


def _text(value: Any, digits: int = 6) -> str:
    """Return a value for the eye."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if hasattr(value, "tolist"):
        return _text(value.tolist(), digits)
    if isinstance(value, list | tuple):
        text = ", ".join(_text(v, digits) for v in value)
        return text if value and isinstance(value[0], str) else f"[{text}]"
    if isinstance(value, set | frozenset):
        return ", ".join(sorted(map(str, value)))
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_text(v, digits)}" for k, v in value.items())
    return str(value)


def _print_rows(
    rows: list[dict[str, Any]],
    format: str | None,
    digits: int = 6,
    leave_out: Container[str] = (),
) -> None:
    """Print dictionaries with the same keys as a table.

    Without a format it is for the eye: a terminal is narrow, ``leave_out`` is not
    shown there.
    """
    if format == "json":
        _print_json(rows)
        return
    texts = [{k: _text(v, digits) for k, v in row.items()} for row in rows]
    if format is None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shown = [key for key in (rows[0] if rows else ()) if key not in leave_out]
        for i, key in enumerate(shown):
            table.add_column(key.replace("_", " "), overflow="fold", no_wrap=i == 0)
        for row in texts:
            table.add_row(*(row[key] for key in shown))
        Console(markup=False, highlight=False).print(table)
        return
    import pandas as pd

    exact = [{k: _text(v, 17) for k, v in row.items()} for row in rows]
    if format == "csv":
        click.echo(pd.DataFrame(exact).to_csv(index=False), nl=False)
    elif format == "html":
        click.echo(pd.DataFrame(texts).to_html(index=False))
    elif format == "latex":
        frame = pd.DataFrame(texts).style.format(escape="latex").hide(axis="index")
        click.echo(frame.to_latex(hrules=True), nl=False)
    else:
        click.echo(pd.DataFrame(texts).to_markdown(index=False, disable_numparse=True))


def _print_one(record: dict[str, Any], format: str | None) -> None:
    """Print one record: its keys run downwards unless it is JSON."""
    if format == "json":
        _print_json(record)
    else:
        pairs = [{"name": k.replace("_", " "), "value": v} for k, v in record.items()]
        _print_rows(pairs, format, digits=10)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        click.echo(text, nl=not text.endswith("\n"))
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text if text.endswith("\n") else f"{text}\n", "utf-8")
    except OSError as error:
        raise SDEBenchError(f"cannot write {output}: {error.strerror}") from error
    click.echo(str(output), err=True)


# ---------------------------------------------------------------- parameter types


class _Vector(click.ParamType):
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


class _Scaled(click.ParamType):
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


_POINT = _Vector(names=True)
_PERCENT = _Scaled("PERCENT", {"%": 0.01})
_DURATION = _Scaled("DURATION", {"s": 1.0, "m": 60.0, "h": 3600.0})
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
        _print_rows(
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
    _print_one(record, format)


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
        _print_rows(records, format, leave_out=("unbiased", "needs", "source"))
    else:
        _print_one(records[0], format)


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
@click.option("--x", type=_Vector(), help="State as JSON: control and value there.")
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

    JSON numbers read back to the same 64 bits.
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
        if state.shape[-1:] != (p.dim,):
            raise ParameterError(
                f"--x {json.dumps(x)} does not fit {p.name}; give {p.dim} numbers"
            )
        start, end = p.time_span
        time = start if t is None else t
        if not start <= time <= end:
            raise ParameterError(f"--t {time} is outside {start:g} … {end:g}")
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
        _print_json(record | {"error_bound": bounds, "not_exact": reasons})
        return
    for name, bound in bounds.items():
        if bound:
            record[f"error bound of {name}"] = bound
    for name, reason in reasons.items():
        record[name] = f"not exact: {reason}"
    _print_one(record, format)


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
        _print_json(found.row)
    elif format is not None:
        _print_rows([found.row], format)
    else:
        _print_measurement(found.row)


def _between(row: Mapping[str, Any], name: str) -> str:
    """Return a number with its interval."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    text = _text(row.get(name), 4)
    return text if low is None else f"{text}  [{_text(low, 4)}, {_text(high, 4)}]"


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
    _print_one(facts, None)
    heads = {"parameter_names": "parameter"}
    for name in ("truth", "mean", "std_error", "bias", "bias_low", "bias_high"):
        heads[name] = name.replace("_", " ")
    if all(row.get(name) is not None for name in heads):
        lines = zip(*(row[name] for name in heads), strict=True)
        table = [dict(zip(heads.values(), line, strict=True)) for line in lines]
        _print_rows(table, None)


def _figures(frame: pd.DataFrame, folder: Path) -> list[Path]:
    from sdebench.report.plot import figures

    return [Path(path) for path in figures(frame, folder)]


def _print_table(
    frame: pd.DataFrame, format: str | None, output: Path | None = None
) -> None:
    from sdebench.report.table import render

    kind = format or ("md" if output else "terminal")
    _write(render(frame, kind), output)


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
    _print_table(frame, format)
    if plot and (frame["status"] == "ok").any():
        for path in _figures(frame, folder / suite / "figures"):
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
@_output
def table(folder: Path, output: Path | None, format: str | None) -> None:
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
    _print_table(load(folder), format, output)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results"))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Folder of the figures; default: FOLDER/figures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON.")
@_debug
def plot(folder: Path, output: Path | None, as_json: bool) -> None:
    """Draw the figures of the results in FOLDER and print their paths."""
    from sdebench.store import load

    paths = [str(p) for p in _figures(load(folder), output or folder / "figures")]
    if as_json:
        _print_json(paths)
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
