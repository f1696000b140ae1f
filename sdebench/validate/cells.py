"""One statistical cell of a validation: bias, power, variance, tail and cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdebench import registry
from sdebench.composite import CompositeEstimator
from sdebench.errors import NumericalError
from sdebench.estimator import Estimator
from sdebench.measure.cell import ROUNDING, Judge, Request, make_request, refusal
from sdebench.measure.intervals import (
    bias_norm,
    rounding_tolerance,
)
from sdebench.measure.tails import tail_index, tail_size
from sdebench.measure.workers import Settings, count_evaluations
from sdebench.problem import POINTS, Problem
from sdebench.simulate.tables import MixtureTables
from sdebench.validate.sample import GROUP, Sample, collect
from sdebench.validate.statistics import (
    credible,
    detectable_bias,
    least_credible_p_value,
    mean_test,
    variance_ratio,
)

Array = NDArray[np.float64]

FEW = 16
"""Paths of a replicate where its bias is tested: a bias of order 1/n_paths is large."""
PILOT_PATHS = 1024
"""Paths that choose the built-in to compare with; the comparison uses others."""
N_PATHS = {"torch": 1 << 15, "numba": 1 << 17}
"""Of a cell with 50 steps in up to five dimensions, or with two mixture components."""
STEPS = 50
MOST = 2
"""Largest number of paths, as a multiple of these."""
MOST_NUMBERS = 1 << 27
"""Statistics of one estimator that are kept, 1 GiB: beyond, fewer paths."""
LARGEST_LOG_WEIGHT = 300.0
"""Above log Z: its square must be finite too."""
LADDER = (0.25, 0.5, 2.0)
MAIN_POINT = "halfway"


@dataclass(frozen=True, kw_only=True)
class ValidationCell:
    """Where an estimator is tested; ``significance`` is of the cell's own p-value."""

    problem: str
    point: str
    n_steps: int
    dtype: str
    backend: str
    n_paths: int
    seed: int
    significance: float
    compare: bool

    @property
    def noise_seed(self) -> int:
        """Seed of its own, so that the p-values of different cells are independent."""
        text = f"{self.problem} {self.point} {self.n_steps} {self.dtype} {self.seed}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def __str__(self) -> str:
        """Return where the cell is, in words."""
        return f"{self.problem} at {self.point}, {self.n_steps} steps, {self.dtype}"


def plan(
    problems: Mapping[str, Problem],
    *,
    backend: str,
    seed: int,
    false_alarm: float,
    paths_factor: float = 1.0,
) -> list[ValidationCell]:
    """Return all cells: points, a ladder of steps, and both precisions.

    ``problems`` by the specification that finds them again in another process.
    """
    places: list[tuple[str, str, int, str]] = []
    for spec, problem in problems.items():
        steps = problem.default_steps
        places += [(spec, point, steps, "float64") for point in POINTS]
        places.append((spec, MAIN_POINT, steps, "float32"))
        ladder = sorted({max(1, round(steps * factor)) for factor in LADDER} - {steps})
        places += [(spec, MAIN_POINT, n, "float64") for n in ladder]
    costs = {spec: _relative_cost(problem) for spec, problem in problems.items()}
    cells = []
    for spec, point, n_steps, dtype in places:
        cost = max(costs[spec] * n_steps / STEPS, 1.0 / MOST)
        n_paths = int(paths_factor * N_PATHS[backend] / cost)
        cells.append(
            ValidationCell(
                problem=spec,
                point=point,
                n_steps=n_steps,
                dtype=dtype,
                backend=backend,
                n_paths=max(n_paths // GROUP, 8) * GROUP,
                seed=seed,
                significance=false_alarm / (2 * len(places)),
                compare=n_steps == problems[spec].default_steps and dtype == "float64",
            )
        )
    return cells


def _relative_cost(problem: Problem) -> float:
    """Return what a path-step costs, relative to that of a simple problem."""
    tables = problem.tables(problem.theta_star, problem.time_grid(1))
    if isinstance(tables, MixtureTables):
        return 0.5 * tables.tilted.shape[1]
    return max(1.0, 0.2 * problem.dim)


def built_ins(estimator: Estimator) -> list[Estimator]:
    """Return the other estimators of the catalogue with the same estimand.

    Without composite estimators, which draw paths of their own: all are compared on the
    same paths.
    """
    found = []
    for name in registry.estimator_names():
        default = registry.estimator(name)
        if isinstance(default, CompositeEstimator):
            continue
        for options in default.variants:
            other = registry.estimator(name, **options)
            itself = type(other) is type(estimator) and other == estimator
            plain = not other.has_target and other.group_size(GROUP) == 1
            if other.estimand == estimator.estimand and plain and not itself:
                found.append(other)
    return found


def _total_variance(sample: Sample) -> float:
    """Return the variance of one path's contribution, summed over components."""
    if sample.estimator.reduction == "log_mean_exp":
        weights = _weights(sample, float(np.median(sample.rows[0])))
        return float(weights.var(ddof=1) / weights.mean() ** 2)
    values, paths = sample.contributions(GROUP)
    return float(values.var(axis=0, ddof=1).sum()) * paths


def _weights(sample: Sample, log_scale: float) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(sample.rows[0] - log_scale)[:, None]


class CellTest:
    """The measurement of one cell; `row` is its result."""

    def __init__(
        self, cell: ValidationCell, problem: Problem, estimator: Estimator
    ) -> None:
        self.cell, self.problem, self.estimator = cell, problem, estimator
        self.request = self._request()
        self.judge = Judge(self.request, estimator)

    def _request(self) -> Request:
        cell = self.cell
        return make_request(
            self.problem,
            point=cell.point,
            n_steps=cell.n_steps,
            n_paths=GROUP,
            dtype=cell.dtype,
            backend=cell.backend,
        )

    def _collect(
        self, estimators: Sequence[Estimator], n_paths: int, seed: int
    ) -> list[Sample]:
        return collect(
            self.problem,
            estimators,
            self.request.theta,
            self.request.times,
            n_paths=n_paths,
            backend=self.cell.backend,
            dtype=self.cell.dtype,
            seed=seed,
        )

    def row(self) -> dict[str, Any]:
        """Simulate and return every number of the cell.

        Raises
        ------
        NumericalError
            If the estimator returns NaN or infinity.
        """
        cell = self.cell
        competitor, reference = self._opponents()
        others = [e for e in dict.fromkeys((competitor, reference)) if e is not None]
        chosen = [self.estimator, *others]
        size = self.estimator.n_statistics(self.problem.n_params)
        affordable = MOST_NUMBERS // size // GROUP * GROUP
        n_paths = max(min(cell.n_paths, affordable), GROUP)
        own, *samples = self._collect(chosen, n_paths, cell.noise_seed)
        found = dict(zip(others, samples, strict=True))
        for sample in (own, *samples):
            self._require_finite(sample)
        row: dict[str, Any] = asdict(cell) | {"n_paths": n_paths}
        row |= self._tail(own)
        row |= self._bias(own, found[reference] if reference else None)
        if row["infinite_variance_suspected"]:
            row |= self._untested("infinite variance suspected")
        row |= self._variance(own, found[competitor] if competitor else None)
        row["reference"] = reference.label if reference else None
        row["competitor"] = competitor.label if competitor else None
        row["ns_per_path_step"] = self._time(own)
        row["competitor_ns"] = self._time(found[competitor]) if competitor else None
        return row | self._evaluations()

    def _require_finite(self, sample: Sample) -> None:
        bad = int((~np.isfinite(sample.rows)).any(axis=0).sum())
        if bad:
            raise NumericalError(
                f"{sample.estimator.label} returned NaN or infinity on {bad} of "
                f"{sample.n_paths} paths"
            )
        if sample.estimator.reduction == "log_mean_exp":
            largest = float(sample.rows.max()) - self._log_scale()
            if largest > LARGEST_LOG_WEIGHT:
                raise NumericalError(
                    f"{sample.estimator.label} returned a log-weight {largest:.0f} "
                    "above log Z"
                )

    def _log_scale(self) -> float:
        """Return the exact log Z, of the N-step chain if it is known."""
        discrete, truth = self.judge.target, self.judge.truth
        return float((discrete if discrete is not None else truth)[0])  # type: ignore[index]

    def _opponents(self) -> tuple[Estimator | None, Estimator | None]:
        """Return the built-in to compare with, and the one that stands for the truth.

        The first has no more needs than the estimator; the second is needed where no
        exact answer of the N-step chain exists.  A pilot sample chooses both.
        """
        others = [
            e for e in built_ins(self.estimator) if refusal(self.request, e) is None
        ]
        allowed = self.estimator.needs if self.cell.compare else None
        equals = [e for e in others if allowed is not None and e.needs <= allowed]
        # A surrogate without an exact value has no stand-in either.
        exact = self.judge.target is not None or self.estimator.has_target
        unbiased = [e for e in others if e.declared_bias == "none"]
        wanted = list(dict.fromkeys(equals + ([] if exact else unbiased)))
        wanted = [e for e in wanted if self.cell.backend in e.backends]
        if not wanted:
            return None, None
        seed = self.cell.noise_seed ^ 1
        own, *pilot = self._collect([self.estimator, *wanted], PILOT_PATHS, seed)
        equal = [s for s in pilot if s.estimator in equals]
        stand_ins = [s for s in pilot if s.estimator in unbiased]
        competitor = min(equal, key=_total_variance).estimator if equal else None
        if exact or not stand_ins:
            return competitor, None
        best = min(
            stand_ins, key=lambda s: float(self._difference(own, s).var(0).sum())
        )
        return competitor, best.estimator

    def _difference(self, own: Sample, other: Sample) -> Array:
        """Return paired samples of the difference between two estimators."""
        if own.estimator.reduction == "log_mean_exp":
            scale = self._log_scale()
            return _weights(own, scale) - _weights(other, scale)
        group = self._group([own.estimator, other.estimator])
        return self._samples(own, group) - self._samples(other, group)

    # ---- bias -------------------------------------------------------------------
    def _bias(self, own: Sample, reference: Sample | None) -> dict[str, Any]:
        """Return the estimator's own bias, its test and what the test could find."""
        log = own.estimator.reduction == "log_mean_exp"
        truth, discrete = self.judge.truth, self.judge.target
        scale = 1.0 if log else self.judge.scale
        if log:
            samples, group = _weights(own, self._log_scale()), 1
            exact = np.ones(1)
        else:
            pair = [own, reference] if discrete is None and reference else [own]
            group = self._group([sample.estimator for sample in pair])
            samples = self._samples(own, group)
            exact = discrete if discrete is not None else np.zeros(samples.shape[1])
        row = self._against_continuous_time(samples, truth, log)
        tested = samples
        if discrete is None:
            if reference is None:
                return row | self._untested("no exact answer of the N-step chain")
            tested = self._difference(own, reference)
            exact = np.zeros(samples.shape[1])
            if not np.isfinite(scale):
                scale = float(np.linalg.norm((samples - tested).mean(axis=0)))
        spread = float(np.sqrt(samples.var(axis=0, ddof=1).max() * group))
        relative = ROUNDING[self.cell.dtype]
        tolerance = rounding_tolerance(samples.mean(axis=0), exact, relative)
        tolerance += relative * spread
        test, mean, covariance = mean_test(tested, exact, tolerance)
        interval = bias_norm(
            mean - exact,
            covariance,
            len(tested),
            1.0 - self.cell.significance,
            scale,
            tolerance * np.sqrt(len(exact)),
        )
        power = detectable_bias(
            covariance, len(tested), self.cell.significance, test.method
        )
        least = least_credible_p_value(tested)
        if least > self.cell.significance:
            power = np.inf
        return row | {
            "tested": True,
            "p_value": credible(test.p_value, least),
            "p_value_least": least,
            "too_skewed": test.p_value < least > self.cell.significance,
            "method": test.method,
            "relative_bias": interval.estimate,
            "relative_bias_low": interval.low,
            "relative_bias_high": interval.high,
            "bias": (mean - exact).tolist(),
            "std_error": np.sqrt(np.diag(covariance) / len(tested)).tolist(),
            "detectable_bias": (power + tolerance * np.sqrt(len(exact))) / scale,
            "n_samples": len(tested),
        }

    def _untested(self, why: str) -> dict[str, Any]:
        return {
            "tested": False,
            "why_not": why,
            "p_value": np.nan,
            "p_value_least": np.nan,
            "too_skewed": False,
            "detectable_bias": np.inf,
        }

    def _group(self, estimators: Sequence[Estimator]) -> int:
        """Return the paths of one sample: 1, or what the estimators can do with."""
        if any(e.declared_bias == "1/n_paths" for e in estimators):
            return GROUP
        if all(e.independent for e in estimators):
            return math.lcm(*(e.group_size(GROUP) for e in estimators))
        few = all(e.refusal(FEW, self.cell.backend) is None for e in estimators)
        return (
            FEW if few and all(e.group_size(GROUP) == 1 for e in estimators) else GROUP
        )

    def _samples(self, sample: Sample, group: int) -> Array:
        """Return independent samples (n, P), each of ``group`` paths.

        A declared bias of order 1/n_paths is removed.
        """
        if sample.estimator.declared_bias == "1/n_paths":
            halves = sample.values(group // 2)
            pairs = 0.5 * (halves[0::2] + halves[1::2])
            return 2.0 * sample.values(group) - pairs
        return sample.values(group) if group > 1 else sample.rows.T

    def _against_continuous_time(
        self, samples: Array, truth: Array | None, log: bool
    ) -> dict[str, Any]:
        """Return the total bias, for the weak order."""
        if truth is None:
            return {"bias_total": None, "bias_covariance": None}
        if log:  # of Z, relative to that of continuous time
            samples = samples * np.exp(self._log_scale() - float(truth[0]))
        total = samples.mean(axis=0) - (1.0 if log else truth)
        covariance = np.atleast_2d(np.cov(samples, rowvar=False)) / len(samples)
        return {"bias_total": total.tolist(), "bias_covariance": covariance.tolist()}

    # ---- variance, tail, cost -----------------------------------------------------
    def _variance(self, own: Sample, other: Sample | None) -> dict[str, Any]:
        scale = 1.0 if own.estimator.reduction == "log_mean_exp" else self.judge.scale
        row: dict[str, Any] = {
            "relative_variance": _total_variance(own) / scale**2,
            "variance_ratio": np.nan,
            "variance_ratio_low": np.nan,
            "variance_ratio_high": np.nan,
        }
        if other is None:
            return row
        if own.estimator.reduction == other.estimator.reduction == "log_mean_exp":
            log_scale = float(np.median(own.rows[0]))
            first, second = (_weights(s, log_scale) for s in (own, other))
        elif own.estimator.independent and other.estimator.independent:
            group = self._group([own.estimator, other.estimator])
            first, second = self._samples(own, group), self._samples(other, group)
        else:
            first, second = own.values(GROUP), other.values(GROUP)
        ratio = variance_ratio(first, second)
        names = ("variance_ratio", "variance_ratio_low", "variance_ratio_high")
        return row | dict(zip(names, map(float, ratio), strict=True))

    def _tail(self, own: Sample) -> dict[str, Any]:
        log = own.estimator.reduction == "log_mean_exp"
        if log:
            values = own.rows[0]
        else:
            # Statistics that combine reads have scales of their own.
            rows = own.rows - np.median(own.rows, axis=1, keepdims=True)
            if not own.estimator.independent:
                spread = rows.std(axis=1, keepdims=True)
                rows = rows[spread[:, 0] > 0.0] / spread[spread > 0.0][:, None]
            values = np.linalg.norm(rows, axis=0)
        if float(np.ptp(values)) <= ROUNDING[self.cell.dtype] * (
            1.0 + float(np.abs(own.rows).max())
        ):
            return {"tail_index": np.inf, "infinite_variance_suspected": False}
        top = np.sort(values)[::-1][: tail_size(len(values))]
        tail = tail_index(top, len(values), log=log)
        return {
            "tail_index": tail.alpha,
            "infinite_variance_suspected": bool(tail.infinite_variance_suspected),
        }

    def _time(self, sample: Sample) -> float:
        seconds = sample.seconds + sample.shared_seconds
        return 1e9 * seconds / (sample.n_paths * self.cell.n_steps)

    def _evaluations(self) -> dict[str, float]:
        settings = Settings(
            times=self.request.times,
            theta=self.request.theta,
            n_paths=GROUP,
            backend="torch",
            dtype=self.cell.dtype,
            device="cpu",
            seed=0,
        )
        return count_evaluations(self.problem, self.estimator, settings)
