r"""What it costs to estimate log Z to a given error, from measured bias and variance.

An estimator is run in replicates of `N_PATHS` paths at some number of steps N.  Of
importance weights and particles the replicate's Z-hat is averaged, which has no bias
from the number of paths; an estimator that owns up to such a bias gives its log Z-hat.
Either way, errors are relative to Z, and to first order those of log Z are the same.

With bias b_N and variance V_N of one path, n paths have the mean square error
b_N^2 + V_N / n, so that an error of eps takes

    n = V_N / (eps^2 - b_N^2)    paths,    n N path-steps,

and none of any number where |b_N| >= eps.  The number of steps is the cheapest one of
those tried.  b_N is exact where the estimator's mean is known, and measured elsewhere;
where its interval reaches eps and the estimate does not, the cost is a lower bound,
that of b_N = 0.  So it is where the largest weights carry the mean: a variance that
depends on paths not seen yet is larger than that of a sample.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import expm1, inf
from typing import Any

import numpy as np

from sdebench import registry
from sdebench.errors import SDEBenchError
from sdebench.estimator import Estimator
from sdebench.experiments.comparisons import LANES, in_lanes
from sdebench.experiments.measuring import Array
from sdebench.measure.answers import exact_answers
from sdebench.measure.cell import Request, make_request, refusal
from sdebench.measure.engine import ReplicateMean
from sdebench.measure.intervals import Interval, t_quantile
from sdebench.measure.workers import GRID_SHIFT, Settings, make_worker
from sdebench.problem import Problem

POINT = "halfway"
N_PATHS = 512
"""Paths per replicate."""
WORK = 1 << 23
"""Paths times steps and dimensions of a measurement."""
LEAST, MOST = 32, 2048
"""Replicates."""
FACTORS = (0.25, 0.5, 1.0, 2.0)
"""Numbers of steps tried, in units of the problem's own."""
SEEN = 0.5
"""Effective share of replicates below which a few of them carry the mean."""

REACHED, AT_LEAST, BIASED, UNSEEN = "reached", "at least", "bias", "not resolved"


def estimators() -> list[Estimator]:
    """Return the estimators of log Z, one for every control that they simulate."""
    found: list[Estimator] = []
    for name in registry.estimator_names():
        first = registry.estimator(name)
        if first.estimand != "log_normalizer":
            continue
        kinds: dict[tuple[Any, Any], Estimator] = {}
        for options in ({}, *first.variants):
            chosen = registry.estimator(name, **options)
            kinds.setdefault((chosen.control, chosen.other_control), chosen)
        found += kinds.values()
    return found


def problems(most: int) -> list[Problem]:
    """Return the problems of at most so many steps times dimensions.

    Where X_0 may have the density of the base process it has: work needs it.
    """
    found = []
    for name in registry.problem_names():
        problem = registry.problem(name)
        if isinstance(problem.parameters.get("start"), str):
            problem = registry.problem(name, start="marginal")
        if problem.dim * problem.default_steps <= most:
            found.append(problem)
    return found


def step_counts(problem: Problem) -> list[int]:
    """Return the numbers of steps to try."""
    counts = {round(factor * problem.default_steps) for factor in FACTORS}
    return sorted(n for n in counts if n >= 2)


@dataclass(frozen=True)
class Measured:
    """An estimator at one number of steps.

    Attributes
    ----------
    bias : relative to Z, signed, with its interval; no width where it is exact.
    variance : of one path, relative to Z^2.
    seconds : per path and step, one thread.
    effective : share of the replicates that carry the mean.
    """

    n_steps: int
    bias: Interval
    variance: float
    seconds: float
    effective: float


@dataclass(frozen=True)
class Cost:
    """What an error costs: `REACHED`, `AT_LEAST`, `BIASED` or `UNSEEN`.

    ``path_steps`` and ``seconds`` are infinite where no number of paths is enough.
    """

    outcome: str
    n_steps: int
    path_steps: float
    seconds: float
    bias: float


def cost(rungs: list[Measured], error: float) -> Cost:
    """Return the least cost of a root mean square ``error`` relative to Z."""
    found = [_cost(rung, error) for rung in rungs]
    order = (REACHED, AT_LEAST, UNSEEN)
    possible = [c for c in found if c.outcome in order]
    if not possible:
        return found[-1]
    return min(possible, key=lambda c: (order.index(c.outcome), c.path_steps))


def _cost(rung: Measured, error: float) -> Cost:
    bias, low, high = rung.bias
    told = not low <= 0.0 <= high  # a bias not told apart from zero counts as zero
    least = min(abs(low), abs(high)) if told else 0.0
    if least >= error:
        return Cost(BIASED, rung.n_steps, inf, inf, bias)
    outcome, square = REACHED, bias**2 if told else 0.0
    if rung.effective < SEEN:
        outcome, square = UNSEEN, 0.0
    elif max(abs(low), abs(high)) >= error:
        outcome, square = AT_LEAST, 0.0
    steps = rung.variance / (error**2 - square) * rung.n_steps
    # one path at least, where there is no variance
    steps = max(steps, float(rung.n_steps))
    return Cost(outcome, rung.n_steps, steps, steps * rung.seconds, bias)


# ---- measurements -----------------------------------------------------------------
def measure(
    problem: Problem, estimator: Estimator, n_steps: int, level: float, seed: int
) -> Measured | str:
    """Return the measured bias and variance, or why there are none."""
    try:
        request = make_request(
            problem, point=POINT, n_steps=n_steps, n_paths=N_PATHS, seed=seed
        )
        if reason := refusal(request, estimator):
            return reason
        return _measure(request, estimator, level)
    except SDEBenchError as error:
        return str(error)


def _measure(request: Request, estimator: Estimator, level: float) -> Measured | str:
    problem, n_steps = request.problem, len(request.times) - 1
    logs, seconds = log_estimates(request, estimator)
    if not np.all(np.isfinite(logs)):
        return "it returned NaN or infinity; use more time steps"
    truth = problem.truth.log_normalizer()
    counts = estimator.declared_bias != "any"
    values = np.exp(logs - truth) if counts else 1.0 + logs - truth
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    reach = float(t_quantile(level, len(values) - 1)) * spread / np.sqrt(len(values))
    bias = Interval(mean - 1.0, mean - 1.0 - reach, mean - 1.0 + reach)
    answers = exact_answers(
        problem, estimator, request.theta, request.times, request.scheme
    )
    if counts and answers.target is not None:
        bias = Interval(*[expm1(float(answers.target[0]) - truth)] * 3)
    effective = float(values.sum() ** 2 / np.sum(values**2) / len(values))
    variance, missing = N_PATHS * spread**2, 1.0 + bias.estimate - mean
    if counts and answers.target is not None and missing > 0.5:
        # Weights of this mean came in none of the paths, so that their probability p
        # is below 5 / paths (99 %), and the second moment above missing^2 / p.
        variance, effective = missing**2 * N_PATHS * len(values) / 5.0, 0.0
    if not problem.weights_have_variance:
        effective = 0.0
    return Measured(
        n_steps,
        bias,
        variance,
        seconds / (len(values) * N_PATHS * n_steps),
        effective if counts else 1.0,
    )


def log_estimates(request: Request, estimator: Estimator) -> tuple[Array, float]:
    """Return log Z-hat of independent replicates, and their seconds of one thread."""
    problem, n_steps = request.problem, len(request.times) - 1
    settings = Settings(
        times=request.times,
        theta=request.theta,
        n_paths=N_PATHS,
        backend="numba" if "numba" in estimator.backends else "torch",
        dtype=request.dtype,
        device=request.device,
        seed=request.seed,
    )
    work = WORK // (N_PATHS * n_steps * problem.dim)
    count, origin = min(max(work, LEAST), MOST), n_steps << GRID_SHIFT
    values, seconds = np.empty(count), np.zeros(LANES)
    warm = make_worker(problem, [estimator], settings)  # compiles outside the clock
    warm.block(0, origin, min(warm.size, N_PATHS))

    def lane(number: int) -> None:
        worker = make_worker(problem, [estimator], settings)
        for replicate in range(number, count, LANES):
            mean = ReplicateMean(estimator)
            for first in range(0, N_PATHS, worker.size):
                size = min(worker.size, N_PATHS - first)
                begin = time.perf_counter()
                rows, _, _ = worker.block(replicate, origin + first, size)
                seconds[number] += time.perf_counter() - begin
                mean.add(rows[0], size)
            values[replicate] = mean.value(N_PATHS)[0]

    in_lanes(lane)
    return values, float(seconds.sum())
