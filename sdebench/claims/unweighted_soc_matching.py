r"""Unweighted SOC Matching has the optimal control as fixed point, Work-SOCM has not.

Both regress the control on labels from paths of the control itself, without importance
weights, and differ in how the path is shifted: with y_k = z_k + w_k the noise of the
base process, and D_k = (R_k - d mean_k/dx)^T G_k^{-T},

    unweighted   a_k = R_k^T a_{k+1} + grad f_k + D_k y_k
    work         a_k = p_k + C_k b_k,   p_k = R_k^T p_{k+1} + grad f_k,
                 b_k = R_k^T b_{k+1} - D_k z_k,   C_k the cost from k on but |w|^2

from -grad r(X_N); R = 1 is M = 1.  Training stops where w_n = -G_n^T E[a_{n+1} | X_n]
on the paths of w.  If the mean of a_{k+1} is grad V_{k+1}, there
w_k = -G_k^T E grad V_{k+1}, the two terms with R_k cancel in the mean of a_k, and what
is left, (d mean_k/dx)^T E grad V_{k+1} + grad f_k, is grad V_k: the best feedback is a
fixed point for every R.  Work-SOCM corrects the density for the shift of the states as
if the control did not depend on them: a feedback spoils it, unless psi follows the
Jacobian of the base, where nothing has to be corrected.

On an affine chain E[a_k | X_k] is affine and the fixed point is one pass backward in
time, exact.  The simulation measures the mean gradient of the loss at the best feedback
of the chain, where it should be zero.

Source: Domingo-Enrich 2024, arXiv:2410.00345 (the losses, as coded on its research
branch); the chain's labels and fixed points are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.closed_form.soc_matching import fixed_feedback
from sdebench.experiments.chain_optimum import ChainOptimum
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    exact,
    interval_of,
    records,
    signed,
)
from sdebench.experiments.measuring import N_PATHS, PILOT, mean_interval, sample
from sdebench.linear_problem import LinearProblem
from sdebench.measure.intervals import Interval, t_quantile
from sdebench.problem import Problem
from sdebench.report.format import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBLEMS = (
    "damped_oscillator",
    "ddpm_chain",
    "gaussian_tilt",
    "ou_quadratic_hard:dim=2",
    "ou_quadratic_no_state_cost:dim=2",
)
LOSSES = {"plain": "unweighted", "work": "Work-SOCM"}
MATRICES = ("identity", "exponential", "jacobian")
RATE = 1.0
MULTIPLES = (1, 4, 16)
"""Of a problem's default number of steps, for the exact fixed points."""
SIMULATED_STEPS = 16
DISTANCE = 1.0
"""Percent of the optimal control by which a fixed point is off."""
LASTING = (0.9, 1.2)
"""What the distance may be multiplied by when the number of steps is, by four."""
MARGIN = 0.4
"""Percent of the gradient without control that tells zero from something."""
HALF_WIDTH = 0.2
"""Percent aimed at for the simulated means."""
ROUNDING = 1e-7
"""Percent that counts as zero among exact numbers."""


def is_fixed(loss: str, matrices: str) -> bool:
    """Return whether the optimum should be a fixed point."""
    return loss == "plain" or matrices == "jacobian"


def spec(loss: str, matrices: str) -> str:
    """Return the specification of the estimator."""
    return f"soc_matching:weights=none,loss={loss},matrices={matrices},rate={RATE}"


def fixed_point(
    problem: Problem, loss: str, matrices: str, n_steps: int
) -> tuple[float, float]:
    """Return distance and excess cost of the fixed point, in percent.

    The distance from the best feedback under whose paths it is measured, relative to
    that feedback's size; the cost beyond the least one, relative to its size.
    """
    chain = problem.truth.policy_chain("optimum", n_steps).chain
    factors = {"identity": 1.0, "exponential": exp(-RATE / n_steps), "jacobian": None}
    found = fixed_feedback(chain, work=loss == "work", decay=factors[matrices])
    best = chain.optimal_feedback()
    size = chain.control_distance(*best, 0.0 * best[0], 0.0 * best[1])
    gap = chain.control_distance(*best, *found)
    least = chain.objective(*best)
    excess = (chain.objective(*found) - least) / abs(least)
    return 100.0 * float(np.sqrt(gap / size)), 100.0 * float(excess)


@dataclass(frozen=True)
class UnweightedSOCMatching(Claim):
    """Unweighted SOC Matching stops at the optimal control, Work-SOCM elsewhere."""

    statement: ClassVar[str] = (
        "SOC Matching without its importance weights has the optimal control as fixed "
        "point for every reparametrisation matrix; Work-SOCM has it only where these "
        "matrices are the Jacobians of the base process, and with M = 1 stops at "
        "another control."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich 2024, arXiv:2410.00345, the losses as coded on its research "
        "branch; the labels of the chain and their fixed points are ours"
    )
    procedure: ClassVar[str] = (
        "Exact: the feedback at which training on the labels of its own paths stops, "
        "on affine chains with "
        f"{', '.join(str(m) for m in MULTIPLES)} times the published number of steps; "
        "its distance from the best feedback of the chain, relative to that, and its "
        f"excess cost. Simulated: the mean gradient of the loss at the best feedback "
        f"of the chain with {SIMULATED_STEPS} steps, for controls that are a multiple "
        "of it, relative to the gradient of J without control. Matrices: M = 1, "
        "M = exp(−(s − t)/T), and the Jacobian."
    )
    decision_rule: ClassVar[str] = (
        "Supported if the fixed point of unweighted SOC Matching, and of Work-SOCM "
        "with the Jacobian, is the best feedback up to rounding, that of Work-SOCM "
        f"with the other matrices off by more than {DISTANCE:g} %, and this distance "
        "does not vanish with the time step (it changes by a factor of "
        f"{LASTING[0]:g} to {LASTING[1]:g} from a quarter of the finest steps to "
        "these); and if the simulated mean gradient is within "
        f"±{MARGIN:g} % where the optimum is a fixed point, and not where it is not; "
        f"refuted if one of these is excluded; undecided otherwise. All intervals "
        f"{JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for done, name in enumerate(PROBLEMS, start=1):
            problem = registry.problem(name)
            rows += _fixed_points(problem)
            if isinstance(problem, LinearProblem):
                rows += _simulated(problem, seed)
            progress(done, len(PROBLEMS))
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        found = []
        fixed = evidence[evidence["kind"] == "fixed point"]
        keys = ["problem", "loss", "matrices"]
        for key, mine in fixed.groupby(keys, sort=False):
            name, loss, matrices = map(str, key)
            where = f"{name}, {LOSSES[loss]}, {matrices}"
            distances = mine.sort_values("n_steps")["value"].to_numpy()
            if is_fixed(loss, matrices):
                found.append(
                    Check(
                        quantity=f"{where}: largest distance of the fixed point",
                        interval=exact(float(distances.max())),
                        most=ROUNDING,
                        unit="%",
                    )
                )
                continue
            found += [
                Check(
                    quantity=f"{where}: distance of the fixed point",
                    interval=exact(float(distances[-1])),
                    least=DISTANCE,
                    unit="%",
                ),
                Check(
                    quantity=f"{where}: change of the distance with the steps",
                    interval=exact(float(distances[-1] / distances[-2])),
                    least=LASTING[0],
                    most=LASTING[1],
                ),
            ]
        for row in records(evidence[evidence["kind"] == "simulated"]):
            where = f"{row.problem}, {LOSSES[row.loss]}, {row.matrices}"
            interval = interval_of(row)
            wanted: dict[str, float] = {"least": -MARGIN, "most": MARGIN}
            if not is_fixed(row.loss, row.matrices):
                interval, wanted = _size(interval), {"least": MARGIN}
            found.append(
                Check(
                    quantity=f"{where}: simulated gradient at the best feedback",
                    interval=interval,
                    unit="%",
                    **wanted,
                )
            )
        return found

    def summary(self, evidence: pd.DataFrame) -> str:
        fixed = evidence[evidence["kind"] == "fixed point"]
        fine = fixed[
            fixed["n_steps"].eq(fixed.groupby("problem")["n_steps"].transform("max"))
        ]
        one = fine[fine["loss"].eq("work") & fine["matrices"].eq("identity")]
        right = fixed[[is_fixed(r.loss, r.matrices) for r in records(fixed)]]
        simulated = evidence[evidence["kind"] == "simulated"]
        kept = [is_fixed(r.loss, r.matrices) for r in records(simulated)]
        reach = simulated[kept][["low", "high"]].abs().to_numpy().max()
        wrong = simulated[~np.array(kept)]["value"].abs()
        most = float(right["value"].max())
        off = "the best feedback" if most <= ROUNDING else f"{plain(most, 2)} % off it"
        return (
            "The fixed point of unweighted SOC Matching, and of Work-SOCM with the "
            f"Jacobian, is {off} on every chain. With M = 1 Work-SOCM stops "
            f"{plain(float(one['value'].min()), 2)} to "
            f"{plain(float(one['value'].max()), 2)} % from it in fine steps, at a cost "
            f"{plain(float(one['excess'].min()), 2)} to "
            f"{plain(float(one['excess'].max()), 2)} % above the least. Simulated at "
            "the best feedback, the mean gradient is at most "
            f"{plain(float(reach), 2)} % of that without control where it should "
            f"vanish, and {plain(float(wrong.min()), 2)} to "
            f"{plain(float(wrong.max()), 2)} % elsewhere."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = []
        fixed = evidence[evidence["kind"] == "fixed point"]
        simulated = evidence[evidence["kind"] == "simulated"]
        keys = ["problem", "loss", "matrices"]
        for key, mine in fixed.groupby(keys, sort=False):
            last = records(mine.sort_values("n_steps"))[-1]
            match = simulated[(simulated[keys] == list(key)).all(axis=1)]
            gradient, mean = "–", "–"
            for row in records(match):
                gradient = f"{signed(interval_of(row))} %"
                zero = abs(row.exact) < ROUNDING
                mean = f"{signed(exact(0.0 if zero else row.exact))} %"
            rows.append(
                {
                    "problem": last.problem,
                    "loss": LOSSES[last.loss],
                    "matrices": last.matrices,
                    "N": str(last.n_steps),
                    "distance of the fixed point": f"{_percent(last.value)} %",
                    "excess cost": f"{_percent(last.excess)} %",
                    "gradient at the best feedback, simulated": gradient,
                    "exact": mean,
                }
            )
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, problem_looks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        fixed = evidence[evidence["kind"] == "fixed point"]
        looks = problem_looks(list(dict.fromkeys(fixed["problem"])))
        with style():
            figure = new_figure(PAGE, 3.2)
            left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
            one = fixed[fixed["loss"].eq("work") & fixed["matrices"].eq("identity")]
            _draw_distances(left, one, looks)
            _draw_means(right, evidence[evidence["kind"] == "simulated"], looks)
            add_legend(figure, left, 3)
            for axes in (left, right):
                finish_axes(axes)
            settle(figure)
        return figure


def _percent(value: float) -> str:
    """Return a number of percent, zero where it is rounding."""
    return plain(0.0 if abs(value) < ROUNDING else value)


def _size(interval: Interval) -> Interval:
    """Return the interval of the absolute value."""
    value, low, high = interval
    least = 0.0 if low <= 0.0 <= high else min(abs(low), abs(high))
    return Interval(abs(value), least, max(abs(low), abs(high)))


def _fixed_points(problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield the exact fixed points of a problem."""
    for loss in LOSSES:
        for matrices in MATRICES:
            for multiple in MULTIPLES:
                n_steps = multiple * problem.default_steps
                distance, excess = fixed_point(problem, loss, matrices, n_steps)
                yield {
                    "kind": "fixed point",
                    "problem": problem.label,
                    "loss": loss,
                    "matrices": matrices,
                    "n_steps": n_steps,
                    "excess": excess,
                    **columns(exact(distance)),
                }


def _simulated(base: LinearProblem, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the mean gradients at the best feedback of the chain, in percent."""
    problem = ChainOptimum(base=base, n_steps=SIMULATED_STEPS)
    scale = 100.0 / abs(problem.truth.gradient("zero", SIMULATED_STEPS)[0])
    policy = problem.truth.policy_chain("optimum", SIMULATED_STEPS)
    count = len(PROBLEMS) * len(LOSSES) * len(MATRICES)
    level = 1.0 - (1.0 - LEVEL) / count
    for loss in LOSSES:
        for matrices in MATRICES:
            name = spec(loss, matrices)
            arguments = (problem, [name], "optimum", SIMULATED_STEPS)
            ((pilot, _),) = sample(*arguments, PILOT, seed ^ 1)
            reach = t_quantile(level, pilot.n - 1) * scale / HALF_WIDTH
            replicates = max(PILOT, int(np.ceil(pilot.trace * reach**2 / N_PATHS)))
            ((moments, _),) = sample(*arguments, replicates, seed)
            target = registry.estimator(name).target(policy)
            assert target is not None
            yield {
                "kind": "simulated",
                "problem": base.label,
                "loss": loss,
                "matrices": matrices,
                "n_steps": SIMULATED_STEPS,
                "exact": scale * float(target[0]),
                **columns(mean_interval(moments, level).scaled(scale)),
            }


def _draw_distances(
    axes: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw the distance of the fixed point against the number of steps."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, look in looks.items():
        mine = rows[rows["problem"] == name]
        axes.plot(mine["n_steps"], mine["value"], ms=3.5, lw=1.1, label=name, **look)
    axes.set_ylim(1.0, 100.0)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("number of time steps N")
    axes.set_ylabel("% of the optimal control")
    axes.set_title("fixed point of Work-SOCM, M = 1", loc="left", pad=3)


def _draw_means(
    axes: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw the simulated mean gradients and the exact ones."""
    cases = [(loss, matrices) for loss in LOSSES for matrices in MATRICES]
    axes.axhspan(-MARGIN, MARGIN, color="0.93", lw=0, zorder=0)
    names = [name for name in looks if name in set(rows["problem"])]
    for i, name in enumerate(names):
        mine = rows[rows["problem"] == name].set_index(["loss", "matrices"]).loc[cases]
        x = np.arange(len(cases)) + 0.16 * (i - 0.5 * (len(names) - 1))
        look = looks[name]
        axes.vlines(x, mine["low"], mine["high"], color=look["color"], lw=1.2)
        shown = {"color": look["color"], "marker": look["marker"]}
        axes.plot(x, mine["value"], ms=3.5, ls="", **shown)
        axes.plot(x, mine["exact"], ms=7, ls="", marker="_", color="0.2")
    axes.set_xticks(range(len(cases)), [matrices for _, matrices in cases])
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])
    for start, label in ((0, "unweighted"), (len(MATRICES), "Work-SOCM")):
        axes.text(
            start + 1.0,
            0.97,
            label,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
        )
    axes.set_ylabel("mean gradient, % of |∇J(0)|")
    axes.set_title("at the best feedback, simulated", loc="left", pad=3)
