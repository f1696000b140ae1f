"""Which cells a suite holds: discovered from the catalogue, never listed by hand.

A cell is the unit of work, of storage and of resuming.  Every problem and estimator
may declare a ``variants`` attribute, a list of parameter sets; each set is one entry
of the suites, and the default is the published setting alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sdebench.errors import ParameterError, SDEBenchError, unknown

if TYPE_CHECKING:
    from sdebench.problem import Problem

# The size of the quick suite.
QUICK_POINTS = ("halfway", "optimum")
QUICK_PATHS = 256
QUICK_REPLICATES = 128
QUICK_WORK, LEAST_REPLICATES = 10**8, 16
"""States' coordinates that a quick cell simulates, and the replicates it has anyway."""
QUICK_TORCH_REPLICATES = 16  # 256 paths are few for torch: its overhead decides
QUICK_LADDER = (0.25, 0.5, 1.0, 2.0)

GRADIENT_POINTS = ("zero", "halfway", "optimum")
GRADIENT_REPLICATES = 64

FULL_POINTS = ("zero", "halfway", "optimum", "overshoot")
FULL_PATHS = 1024
FULL_REPLICATES = 256
FULL_LADDER = (0.25, 0.5, 1.0, 2.0, 4.0)


def canonical(value: Any) -> str:
    """Return JSON text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Cell:
    """One measurement: a problem, an estimator and the settings of both.

    ``problem`` and ``estimator`` are specifications such as ``"two_modes:beta=0.1"``;
    ``n_paths`` is the number of paths of one replicate.
    """

    problem: str
    estimator: str
    point: str
    n_steps: int
    n_paths: int
    n_replicates: int
    backend: str = "numba"
    dtype: str = "float64"
    scheme: str = "euler_maruyama"
    seed: int = 0
    device: str = "cpu"

    @cached_property
    def key(self) -> str:
        """Return the name of the cell's file: a digest of everything that defines it.

        The same in every process and on every machine.
        """
        text = canonical(asdict(self)).encode()
        return hashlib.sha1(text, usedforsecurity=False).hexdigest()

    @cached_property
    def group(self) -> tuple[str | int, ...]:
        """Return all but the estimator: cells that share the simulated paths."""
        values = asdict(self)
        del values["estimator"]
        return tuple(values.values())

    @property
    def work(self) -> int:
        """Return the number of path-steps, the unit of the time left."""
        return self.n_steps * self.n_paths * self.n_replicates

    @property
    def names(self) -> tuple[str, str]:
        """Return the names of problem and estimator, without parameters."""
        return self.problem.partition(":")[0], self.estimator.partition(":")[0]

    def __str__(self) -> str:
        """Return what a progress line says."""
        return (
            f"{self.problem} × {self.estimator} at {self.point}, {self.n_steps} steps, "
            f"{self.backend} {self.dtype}"
        )


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells in groups that share their simulated paths, longest first.

    torch groups lead: importing torch takes seconds, better spent while others run.
    """
    found: dict[tuple[str | int, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.group, []).append(cell)
    return sorted(
        found.values(),
        key=lambda g: (g[0].backend != "torch", -sum(c.work for c in g)),
    )


def _entries(kind: str) -> Iterator[tuple[str, Any]]:
    """Yield (specification, object) for every variant of everything of a kind."""
    from sdebench import registry

    names = getattr(registry, f"{kind}_names")()
    build: Callable[..., Any] = getattr(registry, kind)
    for name in names:
        try:
            default = build(name)
        except SDEBenchError:
            raise
        except Exception as error:  # a new file with a mistake in it
            raise SDEBenchError(
                f"{kind} {name} cannot be loaded: {type(error).__name__}: {error}; "
                "see --debug"
            ) from error
        for values in getattr(default, "variants", None) or [{}]:
            spec = registry.label(name, dict(sorted(values.items())), {})
            yield spec, build(spec) if values else default


def _family(problem: Problem) -> tuple[str, bool]:
    """Return what the simulation knows of the problem: its kind of tables and noise."""
    from sdebench.simulate.tables import noise_depends_on_state

    tables = problem.tables(None, problem.time_grid(1))
    return type(tables).__name__, noise_depends_on_state(tables)


def _ladder(n_steps: int, factors: Sequence[float]) -> list[int]:
    return sorted({max(1, round(n_steps * factor)) for factor in factors})


def _is_default(spec: str, thing: Any) -> bool:
    """Return whether a variant of an estimator has all options at their defaults."""
    from sdebench import registry

    return bool(thing == registry.estimator(spec.partition(":")[0]))


def _affordable(n_steps: int, effort: int) -> int:
    """Return the replicates of the quick suite that `QUICK_WORK` allows."""
    return max(LEAST_REPLICATES, QUICK_WORK // (n_steps * effort * QUICK_PATHS))


def _quick(seed: int) -> Iterator[Cell]:
    entries = list(_entries("estimator"))
    every = [spec for spec, _ in entries]
    defaults = [spec for spec, thing in entries if _is_default(spec, thing)]
    families: set[tuple[str, bool]] = set()
    names: set[str] = set()
    for spec, problem in _entries("problem"):
        n_steps = problem.default_steps
        name = spec.partition(":")[0]
        new_name = name not in names
        names.add(name)
        new_family = _family(problem) not in families
        families.add(_family(problem))
        ladder = _ladder(n_steps, QUICK_LADDER)
        for estimator in every if new_family else defaults:

            def cell(
                point: str,
                n_steps: int,
                _e: str = estimator,
                _p: str = spec,
                _d: int = problem.effort,
                _b: str = problem.backends[0],
                **o: str,
            ) -> Cell:
                o = {"backend": _b} | o
                torch = o["backend"] == "torch"
                count = QUICK_TORCH_REPLICATES if torch else QUICK_REPLICATES
                size = QUICK_PATHS, min(count, _affordable(n_steps, _d))
                return Cell(_p, _e, point, n_steps, *size, seed=seed, **o)  # type: ignore[arg-type]

            whole = new_name and estimator in defaults
            points = QUICK_POINTS if whole else QUICK_POINTS[:1]
            yield from (cell(point, n_steps) for point in points)
            if new_family and estimator in defaults:
                yield from (cell(QUICK_POINTS[0], n) for n in ladder)
                for backend in problem.backends[1:]:
                    yield cell(QUICK_POINTS[0], n_steps, backend=backend)
                yield cell(QUICK_POINTS[0], n_steps, dtype="float32")


def _full(seed: int) -> Iterator[Cell]:
    estimators = [spec for spec, _ in _entries("estimator")]
    for spec, problem in _entries("problem"):
        settings = [
            (n, problem.backends[0], dtype)
            for n in _ladder(problem.default_steps, FULL_LADDER)
            for dtype in ("float64", "float32")
        ]
        settings += [
            (problem.default_steps, backend, dtype)
            for backend in problem.backends[1:]
            for dtype in ("float64", "float32")
        ]
        for point in FULL_POINTS:
            for n, backend, dtype in settings:
                for estimator in estimators:
                    size = n, FULL_PATHS, FULL_REPLICATES
                    yield Cell(spec, estimator, point, *size, backend, dtype, seed=seed)


def _gradients(seed: int) -> Iterator[Cell]:
    entries = list(_entries("estimator"))
    gradients = [s for s, e in entries if e.estimand.endswith("gradient")]
    for problem_spec, problem in _entries("problem"):
        for point in GRADIENT_POINTS:
            for estimator in gradients:
                steps = problem.default_steps
                size = QUICK_PATHS, GRADIENT_REPLICATES, problem.backends[0]
                yield Cell(problem_spec, estimator, point, steps, *size, seed=seed)


SUITES: dict[str, Callable[[int], Iterator[Cell]]] = {
    "quick": _quick,
    "gradients": _gradients,
    "full": _full,
}


def suite(name: str = "quick", seed: int = 0) -> list[Cell]:
    """Return the cells of a suite, in a fixed order and without repetitions.

    Parameters
    ----------
    name : ``"quick"`` (every problem and estimator, in seconds; all variants on one
        problem of each family), ``"gradients"`` (every gradient estimator with all its
        variants at the start, halfway and at the optimum) or ``"full"`` (all points,
        step ladders, dtypes and backends).
    seed : seed of the noise, 0 … 2^64 - 1; common to all cells, so that estimators
        are compared on the same paths.

    Raises
    ------
    UnknownNameError
        For any other suite.
    """
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    if not 0 <= seed < 2**64:
        raise ParameterError(f"seed = {seed} is outside 0 … 2^64 - 1")
    return list(dict.fromkeys(SUITES[name](seed)))
