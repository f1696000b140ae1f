"""What the harness relies on: shapes, precision, inputs, noise, needs, both backends.

Every check runs on a few paths and steps of one problem.  Paths must not know of each
other inside `statistics`: the harness cuts replicates into blocks, and treats rows as
independent samples; what compares paths belongs into `combine`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sdebench.composite import CompositeEstimator
from sdebench.errors import NotApplicableError, unknown
from sdebench.estimator import Estimator
from sdebench.measure.workers import (
    CONTROLS,
    GRID_SHIFT,
    NumbaWorker,
    Settings,
    make_tables,
    make_worker,
)
from sdebench.problem import ESTIMANDS, Problem
from sdebench.simulate.noise import split_seed
from sdebench.validate.report import FAILED, PASSED, SKIPPED, Check
from sdebench.validate.sample import GROUP as COUPLED
from sdebench.validate.sample import collect
from sdebench.view import NEEDS, Rollout, View

N_PATHS, N_STEPS = 8, 6
GROUP = 4
"""Paths of a block when blocks are compared: even, as antithetic pairs need it."""
ALLOWED = {
    "estimand": tuple(ESTIMANDS),
    "reduction": ("mean", "log_mean_exp"),
    "control": CONTROLS,
    "declared_bias": ("none", "1/n_paths", "any"),
    "needs": tuple(NEEDS),
}
"""What an estimator may declare."""
KERNEL_PATHS = 300
"""Neither a multiple of a block nor of a vector; rounded up to whole groups."""
COMPOSITE_AGREEMENT = 1e-7
"""The same for estimators that may subtract nearly equal costs."""
AGREEMENT = {"float64": 1e-11, "float32": 1e-4}
"""Difference allowed between backends, relative to the largest statistic of a row."""


def _view(
    problem: Problem,
    estimator: Estimator,
    dtype: str,
    device: str = "cpu",
    first_path: int = 0,
    n_paths: int = N_PATHS,
) -> View:
    settings = _settings(problem, n_paths, "torch", dtype, device)
    tables, other, theta = make_tables(problem, estimator, settings)
    options: dict[str, Any] = {
        "key": split_seed(settings.seed),
        "replicate": 0,
        "first_path": first_path,
        "n_paths": n_paths,
        "dtype": dtype,
        "device": device,
    }
    beside = None if other is None else View(other, settings.times, None, **options)
    return View(tables, settings.times, theta, other=beside, **options)


def _settings(
    problem: Problem, n_paths: int, backend: str, dtype: str, device: str = "cpu"
) -> Settings:
    return Settings(
        times=problem.time_grid(N_STEPS),
        theta=problem.theta("halfway"),
        n_paths=n_paths,
        backend=backend,
        dtype=dtype,
        device=device,
        seed=11,
    )


def enough_paths(estimator: Estimator, least: int) -> int:
    """Return the fewest paths that the estimator takes, of a few, from ``least`` on."""
    unit = estimator.group_size(least)
    for n_paths in (least, -(-least // unit) * unit, 32, 64, 256, 1024):
        if n_paths >= least and estimator.refusal(n_paths, "torch") is None:
            return n_paths
    raise NotApplicableError(str(estimator.not_applicable(least)))


def _evaluate(estimator: Estimator, view: View) -> torch.Tensor:
    with torch.no_grad():
        return estimator.statistics(view)


def _copy(paths: Rollout) -> list[torch.Tensor]:
    parts = [*paths.states, *paths.noises, *paths.controls]
    parts += [paths.control_cost, paths.running_cost, paths.martingale, paths.reward]
    return [part.clone() for part in parts]


def contract_checks(
    estimator: Estimator, problem: Problem, dtype: str = "float64"
) -> Iterator[Check]:
    """Yield the outcomes of all checks on one problem at one precision.

    The first check that cannot go on ends the rest.
    """
    if message := _declarations(estimator):
        yield Check(name="interface", status=FAILED, message=message)
        return
    if isinstance(estimator, CompositeEstimator):
        yield from _composite_checks(estimator, problem, dtype)
        return
    n_paths = enough_paths(estimator, N_PATHS)
    view = _view(problem, estimator, dtype, n_paths=n_paths)
    paths = view.rollout()
    before, times = _copy(paths), view.times.copy()
    theta = None if view.theta is None else view.theta.copy()
    rows = _evaluate(estimator, view)
    if message := _shape(estimator, problem, rows, n_paths):
        yield Check(name="interface", status=FAILED, message=message)
        return
    yield Check(name="interface", status=PASSED, message=f"rows {tuple(rows.shape)}")
    yield _finite(rows)
    yield _verdict(
        "dtype",
        rows.dtype == view.dtype and not rows.requires_grad,
        "statistics carry a graph of automatic differentiation: detach them"
        if rows.requires_grad
        else f"statistics are {rows.dtype} where the view is {view.dtype}",
    )
    rows = rows.detach()
    yield _verdict(
        "device",
        rows.device.type == "cpu",
        f"statistics are on {rows.device} where the view is on {view.device}",
    )
    same = all(map(torch.equal, _copy(paths), before))
    same &= np.array_equal(view.times, times)
    same &= theta is None or np.array_equal(view.theta, theta)  # type: ignore[arg-type]
    yield _verdict(
        "inputs_unchanged",
        same,
        "statistics wrote into the view's paths, times or theta, which other "
        "estimators share: work on copies",
    )
    yield _deterministic(estimator, problem, dtype, rows)
    yield _blocks(estimator, problem, dtype, rows)
    yield _needs(estimator, view)
    yield _combine(estimator, problem, rows)


def _composite_checks(
    estimator: CompositeEstimator, problem: Problem, dtype: str
) -> Iterator[Check]:
    """Yield what can be checked of an estimator that sees no view."""
    n_paths = enough_paths(estimator, N_PATHS)

    def rows() -> torch.Tensor:
        settings = _settings(problem, n_paths, "torch", dtype)
        worker = make_worker(problem, [estimator], settings)
        found, _, _ = worker.block(0, N_STEPS << GRID_SHIFT, n_paths)
        return torch.tensor(found[0].T)

    first = rows()
    if message := _shape(estimator, problem, first, n_paths):
        yield Check(name="interface", status=FAILED, message=message)
        return
    yield Check(name="interface", status=PASSED, message=f"rows {tuple(first.shape)}")
    yield _finite(first)
    with _other_random_numbers():
        again = rows()
    yield _same(first, again)
    yield _combine(estimator, problem, first)


def _declarations(estimator: Estimator) -> str:
    """Return what is wrong with what the estimator declares, or ""."""
    for name, allowed in ALLOWED.items():
        given = getattr(estimator, name)
        for value in given if name == "needs" else [given]:
            if value not in allowed and not isinstance(value, float):
                return str(unknown(name.replace("_", " "), str(value), allowed))
    log = estimator.reduction == "log_mean_exp"
    if log and estimator.estimand != "log_normalizer":
        return (
            f"reduction log_mean_exp gives log Z, and the estimand is "
            f"{estimator.estimand}; use reduction mean"
        )
    return ""


def _verdict(name: str, passed: bool, message: str) -> Check:
    if passed:
        return Check(name=name, status=PASSED, message="")
    return Check(name=name, status=FAILED, message=message)


def _finite(rows: torch.Tensor) -> Check:
    return _verdict(
        "finite",
        bool(torch.isfinite(rows).all()),
        f"{int((~torch.isfinite(rows)).sum())} of {rows.numel()} statistics are NaN or "
        "infinite",
    )


def _shape(
    estimator: Estimator, problem: Problem, rows: Any, n_paths: int = N_PATHS
) -> str:
    """Return what is wrong with the value of `statistics`, or ""."""
    if not isinstance(rows, torch.Tensor):
        return f"statistics returned {type(rows).__name__}, not a torch.Tensor"
    log = estimator.reduction == "log_mean_exp"
    wanted = (n_paths, 1 if log else estimator.n_statistics(problem.n_params))
    if tuple(rows.shape) != wanted:
        return (
            f"statistics returned shape {tuple(rows.shape)}; expected {wanted}, one "
            f"row per path and {'the log-weight' if log else 'n_statistics'} columns"
        )
    return ""


def _deterministic(
    estimator: Estimator, problem: Problem, dtype: str, rows: torch.Tensor
) -> Check:
    """Evaluate the same block again with other global random numbers."""
    with _other_random_numbers():
        view = _view(problem, estimator, dtype, n_paths=len(rows))
        again = _evaluate(estimator, view)
    return _same(rows, again)


@contextmanager
def _other_random_numbers() -> Iterator[None]:
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 (it is the global one we mean)
    try:
        torch.manual_seed(12345)
        np.random.seed(12345)  # noqa: NPY002
        yield
    finally:
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _same(rows: torch.Tensor, again: torch.Tensor) -> Check:
    return _verdict(
        "deterministic",
        torch.equal(torch.nan_to_num(rows), torch.nan_to_num(again)),
        "the same paths gave different statistics: draw own noise from "
        "view.noise(n_steps + k), not from a global generator, and keep no state",
    )


def _blocks(
    estimator: Estimator, problem: Problem, dtype: str, rows: torch.Tensor
) -> Check:
    count = math.lcm(estimator.group_size(len(rows)), GROUP)
    if count >= len(rows):
        message = "it couples all paths of a replicate: nothing to compare"
        return Check(name="paths_independent", status=SKIPPED, message=message)
    parts = [
        _evaluate(estimator, _view(problem, estimator, dtype, "cpu", first, count))
        for first in range(0, len(rows), count)
    ]
    if any(part.shape[1:] != rows.shape[1:] for part in parts):
        shape = tuple(parts[0].shape)
        return _verdict("paths_independent", False, f"{count} paths gave rows {shape}")
    joined = torch.cat(parts).detach()
    # Batches of another size are summed in another order: rounding, no more.
    scale = float(torch.nan_to_num(rows).abs().max()) + 1.0
    gap = float(torch.nan_to_num(joined - rows).abs().max())
    return _verdict(
        "paths_independent",
        gap <= AGREEMENT[dtype] * scale,
        f"a path's statistics change by {gap:.2g} with the other paths of its block: "
        "return sums per path and compare paths in combine (see reinforce.py)",
    )


def _needs(estimator: Estimator, view: View) -> Check:
    hidden = sorted(view.used - set(estimator.needs))
    return Check(
        name="declared_needs",
        status=FAILED if hidden else PASSED,
        message=f"uses {', '.join(NEEDS.get(n, n) for n in hidden)} without declaring "
        f"it: needs must include {', '.join(hidden)}"
        if hidden
        else "",
        details={"used": sorted(view.used)},
    )


def _combine(estimator: Estimator, problem: Problem, rows: torch.Tensor) -> Check:
    if estimator.reduction == "log_mean_exp":
        return _verdict("combine", True, "")
    mean = rows.double().numpy().mean(axis=0)
    value = np.asarray(estimator.combine(mean, len(rows)), dtype=np.float64)
    log = estimator.estimand == "log_normalizer"
    wanted = (1,) if log else (problem.n_params,)
    finite = bool(np.isfinite(value).all()) or not bool(torch.isfinite(rows).all())
    return _verdict(
        "combine",
        value.shape == wanted and finite,
        f"combine returned shape {value.shape}{'' if finite else ', not finite'}; "
        f"expected {wanted}, the estimate",
    )


def device_check(estimator: Estimator, problem: Problem) -> Check:
    """Run the same torch code on an accelerator, if there is one."""
    if not torch.cuda.is_available() or isinstance(estimator, CompositeEstimator):
        message = "no CUDA device here: not tested"
        return Check(name="accelerator", status=SKIPPED, message=message)
    rows = _evaluate(estimator, _view(problem, estimator, "float64", "cuda"))
    here = _evaluate(estimator, _view(problem, estimator, "float64"))
    if rows.device.type != "cuda":
        return _verdict("accelerator", False, f"statistics came back on {rows.device}")
    gap = float((rows.cpu() - here).abs().max()) / (1.0 + float(here.abs().max()))
    return _verdict("accelerator", gap < 1e-9, f"cuda and cpu differ by {gap:.2g}")


def kernel_check(estimator: Estimator, problem: Problem, dtype: str) -> Check:
    """Compare the numba kernel with the torch function path by path."""
    composite = isinstance(estimator, CompositeEstimator)
    if composite and dtype == "float32":
        message = "a composite estimator may subtract nearly equal numbers"
        return Check(name="kernel_agrees", status=SKIPPED, message=message)
    theta, times = problem.theta("halfway"), problem.time_grid(N_STEPS + 1)
    coupled = estimator.group_size(COUPLED) > 1
    n_paths = -(-KERNEL_PATHS // COUPLED) * COUPLED if coupled else KERNEL_PATHS
    options: dict[str, Any] = {"n_paths": n_paths, "dtype": dtype, "seed": 5}

    def rows(backend: str) -> np.ndarray:
        (sample,) = collect(
            problem, [estimator], theta, times, backend=backend, **options
        )
        return sample.rows

    if not composite and (
        changed := _changed_input(estimator, problem, theta, times, options)
    ):
        return _verdict("kernel_agrees", False, f"the kernel wrote into {changed}")
    ours, theirs = rows("numba"), rows("torch")
    if not np.isfinite(ours).all():
        return _verdict("kernel_agrees", False, "the kernel returned NaN or infinity")
    scale = np.max(np.abs(theirs), axis=1, keepdims=True)
    gap = np.abs(ours - theirs) / np.maximum(scale, np.finfo(np.float64).tiny)
    worst = int(np.argmax(gap.max(axis=1)))
    return _verdict(
        "kernel_agrees",
        bool(gap.max() <= (COMPOSITE_AGREEMENT if composite else AGREEMENT[dtype])),
        f"kernel and torch function differ by {gap.max():.2g} of the largest value in "
        f"statistic {worst}, on the same paths ({dtype})",
    )


def _changed_input(
    estimator: Estimator,
    problem: Problem,
    theta: np.ndarray,
    times: np.ndarray,
    options: dict[str, Any],
) -> str:
    """Return the name of an input that the kernel wrote into, or ""."""
    settings = Settings(
        theta=theta, times=times, backend="numba", device="cpu", **options
    )
    worker: Any = make_worker(problem, [estimator], settings)
    tables, _, used = make_tables(problem, estimator, settings)
    clean = NumbaWorker(tables, [estimator], replace(settings, theta=used))
    clean.serve([])  # blocks as large as the estimator's
    count = min(settings.n_paths, worker.size)
    worker.block(0, 0, count)
    clean.block(0, 0, count)
    for name in ("states", "normals", "controls", "totals"):
        if not np.array_equal(
            getattr(worker._buffers, name)[..., :count],
            getattr(clean._buffers, name)[..., :count],
        ):
            return f"{name}, which other estimators share"
    return ""
