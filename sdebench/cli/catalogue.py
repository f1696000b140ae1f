"""Commands that describe the catalogue and its exact answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from sdebench.cli.options import COUNT, POINT, POINT_HELP, output
from sdebench.console import Vector, print_json, print_one, print_rows
from sdebench.errors import NotExactError, ParameterError


@click.command()
@click.argument("name", required=False)
@output
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


@click.command()
@click.argument("name", required=False)
@output
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


@click.command()
@click.argument("problem")
@click.option("--at", type=POINT, default="halfway", help=POINT_HELP)
@click.option("--steps", type=COUNT, help="Answers of the N-step discretization.")
@click.option("--x", type=Vector(), help="State as JSON: control and value there.")
@click.option("--t", type=float, help="Time of --x; default: the start.")
@output
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
            "cross_entropy_gradient": lambda: exact.cross_entropy_gradient(
                theta, n_steps=steps
            ),
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
