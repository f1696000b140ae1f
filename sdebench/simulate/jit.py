"""Decorators for numba kernels whose file cache really hits, and is never stale.

numba's file cache looks only at the file that defines a function: an edit of a helper
in another file would go unnoticed.  Here the cache folder is named by a hash of every
file that holds kernel code, so any edit starts a fresh cache.  Only this package's
functions are affected: numba's setting is restored after each decoration.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import platformdirs
from numba.core import config as numba_config

config: Any = numba_config

OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}
CONTRACT = {"contract"}
"""Fused multiply-add allowed: results differ by ~1e-15 between processors."""


@cache
def cache_directory() -> Path:
    """Return the folder of compiled kernels for exactly this kernel source.

    ``NUMBA_CACHE_DIR``, if set, replaces the user's cache folder as its parent.
    """
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha1(numba.__version__.encode(), usedforsecurity=False)
    for room in ("simulate", "estimators", "measure"):
        for file in sorted((package / room).glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    parent = os.environ.get("NUMBA_CACHE_DIR")
    root = Path(parent) if parent else platformdirs.user_cache_path("sdebench")
    return root / f"sdebench-kernels-{digest.hexdigest()[:16]}"


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile an entry point: nogil, cached on disk, called from Python.

    Takes the options of ``numba.njit``.  Write explicit loops: a slice assignment or
    array expression costs seconds of compile time.
    """
    if function is None:
        return lambda f: kernel(f, **options)
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_directory())
    try:
        return numba.njit(**{**OPTIONS, "cache": True, **options})(function)
    finally:
        config.CACHE_DIR = before


def inner(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a helper that only kernels call: no cache entry of its own."""
    if function is None:
        return lambda f: inner(f, **options)
    return numba.njit(**{**OPTIONS, **options})(function)


def inline(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile a helper into its callers (elementary functions in hot loops)."""
    return inner(function, forceinline=True, **options)
