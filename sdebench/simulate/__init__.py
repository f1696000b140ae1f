"""Simulation: time steps, counter-based noise, process families in numba and torch."""

from __future__ import annotations

from typing import Any

from sdebench.callable_module import make_callable


def simulate(*arguments: Any, **options: Any) -> Any:
    """Simulate a problem's paths; see `sdebench.simulate.paths.simulate`."""
    # Lazy: the noise and the tables are imported without the problem classes.
    from sdebench.simulate.paths import simulate as simulate_paths

    return simulate_paths(*arguments, **options)


make_callable(__name__, simulate)
