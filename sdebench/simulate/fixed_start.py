"""Numba primitives of X_0 for the families whose start law theta never moves."""

from __future__ import annotations

from sdebench.simulate.tile import glue


@glue
def has_start_parameters(prepared):  # type: ignore[no-untyped-def]
    """No."""
    return False


@glue
def start_cost_gradient(prepared, work, factor, OUT, B):  # type: ignore[no-untyped-def]
    """Nothing."""


@glue
def start_parameter_vjp(prepared, work, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """Nothing."""


@glue
def start_score(prepared, work, X, C, OUT, row, B):  # type: ignore[no-untyped-def]
    """Nothing."""


@glue
def start_log_ratio_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """Nothing."""
