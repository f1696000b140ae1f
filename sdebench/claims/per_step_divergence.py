r"""Per-step KL gradients: less variance than policy gradients, and another mean.

On-policy distillation knows a teacher, here u*, and differentiates the KL divergence of
every step with the states held fixed:

    detached   sum_n (dw_n/dtheta)^T (w_n - w*_n)
    full       detached + sum_n (dw_n/dtheta)^T z_n sum_{m > n} 1/2 |w_m - w*_m|^2
    policy     (c - b) sum_n (dw_n/dtheta)^T z_n + sum_n (dw_n/dtheta)^T w_n.

In continuous time full and policy gradient have the mean grad J, since
J(u) = J(u*) + 1/2 E int |u - u*|^2 dt; on a chain the two means differ by O(h).  What
detaching leaves out is the mean of the second term of "full",

- zero if u - u* does not depend on the state: open-loop controls and targets;
- zero at the optimum, where every summand vanishes: no variance either;
- else it need not vanish, and on the problems here it does not.

On these problems all means are exact.  As the two estimators have different means,
variances are compared twice: as they are, and each relative to its own squared mean.

Source: DiffusionOPD, arXiv:2605.15055; the comparison and the exact means are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.experiments.comparisons import quotient
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    exact,
    interval_of,
    records,
)
from sdebench.experiments.measuring import exact_chain_problems, gradient_scale, sample
from sdebench.measure.intervals import variance_interval
from sdebench.problem import POINTS, Problem
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DETACHED, FULL = "opd:gradient=detached", "opd:gradient=full"
POLICY = "reinforce:baseline=leave_one_out"
SHARED_PATHS = ((DETACHED, FULL), (POLICY,))
"""Estimators that can be measured on the same paths."""
N_REPLICATES = 256
MARGIN = 1.0
"""Percent of the gradient that counts as left out."""
ROUNDING = 1e-9
"""Relative size of an exact number that counts as zero."""


def problems_with_teacher() -> list[Problem]:
    """Return the problems with exact chains whose control family holds u*."""
    return [p for p in exact_chain_problems() if p.family_holds_optimum]


def exact_means(problem: Problem, point: str, n_steps: int) -> dict[str, float]:
    """Return sizes and distances of the exact means, relative to |grad J|.

    At the optimum, where the gradient is zero, relative to that at the point zero.
    """
    policy, truth = problem.truth.policy_chain(point, n_steps), problem.truth
    detached = policy.distillation_gradient(detached=True)
    full = policy.distillation_gradient(detached=False)
    sizes = {
        "own_size": detached,
        "policy_size": truth.gradient(point, n_steps),
        "left_out": full - detached,
        "distance": detached - truth.gradient(point),
        "full_distance": full - truth.gradient(point),
    }
    scale = gradient_scale(problem, point)
    return {name: float(np.linalg.norm(v)) / scale for name, v in sizes.items()}


@dataclass(frozen=True)
class PerStepDivergence(Claim):
    """Gradients of the per-step KL divergence against policy gradients."""

    statement: ClassVar[str] = (
        "The gradient of the per-step KL divergence from a teacher, with detached "
        "states, has a lower variance than the policy gradient with a leave-one-out "
        "baseline, also relative to its own mean. That mean leaves out a part of ∇J at "
        "feedback controls off the optimum, and nothing where the difference of "
        "student and teacher does not depend on the state."
    )
    source: ClassVar[str] = (
        "DiffusionOPD, arXiv:2605.15055; what is left out is our derivation"
    )
    procedure: ClassVar[str] = (
        "On every problem with exact N-step chains and u* in its control family: "
        f"variance of one path from {N_REPLICATES} replicates of 256 paths at the "
        "published number of steps, and the exact means. The teacher is u*, which is "
        "the answer that the policy gradient looks for. Left out is the exact "
        "difference between the gradients with and without detached states, of the "
        "same chain. All is relative to |∇J|, at the optimum to that at θ = 0."
    )
    decision_rule: ClassVar[str] = (
        "Supported if the variance is below that of the policy gradient at every "
        "evaluation point of every problem, and off the optimum the variance over the "
        "squared norm of the own exact mean is, too; and if what is left out is above "
        f"{MARGIN:.0f} % of the gradient where teacher and student differ by a "
        f"function of the state, and zero (below {ROUNDING:g}) elsewhere; refuted if "
        f"one of these is excluded; undecided otherwise. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        problems = problems_with_teacher()
        n_cells = len(problems) * len(POINTS)
        n_intervals = n_cells * sum(map(len, SHARED_PATHS))
        level = 1.0 - (1.0 - LEVEL) / n_intervals
        rows: list[dict[str, object]] = []
        for done, (problem, point) in enumerate(
            ((problem, point) for problem in problems for point in POINTS), start=1
        ):
            n_steps = problem.default_steps
            scale = gradient_scale(problem, point) ** 2
            means = exact_means(problem, point, n_steps)
            for names in SHARED_PATHS:
                found = sample(problem, names, point, n_steps, N_REPLICATES, seed)
                for name, (moments, n_paths) in zip(names, found, strict=True):
                    variance = variance_interval(moments, level, n_paths / scale)
                    rows.append(
                        {
                            "problem": problem.name,
                            "point": point,
                            "n_steps": n_steps,
                            "estimator": name,
                            **columns(variance),
                            **means,
                        }
                    )
            progress(done, n_cells)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        lower, relative, left_out = [], [], []
        for row in records(_cells(evidence)):
            where = f"{row.problem}, {row.point}"
            lower.append(
                Check(
                    quantity=f"{where}: variance, per-step KL by policy gradient",
                    interval=row.detached,
                    most=1.0,
                )
            )
            if row.point != "optimum":
                relative.append(
                    Check(
                        quantity=f"{where}: the same, relative to the own mean",
                        interval=row.relative,
                        most=1.0,
                    )
                )
            left_out.append(
                Check(
                    quantity=f"{where}: left out, exact",
                    interval=exact(100.0 * row.left_out),
                    unit="%",
                    **_region(row),
                )
            )
        return lower + relative + left_out

    def summary(self, evidence: pd.DataFrame) -> str:
        cells = _cells(evidence)
        off = cells[cells["point"] != "optimum"]
        feedback = off[~off["open_loop"]]
        low, high = _ends(off["detached"])
        least, most = _ends(off["relative"])
        full = _ends(off["full"])
        left_out = 100.0 * feedback["left_out"]
        return (
            f"Off the optimum the variance is {low} to {high} of the policy "
            f"gradient's, and {least} to {most} relative to the own mean; at the "
            "optimum it is zero. What detaching leaves out at feedback controls is "
            f"{plain(float(left_out.min()), 2)} to {plain(float(left_out.max()), 2)} "
            f"% of |∇J| (exact). With nothing left out the variance is {full[0]} to "
            f"{full[1]} times the policy gradient's."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "problem": row.problem,
                    "point": row.point,
                    "relative variance, policy gradient": interval(*row.policy),
                    "per-step KL by policy": interval(*row.detached),
                    "relative to own mean": interval(*row.relative),
                    "full KL by policy": interval(*row.full),
                    "left out, exact": _percent(row.left_out),
                    "per-step KL from ∇J": _percent(row.distance),
                    "full KL from ∇J": _percent(row.full_distance),
                }
                for row in records(_cells(evidence))
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, problem_looks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        cells = _cells(evidence)
        looks = problem_looks(sorted(set(cells["problem"])))
        with style():
            figure = new_figure(PAGE, 3.2)
            left, right = figure.subplots(1, 2)
            _draw_ratios(left, cells, looks)
            _draw_left_out(right, cells, looks)
            add_legend(figure, left, 4)
            for axes in (left, right):
                finish_axes(axes)
            settle(figure)
        return figure


def _cells(evidence: pd.DataFrame) -> pd.DataFrame:
    """Return one row per problem and point, with ratios as intervals."""
    rows = []
    for (name, point), mine in evidence.groupby(["problem", "point"], sort=False):
        found = {row.estimator: interval_of(row) for row in records(mine)}
        first = mine.iloc[0]
        policy, own = found[POLICY], exact(nan)
        detached = quotient(found[DETACHED], policy)
        if point != "optimum":
            own = detached.scaled((first["policy_size"] / first["own_size"]) ** 2)
        rows.append(
            {
                "problem": name,
                "point": point,
                "policy": policy,
                "detached": detached,
                "relative": own,
                "full": quotient(found[FULL], policy),
                "left_out": first["left_out"],
                "distance": first["distance"],
                "full_distance": first["full_distance"],
            }
        )
    cells = pd.DataFrame(rows)
    largest = cells.groupby("problem")["left_out"].transform("max")
    return cells.assign(open_loop=largest < ROUNDING)


def _region(row: Any) -> dict[str, float]:
    """Return where what is left out must be, in percent."""
    if row.open_loop or row.point == "optimum":
        return {"most": 100.0 * ROUNDING}
    return {"least": MARGIN}


def _ends(ratios: pd.Series) -> tuple[str, str]:
    """Return the smallest and the largest estimate as texts."""
    values = [found.estimate for found in ratios]
    return plain(min(values), 2), plain(max(values), 2)


def _percent(share: float) -> str:
    # rounded, as a csv file may change the last bit
    return f"{plain(round(100.0 * share, 9) if share > ROUNDING else 0.0)} %"


def _places(looks: dict[str, dict[str, Any]], points: list[str]) -> dict[str, Any]:
    """Return the horizontal places of each problem, side by side at every point."""
    return {
        name: np.arange(len(points)) + 0.085 * (i - 0.5 * (len(looks) - 1))
        for i, name in enumerate(looks)
    }


def _draw_ratios(
    axes: Axes, cells: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw variance ratios: filled per-step KL, hollow with nothing left out."""
    from sdebench.experiments.drawing import plain_ticks

    points = [point for point in POINTS if point != "optimum"]
    places = _places(looks, points)
    axes.set_yscale("log")
    axes.axhline(1.0, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
    for name, look in looks.items():
        mine = cells[cells["problem"] == name].set_index("point").loc[points]
        shown = {"color": look["color"], "marker": look["marker"], "ls": ""}
        for column, fill, label in (("full", "white", None), ("detached", None, name)):
            value, low, high = np.array(list(mine[column])).T
            axes.vlines(places[name], low, high, color=look["color"], lw=0.9)
            axes.plot(
                places[name],
                value,
                ms=4,
                mfc=look["color"] if fill is None else fill,
                label=label,
                **shown,
            )
    plain_ticks(axes)
    axes.set_xticks(range(len(points)), points)
    axes.set_ylabel("variance by that of the policy gradient")
    axes.set_title("filled: per-step KL; hollow: nothing left out", loc="left", pad=3)


def _draw_left_out(
    axes: Axes, cells: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw the exact share that detaching leaves out."""
    points = list(POINTS)
    places = _places(looks, points)
    for name, look in looks.items():
        mine = cells[cells["problem"] == name].set_index("point").loc[points]
        shown = {"color": look["color"], "marker": look["marker"], "ls": ""}
        axes.plot(places[name], 100.0 * mine["left_out"], ms=4, **shown)
    axes.set_ylim(bottom=-2.0)
    axes.set_xticks(range(len(points)), points)
    axes.set_ylabel("% of |∇J|")
    axes.set_title("left out by detached states, exact", loc="left", pad=3)
