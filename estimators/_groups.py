"""Advantages: rewards of paths relative to those of their group."""

from __future__ import annotations

from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array

LOG_PROBABILITIES = ("sum", "mean")
"""Of a step, over the coordinates of the state."""


def check_group(group: int) -> None:
    """Raise for a group that has nothing to compare."""
    if group < 2:
        raise ParameterError(
            f"group {group} would compare a path with itself; use at least 2 paths"
        )


def check_log_probability(log_probability: str) -> None:
    """Raise for an unknown ``log_probability`` option."""
    if log_probability not in LOG_PROBABILITIES:
        raise unknown("log_probability", log_probability, LOG_PROBABILITIES)


def advantages(values: Array, group: int, leave_one_out: bool) -> Array:
    """Return values (n,) minus the mean of their group of consecutive paths.

    ``leave_one_out`` : minus the mean of the others, G / (G - 1) times as much.
    """
    members = values.reshape(-1, group)
    factor = group / (group - 1) if leave_one_out else 1.0
    return (factor * (members - members.mean(axis=1, keepdims=True))).ravel()


def gradient_factor(
    group: int, leave_one_out: bool, log_probability: str, dim: int
) -> float:
    """Return E[estimate] over the gradient for plain `advantages` as weights.

    A group's mean that includes the path itself shrinks the gradient to 1 - 1/G, the
    mean log-probability to 1/d.
    """
    shrunk = 1.0 if leave_one_out else 1.0 - 1.0 / group
    return shrunk / (dim if log_probability == "mean" else 1)
