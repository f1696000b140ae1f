"""Numba primitives of the families whose noise does not depend on the state."""

from __future__ import annotations

from sdebench.simulate.tile import glue


@glue
def noise_vjp(prepared, work, n, X, W, Z, V, OUT, B):  # type: ignore[no-untyped-def]
    """Nothing."""
