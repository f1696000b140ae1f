"""CPU time of interleaved repeats, so that a busy machine disturbs all cases alike."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass(frozen=True)
class Timing:
    """Seconds of CPU time per call over repeats."""

    median: float
    best: float


def use_one_core(core: int | None) -> bool:
    """Restrict this process to one thread and one core; tell whether it is pinned.

    Call before numpy or torch are imported: they read the number of threads once.
    """
    for name in ONE_THREAD:
        os.environ[name] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if core is None or not hasattr(os, "sched_setaffinity"):
        return False
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[core % len(allowed)]})
    return True


def _spent(function: Callable[[], Any]) -> float:
    begin = time.process_time()
    function()
    return max(time.process_time() - begin, 1e-7)


def interleave(
    cases: Mapping[str, Callable[[], Any]],
    repeats: int,
    least: float = 0.05,
) -> dict[str, Timing]:
    """Return the CPU time of one call of each case.

    Parameters
    ----------
    cases : functions by name; each is called once before the clock starts.
    repeats : rounds; every round runs all cases once.
    least : seconds per sample; short cases are called several times.
    """
    calls: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for name, function in cases.items():
        spent = _spent(function)
        if spent < 100 * least:
            # the first call may have compiled: look again
            spent = _spent(function)
        calls[name] = max(1, round(least / spent))
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, function in cases.items():
                begin = time.process_time()
                for _ in range(calls[name]):
                    function()
                samples[name].append((time.process_time() - begin) / calls[name])
    finally:
        gc.enable()
    return {n: Timing(statistics.median(s), min(s)) for n, s in samples.items()}
