"""Measure one cell: an estimator on a problem, judged against the exact answer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from sdebench import registry
from sdebench.errors import (
    NotApplicableError,
    NotExactError,
    NumericalError,
    ParameterError,
    unknown,
)
from sdebench.estimator import Estimator, Sizes
from sdebench.measure.answers import exact_answers
from sdebench.measure.engine import (
    Accumulator,
    Simulation,
    check_finite,
)
from sdebench.measure.intervals import (
    bias_norm,
    bias_test,
    debiased_squared_norm,
    efficiency,
    mean_squared_error,
    required_replicates,
    rounding_tolerance,
    simultaneous_interval,
    stopping_levels,
    variance_interval,
)
from sdebench.measure.memory import PeakMemory
from sdebench.measure.moments import Moments
from sdebench.measure.tails import tail_index
from sdebench.measure.workers import Settings, count_evaluations, shared_paths
from sdebench.problem import EULER, Problem, check_scheme
from sdebench.provenance import provenance
from sdebench.simulate.tables import (
    ONLY_TORCH,
    Tables,
    has_density,
    noise_depends_on_state,
    noise_is_invertible,
)
from sdebench.view import DERIVATIVES

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

SCHEMA_VERSION = 1
CONFIDENCE = 0.95
SIGNIFICANCE = 0.001
"""False-alarm rate per cell of the verdicts that call an estimator biased."""
ROUNDING = {"float64": 2.0**-40, "float32": 2.0**-14}
"""Relative differences that the arithmetic of a path explains."""
MAX_REPLICATES = 1 << 22
NO_TARGET = "no exact target"
"""Verdict on such an estimator where the value of its target is not known."""
PARTIAL = "unbiased for its target"
"""Verdict on an estimator of something else than the N-step gradient."""

OF_THE_STATE = frozenset(DERIVATIVES) - {"control_parameter_vjp"}
"""Needs that differentiate the flow, its costs or the reward in the state."""
BACKENDS = ("numba", "torch")
DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Measurement:
    """The result of one cell; ``row`` holds every number under its column's name."""

    row: dict[str, Any]

    def to_frame(self) -> pd.DataFrame:
        """Return the measurement as a frame of one row."""
        import pandas as pd

        return pd.DataFrame([self.row])

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["row"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __repr__(self) -> str:
        """Return the main numbers in one line."""
        keys = ("problem_label", "estimator_label", "point", "n_steps", "verdict")
        shown = {k.removesuffix("_label"): self.row.get(k) for k in keys}
        return f"Measurement({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The checked settings of a measurement."""

    problem: Problem
    point: str
    theta: Array
    times: Array
    n_paths: int
    n_replicates: int
    backend: str
    dtype: str
    device: str
    scheme: str
    seed: int
    target: float | None
    budget: float | None
    threads: int

    @cached_property
    def base_tables(self) -> Tables:
        """The tables of the base process; made once for all estimators."""
        return self.problem.tables(None, self.times, self.scheme)


def _positive(name: str, value: int, least: int) -> int:
    number = float(value) if isinstance(value, int | float | np.number) else math.nan
    if isinstance(value, bool) or not number.is_integer() or number < least:
        raise ParameterError(f"{name} {value!r} must be a whole number >= {least}")
    return int(value)


def make_request(
    problem: Problem | str,
    *,
    point: str | Sequence[float] | Array = "halfway",
    n_steps: int | Sequence[float] | None = None,
    n_paths: int = 256,
    n_replicates: int = 64,
    backend: str | None = None,
    dtype: str = "float64",
    device: str = "cpu",
    scheme: str = "euler_maruyama",
    seed: int = 0,
    target: float | None = None,
    budget: float | None = None,
    threads: int = 1,
) -> Request:
    """Check the settings of `measure` and fill in defaults."""
    if isinstance(problem, str):
        problem = registry.problem(problem)
    check_scheme(scheme)
    if backend is None:
        backend = problem.backends[0]
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if device != "cpu" and backend == "numba":
        raise ParameterError(
            f"device {device!r} needs backend 'torch'; the numba kernels run on the CPU"
        )
    if target is not None and not 0.0 < target < math.inf:
        raise ParameterError(f"target {target!r} must be a positive ratio, e.g. 0.01")
    if budget is not None and not budget > 0.0:
        raise ParameterError(f"budget {budget!r} must be a positive number of seconds")
    return Request(
        problem=problem,
        point=point if isinstance(point, str) else "given",
        theta=problem.theta(point),
        times=problem.time_grid(n_steps),
        n_paths=_positive("n_paths", n_paths, 1),
        n_replicates=_positive("n_replicates", n_replicates, 2),
        backend=backend,
        dtype=dtype,
        device=device,
        scheme=scheme,
        seed=_positive("seed", seed, 0),
        target=target,
        budget=budget,
        threads=_positive("threads", threads, 1),
    )


def measure(
    problem: Problem | str, estimator: Estimator | str, **settings: Any
) -> Measurement:
    """Measure bias, variance and cost of one estimator on one problem.

    Parameters
    ----------
    problem, estimator : objects or specifications such as ``"two_modes:beta=1"``.
    point : "zero", "halfway" (default), "optimum", "overshoot", or theta as numbers.
    n_steps : number of uniform time steps, or the time grid; default: published.
    n_paths : paths per replicate.
    n_replicates : independent replicates; with ``target`` the first look.
    backend : "numba" or "torch"; default: numba, where the problem has it.
    dtype : "float64" or "float32"; device : of torch.
    scheme : "euler_maruyama" or "exponential" (exact linear part).
    seed : of the counter-based noise, in [0, 2^64).
    target : stop when the half-width of the bias interval is this fraction of the
        exact answer's norm; budget : stop after this many seconds.
    threads : worker threads of numba, or threads of torch.
    progress : called with (replicates done, replicates planned).

    Raises
    ------
    UnknownNameError, ParameterError
        For names and settings that do not exist or are out of range.
    NotApplicableError
        If the estimator is outside its assumptions; says why.
    NumericalError
        If the estimator returns NaN or infinity.
    """
    result = measure_group(problem, [estimator], **settings)[0]
    if result.row["status"] == "not applicable":
        raise NotApplicableError(
            f"{result.row['estimator']} is not applicable to "
            f"{result.row['problem']}: {result.row['reason']}"
        )
    if result.row["status"] == "failed":
        raise NumericalError(result.row["reason"])
    return result


def measure_group(
    problem: Problem | str,
    estimators: Sequence[Estimator | str],
    *,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Measurement]:
    """Measure several estimators on shared paths; arguments as `measure`.

    Estimators with the same control share the forward pass and its noise.  One that
    cannot run gets a row with status "not applicable" or "failed" and the reason.
    """
    request = make_request(problem, **settings)
    chosen = [registry.estimator(e) if isinstance(e, str) else e for e in estimators]
    rows: dict[int, dict[str, Any]] = {}
    groups: dict[Hashable, list[int]] = {}
    for index, estimator in enumerate(chosen):
        reason = refusal(request, estimator)
        if reason is None:
            key = shared_paths(estimator, len(request.times) - 1, request.n_paths)
            groups.setdefault(key, []).append(index)
        else:
            rows[index] = _row(request, estimator) | {
                "status": "not applicable",
                "reason": reason,
            }
    # One BLAS thread: the matrices are small, and results must not depend on it.
    with threadpool_limits(1, user_api="blas"), _torch_threads(request):
        for indices in groups.values():
            group = [chosen[i] for i in indices]
            measured = _simulate(request, group, progress)
            rows.update(zip(indices, measured, strict=True))
        errors = _control_errors(request)
    return [Measurement(rows[i] | errors) for i in range(len(chosen))]


def refusal(request: Request, estimator: Estimator) -> str | None:
    """Return why an estimator cannot run on this cell, or None."""
    if request.backend not in request.problem.backends:
        return ONLY_TORCH
    if reason := estimator.refusal(request.n_paths, request.backend):
        return reason
    n_steps = len(request.times) - 1
    problem = request.problem
    if problem.has_start_parameters and not estimator.handles_initial_law:
        return (
            "theta moves the law of X_0 in this problem, and the estimator has no "
            "terms for it: leave initial_law out"
        )
    sizes = Sizes(request.n_paths, n_steps, problem.dim, problem.n_params)
    if reason := estimator.not_applicable_to(sizes):
        return reason
    try:
        return _unmet_need(request, estimator)
    except (NotApplicableError, ParameterError) as error:
        return str(error)


def _unmet_need(request: Request, estimator: Estimator) -> str | None:
    """Return what the estimator needs of the process and does not find, or None."""
    if not request.problem.has_derivatives and estimator.needs & OF_THE_STATE:
        return (
            "it differentiates the flow or the reward, which have no derivatives in "
            "this problem; take likelihood ratios or estimators of zeroth order"
        )
    noisy = estimator.noisy_steps(len(request.times) - 1)
    if noisy is not None:
        request.problem.tables(None, request.times, request.scheme, noisy)
    if estimator.needs_denoiser and not len(request.base_tables.denoiser):
        return (
            "it needs the denoised prediction E[X_T | X_t], which only memoryless "
            f"denoising problems with scheme {EULER} give in closed form"
        )
    if (
        noise_depends_on_state(request.base_tables)
        and not estimator.handles_state_dependent_noise
    ):
        return (
            "the noise of this problem depends on the state, and the estimator does "
            "not say that it is right there (see "
            "Estimator.handles_state_dependent_noise)"
        )
    if "base_density" in estimator.needs and not has_density(request.base_tables):
        return (
            "it needs the density of the base process, which only denoising problems "
            "with a random start have in closed form"
        )
    if estimator.needs_invertible_noise and not noise_is_invertible(
        request.base_tables
    ):
        return (
            "it divides by the noise of a step, and the noise of this problem does "
            "not reach every direction"
        )
    if type(estimator).not_applicable_on is Estimator.not_applicable_on:
        return None
    return estimator.not_applicable_on(request.base_tables, request.times)


@contextmanager
def _torch_threads(request: Request) -> Iterator[None]:
    """Give torch as many threads as were asked for, and undo it.

    With numba too: evaluations are counted with torch, whose threads would wait for
    each other.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _control_errors(request: Request) -> dict[str, float]:
    """Return the distances of the control from u* and from u*_N, NaN if not known."""

    def distance(*n_steps: Any) -> float:
        try:
            return request.problem.truth.control_error(request.theta, *n_steps)
        except NotExactError:
            return math.nan

    return {
        "control_error": distance(),
        "control_error_discrete": distance(request.times, request.scheme),
    }


def _simulate(
    request: Request,
    estimators: Sequence[Estimator],
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    settings = Settings(
        times=request.times,
        theta=request.theta,
        n_paths=request.n_paths,
        backend=request.backend,
        dtype=request.dtype,
        device=request.device,
        seed=request.seed,
        scheme=request.scheme,
    )
    judges = [Judge(request, estimator) for estimator in estimators]
    simulation = Simulation(request.problem, estimators, settings)
    with PeakMemory() as memory:
        level = _run(request, simulation, judges, progress)
    rows = []
    for accumulator, judge in zip(simulation.accumulators, judges, strict=True):
        row = _row(request, accumulator.estimator)
        row["n_replicates"] = simulation.n_replicates
        evaluations = count_evaluations(
            request.problem, accumulator.estimator, settings
        )
        try:
            check_finite(accumulator)
        except NumericalError as error:
            row |= evaluations | {"status": "failed", "reason": str(error)}
        else:
            row |= judge.row(accumulator, level)
            row |= _costs(request, row, accumulator, evaluations)
            row["peak_memory_bytes"] = memory.bytes
        rows.append(row)
    return rows


def _run(
    request: Request,
    simulation: Simulation,
    judges: Sequence[Judge],
    progress: Callable[[int, int], None] | None,
) -> float:
    """Add replicates until the target or the budget is met; return the level used."""
    wanted = request.n_replicates
    if request.target is None and request.budget is None:
        simulation.run(wanted, request.threads)
        if progress:
            progress(wanted, wanted)
        return CONFIDENCE
    begin = time.monotonic()
    level = CONFIDENCE
    for level in stopping_levels(CONFIDENCE):
        simulation.run(wanted, request.threads)
        if progress:
            progress(wanted, wanted)
        pairs = list(zip(simulation.accumulators, judges, strict=True))
        if request.target is not None:
            needed = [
                judge.replicates_needed(accumulator, request.target, level)
                for accumulator, judge in pairs
            ]
            if max(needed) <= wanted:
                break
        spent = time.monotonic() - begin
        # The next look doubles the work: stop if that would pass the budget.
        if request.budget is not None and 2.0 * spent > request.budget:
            break
        if 2 * wanted > MAX_REPLICATES:
            break
        wanted *= 2
    return level


def _row(request: Request, estimator: Estimator) -> dict[str, Any]:
    """Return the identifying columns of a cell."""
    problem = request.problem
    parameter_names = (
        ["log_normalizer"]
        if estimator.estimand == "log_normalizer"
        else list(problem.parameter_names)
    )
    return {
        "problem": problem.name,
        "problem_parameters": json.dumps(problem.parameters),
        "problem_label": problem.label,
        "problem_class": problem.problem_class,
        "estimator": estimator.name,
        "estimator_options": json.dumps(estimator.options),
        "estimator_label": estimator.label,
        "point": request.point,
        "theta": request.theta.tolist(),
        "n_steps": len(request.times) - 1,
        "default_steps": problem.default_steps,
        "scheme": request.scheme,
        "n_paths": request.n_paths,
        "n_replicates": request.n_replicates,
        "backend": request.backend,
        "dtype": request.dtype,
        "device": request.device,
        "seed": request.seed,
        "estimand": estimator.estimand,
        "parameter_names": parameter_names,
        "confidence": CONFIDENCE,
        "status": "ok",
        "reason": "",
        "schema_version": SCHEMA_VERSION,
        **provenance(),
    }


class Judge:
    """Compares the accumulated samples of one estimator with the exact answer."""

    def __init__(self, request: Request, estimator: Estimator) -> None:
        self._request, self._estimator = request, estimator
        answers = exact_answers(
            request.problem, estimator, request.theta, request.times, request.scheme
        )
        self.truth, self.discrete = answers.truth, answers.discrete
        self.target, self.error = answers.target, answers.error
        self.scale = self._scale()

    def _scale(self) -> float:
        """Return what relative errors are relative to.

        The norm of the exact answer; at a point where that is zero, its norm at the
        point "zero".  An error of log Z is a relative error of Z already.
        """
        if self._estimator.estimand == "log_normalizer":
            return 1.0
        if self.truth is None:
            return math.nan
        norm = float(np.linalg.norm(self.truth))
        if norm > max(1e-10, self.error):
            return norm
        zero = self._request.problem.truth.answer(
            self._estimator.estimand, self._request.problem.theta("zero")
        )
        norm = math.nan if zero is None else float(np.linalg.norm(zero))
        if math.isnan(norm):
            # A matching gradient without an exact value at zero: use that of J.
            norm = float(
                np.linalg.norm(
                    self._request.problem.truth.gradient(
                        self._request.problem.theta("zero")
                    )
                )
            )
        return norm if norm > 0.0 else math.nan

    def _moments(self, accumulator: Accumulator) -> Moments:
        """Return the samples behind the intervals: paths if i.i.d., or replicates."""
        part = accumulator.contributions or accumulator.values
        return part.finalize()

    def replicates_needed(
        self, accumulator: Accumulator, target: float, level: float
    ) -> int:
        """Return the replicates for a half-width of ``target`` times the scale."""
        scale = 1.0 if math.isnan(self.scale) else self.scale
        moments = self._moments(accumulator)
        per_replicate = (
            self._request.n_paths // accumulator.group
            if accumulator.contributions is not None
            else 1
        )
        error = moments.std_error
        if not np.any(error > 0) or not np.all(np.isfinite(error)):
            return 0
        needed = required_replicates(
            target * scale, error, moments.n, level, len(error)
        )
        return -(-needed // per_replicate)

    def row(self, accumulator: Accumulator, level: float) -> dict[str, Any]:
        """Return the columns of the answers."""
        request = self._request
        per_path = accumulator.contributions is not None
        moments = self._moments(accumulator)
        covariance = moments.covariance
        assert covariance is not None
        scale_to_path = float(accumulator.group if per_path else request.n_paths)
        variance = variance_interval(moments, level, scale_to_path)
        values = accumulator.values.finalize()
        row: dict[str, Any] = {
            "mean": moments.mean.tolist(),
            "std_error": moments.std_error.tolist(),
            "truth": None if self.truth is None else self.truth.tolist(),
            "truth_discrete": (
                None if self.discrete is None else self.discrete.tolist()
            ),
            "target": None if self.target is None else self.target.tolist(),
            "truth_error": self.error,
            "scale": self.scale,
            "confidence_used": level,
            "variance": variance.estimate,
            "variance_low": variance.low,
            "variance_high": variance.high,
            "relative_variance": variance.estimate / self.scale**2,
            "relative_variance_low": variance.low / self.scale**2,
            "relative_variance_high": variance.high / self.scale**2,
            "kurtosis": _largest(values.kurtosis if not per_path else moments.kurtosis),
        }
        tolerance = rounding_tolerance(
            moments.mean,
            moments.mean if self.truth is None else self.truth,
            ROUNDING[request.dtype],
        )
        # Rounding acts on the contributions, which may cancel in the mean.
        tolerance += ROUNDING[request.dtype] * math.sqrt(
            float(np.max(np.diag(covariance))) * scale_to_path
        )
        if not self._estimator.independent and math.isfinite(self.scale):
            # What `combine` subtracts may cancel altogether.
            tolerance += ROUNDING[request.dtype] * self.scale
        row["normal_theory_trusted"] = _normal_theory_trusted(moments)
        # Zero variance: the largest values are rounding errors, which have no tail.
        row |= self._tail(accumulator, variance.estimate > tolerance**2)
        for suffix, answer, slack in (
            ("", self.truth, tolerance + self.error),
            ("_own", self.target, tolerance),
        ):
            row |= _bias(moments, answer, slack, level, self.scale, suffix)
        discretization = (
            self.discrete - self.truth
            if self.truth is not None and self.discrete is not None
            else None
        )
        row["bias_discretization"] = (
            None if discretization is None else discretization.tolist()
        )
        row["relative_bias_discretization"] = (
            math.nan
            if discretization is None
            else float(np.linalg.norm(discretization)) / self.scale
        )
        row["relative_bias_target"] = (
            math.nan
            if self.target is None or self.discrete is None
            else float(np.linalg.norm(self.target - self.discrete)) / self.scale
        )
        answer = self.truth if self.truth is not None else self.discrete
        if answer is not None:
            squared = debiased_squared_norm(
                moments.mean - answer, covariance, moments.n, level
            )
            error = mean_squared_error(squared, variance, request.n_paths)
            row["mse"] = error.estimate
            row["mse_low"], row["mse_high"] = error.low, error.high
        row["verdict"] = self._verdict(row, discretization, tolerance + self.error)
        return row

    def _tail(self, accumulator: Accumulator, noisy: bool) -> dict[str, Any]:
        if not noisy:
            return {
                "tail_index": math.inf,
                "tail_index_low": math.inf,
                "tail_index_high": math.inf,
                "infinite_variance_suspected": False,
            }
        top, count = accumulator.top.finalize()
        tail = tail_index(top, count, log=accumulator.is_weight)
        return {
            "tail_index": tail.alpha,
            "tail_index_low": tail.low,
            "tail_index_high": tail.high,
            "infinite_variance_suspected": bool(tail.infinite_variance_suspected),
        }

    def _verdict(
        self, row: dict[str, Any], discretization: Array | None, tolerance: float
    ) -> str:
        if row["infinite_variance_suspected"]:
            return "infinite variance suspected"
        trusted = row["normal_theory_trusted"]
        if self.target is not None:
            if row["p_value_own"] < SIGNIFICANCE:
                return "biased" if trusted else "undecided, heavy tails"
            if row["relative_bias_target"] * self.scale > tolerance:
                return PARTIAL
            if discretization is None:
                return "unbiased"
            visible = float(np.max(np.abs(discretization))) > tolerance
            return "discretization bias only" if visible else "unbiased"
        if self._estimator.has_target:
            return NO_TARGET
        if self.truth is None:
            return "no exact answer"
        if row["p_value"] < SIGNIFICANCE:
            return "biased, not split" if trusted else "undecided, heavy tails"
        return "no bias resolved"


def _normal_theory_trusted(moments: Moments) -> bool:
    """Return whether the mean is normal enough for a p-value of `SIGNIFICANCE`.

    Edgeworth: at z = 3.3 the tail of the t-statistic is off by a relative
    |skewness| z^3 / (6 sqrt(n)), which must be below one.  Without this, 128 samples
    with a tail index near 3 are called biased in one of five runs.
    """
    spread = np.sqrt(moments.variance)
    usable = spread > 0.0
    skewness = np.abs(moments.third[usable]) / spread[usable] ** 3
    return bool(np.all(6.0 * skewness <= math.sqrt(moments.n)))


def _largest(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan


def _bias(
    moments: Moments,
    answer: Array | None,
    tolerance: float,
    level: float,
    scale: float,
    suffix: str,
) -> dict[str, Any]:
    """Return the bias against one exact answer, with its intervals and p-value."""
    names = ("bias", "bias_low", "bias_high")
    relative = ("relative_bias", "relative_bias_low", "relative_bias_high")

    def column(name: str) -> str:
        stem, _, end = name.rpartition("_")
        return f"{stem}{suffix}_{end}" if end in ("low", "high") else f"{name}{suffix}"

    if answer is None:
        return (
            {column(name): None for name in names}
            | {column(name): math.nan for name in relative}
            | {f"p_value{suffix}": math.nan}
        )
    covariance = moments.covariance
    assert covariance is not None
    difference = moments.mean - answer
    low, high = simultaneous_interval(
        difference, moments.std_error, moments.n - 1, level
    )
    # The tolerance is per component, that of the norm sqrt(P) times as large.
    norm = bias_norm(
        difference,
        covariance,
        moments.n,
        level,
        scale,
        tolerance * math.sqrt(len(difference)),
    )
    test = bias_test(moments.mean, answer, covariance, moments.n, tolerance)
    values = (difference.tolist(), low.tolist(), high.tolist())
    return (
        dict(zip(map(column, names), values, strict=True))
        | dict(zip(map(column, relative), norm, strict=True))
        | {f"p_value{suffix}": test.p_value}
    )


def _costs(
    request: Request,
    row: dict[str, Any],
    accumulator: Accumulator,
    evaluations: dict[str, float],
) -> dict[str, Any]:
    """Return the columns of cost and efficiency."""
    seconds = float(sum(accumulator.seconds))
    paths = row["n_replicates"] * request.n_paths
    per_path = sum(v for k, v in evaluations.items() if k.endswith("evaluations"))
    costs: dict[str, Any] = {
        **evaluations,
        "evaluations": per_path,
        "seconds": seconds,
        "ns_per_path_step": 1e9 * seconds / (paths * row["n_steps"]),
    }
    if "mse" in row:
        from sdebench.measure.intervals import Interval

        error = Interval(row["mse"], row["mse_low"], row["mse_high"])
        for name, cost in (
            ("efficiency_evaluations", per_path * request.n_paths),
            ("efficiency_seconds", seconds / row["n_replicates"]),
        ):
            value = efficiency(error, cost)
            costs[name] = value.estimate
            costs[f"{name}_low"], costs[f"{name}_high"] = value.low, value.high
    return costs
