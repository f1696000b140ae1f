"""Start-up in fresh processes: import, and first kernel call cold and cached."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass

IMPORT = """
import time
begin = time.process_time()
import sdebench
print(time.process_time() - begin)
"""

FIRST_CALLS = """
import json, time
import numba
import sdebench
from sdebench.measure.engine import NumbaWorker, Settings

numba.njit(lambda x: x + 1)(1)  # numba's own first-use costs are not ours
seconds = {}
for name, problem, estimators in (
    ("linear", "ou_linear", []),
    ("mixture", "four_modes", []),
    ("pathwise", "ou_linear", ["pathwise"]),
):
    problem = sdebench.problem(problem)
    theta, times = problem.theta("halfway"), problem.time_grid(8)
    settings = Settings(times=times, theta=theta, n_paths=256, backend="numba",
                        dtype="float64", device="cpu", seed=0)
    tables = problem.tables(theta, times)
    chosen = [sdebench.estimator(e) for e in estimators]
    worker = NumbaWorker(tables, chosen, settings)
    begin = time.process_time()
    worker.block(0, 0, worker.size)
    seconds[name] = time.process_time() - begin
print(json.dumps(seconds))
"""


@dataclass(frozen=True)
class Startup:
    """CPU seconds; the calls by name: linear, mixture (forward), pathwise."""

    import_seconds: float
    cold: dict[str, float]
    cached: dict[str, float]


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        tail = done.stderr[-200:]
        raise RuntimeError(f"start-up ended with {done.returncode}: {tail}")
    return done.stdout


def measure_startup(repeats: int = 5) -> Startup:
    """Measure start-up with an empty kernel cache, then with the one it left."""
    imports = [float(_python(IMPORT)) for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as folder:
        cold = json.loads(_python(FIRST_CALLS, NUMBA_CACHE_DIR=folder))
        again = [
            json.loads(_python(FIRST_CALLS, NUMBA_CACHE_DIR=folder)) for _ in range(3)
        ]
    return Startup(
        statistics.median(imports),
        cold,
        {name: statistics.median(run[name] for run in again) for name in cold},
    )
