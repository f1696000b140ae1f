r"""Crooks weights are unbiased at every number of steps, Riemann sums are not.

Along the path of densities rho_t = p_t e^{lambda_t r} of a memoryless denoising process
two weights have the mean Z = E_{p_T} e^r in continuous time. On a chain of N steps

    Crooks   W = rho_N(X_N) prod B_n(X_{n+1}, X_n) / [p_0(X_0) prod F_n(X_n, X_{n+1})]

still has: every backward kernel B_n is a density, so that integrating out X_0, X_1, ...
in turn leaves the integral of rho_N.  The Riemann sum of the work,

    Jarzynski     log W = sum_n h (lambda' r + lambda v . grad r)(X_n),

is off by O(h); on Gaussian problems its mean is the normalizer of a chain with running
costs, exact to rounding.

Measured is the mean of the weights themselves, not of its logarithm, which has a bias
of its own.  The weights of three problems, where Z is a closed form that takes no part
in the simulation, are averaged over independent paths.  The mixtures are noised slowly:
with few steps of fast noising the weights are still unbiased, but their tail is too
heavy for an interval of a mean (by iterated integrals the third moment of a Crooks
weight on two_modes is 1900 times the variance to the power 3/2 at 8 steps and rate 4,
and 21 times at rate 2).

Sources: Jarzynski 1997, Phys. Rev. Lett. 78, 2690; Crooks 1999, Phys. Rev. E 60, 2721;
under tilting arXiv:2605.00229.  The exact means are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.closed_form.work import log_mean_work
from sdebench.estimators._work import ANNEALING
from sdebench.experiments.comparisons import LANES, in_lanes
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    exact,
    interval_of,
    records,
    signed,
)
from sdebench.experiments.measuring import N_PATHS, settings_at
from sdebench.measure.intervals import Interval, t_quantile
from sdebench.measure.workers import GRID_SHIFT, make_worker
from sdebench.problem import Problem
from sdebench.report.format import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBLEMS = ("gaussian_tilt", "two_modes:start=marginal,rate=2", "four_modes:rate=1")
CROOKS, JARZYNSKI = ESTIMATORS = "crooks", "jarzynski"
NAMES = {CROOKS: "Crooks, kernel ratios", JARZYNSKI: "Jarzynski, Riemann sum"}
STEPS = (8, 16, 32, 64)
RANGE = (8, 64)
"""Numbers of steps between which the order of the bias is judged."""
N_REPLICATES = 1 << 14
"""Replicates of `N_PATHS` paths per problem and number of steps."""
MARGIN = 1.0
"""Percent of Z by which an unbiased mean may be off."""
BIASED = 3.0
"""Percent of Z by which a biased mean must be off with the fewest steps."""
ORDERS = (0.5, 1.5)
N_INTERVALS = len(PROBLEMS) * len(STEPS) * len(ESTIMATORS)


def weight_sums(
    problem: Problem, n_steps: int, n_replicates: int, seed: int
) -> np.ndarray:
    """Return sums of W^0, W^1 and W^2 over all paths, (3, estimators)."""
    chosen = [registry.estimator(name) for name in ESTIMATORS]
    settings = settings_at(problem, "zero", n_steps, seed)
    origin = n_steps << GRID_SHIFT
    sums = np.zeros((LANES, 3, len(chosen)))

    def lane(number: int) -> None:
        worker = make_worker(problem, chosen, settings)
        for replicate in range(number, n_replicates, LANES):
            for first in range(0, N_PATHS, worker.size):
                count = min(worker.size, N_PATHS - first)
                rows, _, _ = worker.block(replicate, origin + first, count)
                weights = np.exp([row[0, :count] for row in rows])
                for power in range(3):
                    sums[number, power] += np.sum(weights**power, axis=1)

    in_lanes(lane)
    total: np.ndarray = sums.sum(axis=0)
    return total


def mean_weight(sums: np.ndarray) -> tuple[Interval, float]:
    """Return the mean weight with its interval, and (E W)^2 / E W^2."""
    n, first, second = sums
    mean = first / n
    error = sqrt((second / n - mean**2) / (n - 1.0))
    reach = t_quantile(LEVEL, n - 1.0, N_INTERVALS) * error
    return Interval(mean, mean - reach, mean + reach), float(n * mean**2 / second)


def exact_excess(problem: Problem, n_steps: int) -> float:
    """Return the exact mean of the Riemann-sum weight in percent of Z, less 100."""
    chain = problem.truth.policy_chain("zero", n_steps).chain
    power = ANNEALING[registry.estimator(JARZYNSKI).options["annealing"]]
    excess = log_mean_work(chain, power) - problem.truth.log_normalizer()
    return 100.0 * (exp(excess) - 1.0)


def size(found: Interval) -> Interval:
    """Return the interval of the absolute value."""
    value, low, high = found
    ends = sorted((abs(low), abs(high)))
    return Interval(abs(value), 0.0 if low <= 0.0 <= high else ends[0], ends[1])


def order(coarse: Interval, fine: Interval, factor: float) -> Interval:
    """Return p of a bias ~ h^p from its sizes at h and at h / ``factor``."""

    def power(large: float, small: float) -> float:
        if large <= 0.0:
            return -inf
        return inf if small <= 0.0 else log(large / small) / log(factor)

    return Interval(
        power(coarse.estimate, fine.estimate),
        power(coarse.low, fine.high),
        power(coarse.high, fine.low),
    )


@dataclass(frozen=True)
class WorkIdentities(Claim):
    """Kernel ratios are unbiased for Z at any number of steps, Riemann sums are not."""

    statement: ClassVar[str] = (
        "Under tilting, the Crooks kernel-ratio weight is unbiased for Z at every "
        "number of steps; the Jarzynski weight with the work as a Riemann sum is "
        "biased at order h."
    )
    source: ClassVar[str] = (
        "Jarzynski 1997 and Crooks 1999; under tilting arXiv:2605.00229; exact means "
        "are ours"
    )
    procedure: ClassVar[str] = (
        f"Annealed paths on {', '.join(PROBLEMS)} with N = "
        f"{', '.join(map(str, STEPS))} steps, {N_REPLICATES * N_PATHS:,} paths each: "
        "the mean weight minus Z in percent of Z, Z in closed form. On gaussian_tilt "
        "the mean of the Riemann-sum weight is exact, too."
    )
    decision_rule: ClassVar[str] = (
        f"Supported if every mean Crooks weight is within {MARGIN:.0f} % of Z; every "
        f"mean Riemann-sum weight with {STEPS[0]} steps is off by at least "
        f"{BIASED:.0f} %, its bias falls from {RANGE[0]} to {RANGE[1]} steps with an "
        f"order between {ORDERS[0]} and {ORDERS[1]}, and on gaussian_tilt it is "
        f"within {MARGIN:.0f} % of Z of the exact one; refuted if one of these is "
        "excluded; undecided otherwise. All "
        f"{N_INTERVALS} intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        cells = [(name, n_steps) for name in PROBLEMS for n_steps in STEPS]
        for done, (name, n_steps) in enumerate(cells, start=1):
            problem = registry.problem(name)
            z = exp(problem.truth.log_normalizer())
            sums = weight_sums(problem, n_steps, N_REPLICATES, seed)
            keys = {"problem": name, "n_steps": n_steps}
            for estimator, mine in zip(ESTIMATORS, sums.T, strict=True):
                found, share = mean_weight(mine)
                excess = Interval(*(100.0 * (value / z - 1.0) for value in found))
                own = {"kind": "simulated", "estimator": estimator, "share": share}
                rows.append(keys | own | columns(excess))
            if name == PROBLEMS[0]:
                value = exact(exact_excess(problem, n_steps))
                own = {"kind": "exact", "estimator": JARZYNSKI, "share": np.nan}
                rows.append(keys | own | columns(value))
            progress(done, len(cells))
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        simulated = evidence[evidence["kind"] == "simulated"]
        out = []
        for row in records(simulated[simulated["estimator"] != JARZYNSKI]):
            out.append(
                Check(
                    quantity=f"{row.problem}, N = {row.n_steps}, {NAMES[row.estimator]}"
                    ": mean weight minus Z",
                    interval=interval_of(row),
                    least=-MARGIN,
                    most=MARGIN,
                    unit="%",
                )
            )
        for name in PROBLEMS:
            biases = _biases(evidence, name)
            out.append(
                Check(
                    quantity=f"{name}, N = {STEPS[0]}: bias of the Riemann-sum weight",
                    interval=size(biases[STEPS[0]]),
                    least=BIASED,
                    unit="%",
                )
            )
            coarse, fine = (size(biases[n]) for n in RANGE)
            out.append(
                Check(
                    quantity=f"{name}: order of that bias in the step",
                    interval=order(coarse, fine, RANGE[1] / RANGE[0]),
                    least=ORDERS[0],
                    most=ORDERS[1],
                )
            )
        biases = _biases(evidence, PROBLEMS[0])
        for row in records(evidence[evidence["kind"] == "exact"]):
            gap = (value - abs(row.value) for value in size(biases[row.n_steps]))
            out.append(
                Check(
                    quantity=f"{row.problem}, N = {row.n_steps}: simulated minus exact "
                    "size of that bias",
                    interval=Interval(*gap),
                    least=-MARGIN,
                    most=MARGIN,
                    unit="%",
                )
            )
        return out

    def summary(self, evidence: pd.DataFrame) -> str:
        simulated = evidence[evidence["kind"] == "simulated"]
        unbiased = simulated[simulated["estimator"] != JARZYNSKI]
        largest = max(max(map(abs, interval_of(row))) for row in records(unbiased))
        texts = []
        for name in PROBLEMS:
            biases = _biases(evidence, name)
            few, many = (signed(biases[n], 1) for n in (STEPS[0], STEPS[-1]))
            texts.append(f"{few} % to {many} % on {name}")
        return (
            f"From {STEPS[0]} to {STEPS[-1]} steps no mean Crooks weight is off by "
            f"more than {plain(largest, 2)} % of Z; the Riemann-sum weights go from "
            f"{', '.join(texts)}."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = []
        for (name, n_steps), mine in evidence.groupby(
            ["problem", "n_steps"], sort=False
        ):
            shown = {"problem": name, "N": str(n_steps)}
            for row in records(mine[mine["kind"] == "simulated"]):
                heading = NAMES[row.estimator]
                shown[f"{heading}: bias, %"] = signed(interval_of(row))
                shown[f"{heading}: sampled effective share"] = plain(row.share, 2)
            values = mine[mine["kind"] == "exact"]["value"]
            shown["Riemann sum, exact bias, %"] = (
                f"{values.iloc[0]:.2f}" if len(values) else "–"
            )
            rows.append(shown)
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.7)
            panels = figure.subplots(1, len(PROBLEMS))
            for axes, name in zip(panels, PROBLEMS, strict=True):
                _draw(axes, name, evidence[evidence["problem"] == name])
                finish_axes(axes)
            panels[0].set_ylabel("mean weight minus Z, % of Z")
            add_legend(figure, panels[0], 4)
            settle(figure)
        return figure


def _biases(evidence: pd.DataFrame, problem: str) -> dict[int, Interval]:
    """Return the simulated bias of the Riemann-sum weight by number of steps."""
    mine = (evidence["kind"] == "simulated") & (evidence["estimator"] == JARZYNSKI)
    rows = records(evidence[mine & (evidence["problem"] == problem)])
    return {int(row.n_steps): interval_of(row) for row in rows}


def _draw(axes: Axes, problem: str, rows: pd.DataFrame) -> None:
    """Draw the biases of one problem against the number of steps."""
    import seaborn as sns
    from matplotlib.ticker import NullLocator

    blue, orange = sns.color_palette("colorblind")[:2]
    looks = {CROOKS: (blue, "o"), JARZYNSKI: (orange, "D")}
    axes.axhline(0.0, color="0.35", lw=0.8)
    for estimator, (color, marker) in looks.items():
        mine = rows[(rows["estimator"] == estimator) & (rows["kind"] == "simulated")]
        value = mine["value"].to_numpy()
        axes.errorbar(
            mine["n_steps"],
            value,
            yerr=[value - mine["low"], mine["high"] - value],
            fmt=marker,
            ms=3.5,
            lw=1.2,
            color=color,
            label=NAMES[estimator],
        )
    if problem == PROBLEMS[0]:
        found = registry.problem(problem)
        steps = np.unique(np.geomspace(STEPS[0], STEPS[-1], 15).astype(int))
        curve = [exact_excess(found, int(n)) for n in steps]
        axes.plot(steps, curve, color=orange, lw=1.0, label="Riemann sum, exact")
    axes.set_xscale("log", base=2)
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of steps N")
    axes.set_title(problem.partition(":")[0], loc="left", pad=3)
