"""Checks of what a problem's functions return: types, shapes, finite values, inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sdebench.errors import ValidationError
from sdebench.problem import ESTIMANDS, Problem
from sdebench.validate.problem_checks import Array, Comparison, closest, require

BATCH = 5
Function = Callable[[Array, float], Any]


def missing_metadata(problem: Problem) -> list[str]:
    """Return the names of the descriptions that are empty."""
    names = ("source", "hardness", "formula", "summary")
    return [name for name in names if not str(getattr(problem, name) or "").strip()]


def check_settings(problem: Problem) -> Comparison:
    """The time span, the numbers of steps and parameters, theta*, and every variant."""
    start, end = problem.time_span
    _demand(
        np.isfinite([start, end]).all() and start < end,
        f"time_span is ({start:g}, {end:g}); give finite times, the start first",
    )
    _demand(
        type(problem.default_steps) is int and problem.default_steps > 0,
        f"default_steps is {problem.default_steps!r}; give a positive whole number",
    )
    star, names = problem.theta_star, problem.parameter_names
    _demand(
        star.shape == (len(names),) and bool(np.isfinite(star).all()),
        f"theta_star has shape {star.shape}; give one finite number for each of "
        f"{len(names)} parameters ({', '.join(names)})",
    )
    _demand(
        len(set(names)) == len(names) > 0,
        f"parameter_names are {names}; give at least one name, each once",
    )
    for variant in problem.variants:
        type(problem)(**variant)
    grid = problem.time_grid(3)
    gap = np.abs(grid[[0, -1]] - (start, end)) / (end - start)
    return require(gap, 1e-12, "ends of the time grid")


def check_function(problem: Problem, name: str) -> Comparison:
    """One function of the state, in all the ways in which it is called.

    Float64 of the right shape for x (d,), (n, d) and (m, n, d), finite, the same when
    called again, row by row the same as alone; its input stays as it is.
    """
    function, per_state = _functions(problem)[name]
    d, (start, end) = problem.dim, problem.time_span
    rng = np.random.default_rng(17)
    batch = rng.normal(size=(BATCH, d))
    found = []
    for t in (start, 0.5 * (start + end), end - 1e-3 * (end - start)):
        for x in (batch[0], batch, batch[:4].reshape(2, 2, d)):
            wanted = x.shape if per_state else x.shape[:-1]
            value = _call(function, name, x, t, wanted)
            again = _call(function, name, x, t, wanted)
            _demand(
                np.array_equal(value, again),
                f"{name} gave two answers to the same question: draw no random "
                "numbers and keep no state in it",
            )
            rows = np.array([function(row, t) for row in x.reshape(-1, d)])
            error = np.abs(value - rows.reshape(value.shape))
            scale = 1.0 + np.abs(value).max()
            what = "batch against single states"
            found.append(require(error / scale, 1e-12, what))
    return closest(found)


def _functions(problem: Problem) -> dict[str, tuple[Function, bool]]:
    """Return each function of (x, t), and whether it returns a vector per state."""
    truth = problem.truth
    return {
        "drift": (problem.drift, True),
        "running_cost": (problem.running_cost, False),
        "reward": (lambda x, t: problem.reward(x), False),
        "control": (truth.control, True),
        "value": (truth.value, False),
        "policy": (lambda x, t: truth.policy(x, t, "halfway"), True),
    }


FUNCTIONS = ("drift", "running_cost", "reward", "control", "value", "policy")


def _call(
    function: Function, name: str, x: Array, t: float, wanted: tuple[int, ...]
) -> Array:
    """Return the value at x, checked."""
    given = x.copy()
    value = function(given, t)
    _demand(
        np.array_equal(given, x),
        f"{name} writes into its input x: work on a copy, x = x.copy()",
    )
    return _checked(value, f"{name} for x of shape {x.shape}, t = {t:g},", wanted)


def _checked(value: Any, what: str, wanted: tuple[int, ...]) -> Array:
    """Return a value that is a finite float64 array of this shape, or raise."""
    _demand(
        isinstance(value, np.ndarray | np.floating),
        f"{what} returns {type(value).__name__}; return a numpy array",
    )
    _demand(
        value.dtype == np.float64,
        f"{what} returns {value.dtype}; return float64",
    )
    _demand(
        value.shape == wanted,
        f"{what} returns shape {value.shape}; return {wanted}",
    )
    bad = int(np.sum(~np.isfinite(value)))
    _demand(
        bad == 0,
        f"{what} returns NaN or infinity in {bad} of {value.size} numbers",
    )
    return np.asarray(value)


def _demand(condition: Any, message: str) -> None:
    if not condition:
        raise ValidationError(message)


def check_diffusion(problem: Problem) -> Comparison:
    """sigma(t) is a finite (d, d) matrix, the same when asked again, and not zero."""
    start, end = problem.time_span
    size = []
    for t in (start, 0.5 * (start + end), end - 1e-3 * (end - start)):
        what, shape = f"diffusion at t = {t:g}", (problem.dim, problem.dim)
        sigma = _checked(problem.diffusion(t), what, shape)
        again = problem.diffusion(t)
        states = np.random.default_rng(19).normal(size=(BATCH, problem.dim))
        wide = problem.diffusion_at(states, t)
        _checked(np.array(wide), f"diffusion_at for t = {t:g}", (BATCH, *shape))
        size.append(np.max(np.abs(sigma - again)) / (1.0 + np.max(np.abs(sigma))))
        _demand(np.any(sigma), f"{what} is zero: nothing could be controlled")
    return require(size, 0.0, "diffusion asked twice")


def check_answers(problem: Problem) -> Comparison:
    """Shapes and error bounds of the answers, and Jensen's inequality."""
    truth = problem.truth
    for estimand in ESTIMANDS:
        size = 1 if estimand == "log_normalizer" else problem.n_params
        for n_steps in (None, 7):
            answer = truth.answer(estimand, "halfway", n_steps)
            if answer is not None:
                _checked(answer, f"truth.answer({estimand!r})", (size,))
    quantities = ("gradient", "objective", "log_normalizer", "control_error")
    bounds = [truth.error_bound(name, "halfway") for name in quantities]
    scale = 1.0 + abs(truth.log_normalizer())
    gap = -(truth.optimal_cost() + truth.log_normalizer()) / scale
    return closest(
        [
            require(np.abs(bounds), truth.precision, "error bounds of the answers"),
            require(max(gap, 0.0), 1e-12, "-log Z - J(u*), at most 0"),
        ]
    )
