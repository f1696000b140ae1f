r"""The lean adjoint gives the gradient of J at the optimum, and not elsewhere.

Along a path of the control u the pathwise adjoint and the lean one solve

    full   da/dt  = -[(grad b + sigma grad u)^T a  + grad(f + |u|^2 / 2)]
    lean   da~/dt = -[ grad b^T a~                 + grad f             ],

both from a_T = -grad r(X_T); with either one, adjoint matching takes the step
E int (du/dtheta)^T (u + sigma^T a) dt.  With the full adjoint that is the gradient of
J.  The terms that the lean one lacks are (grad u)^T (u + sigma^T a), so that

- at the optimum, where u = -sigma^T E[a | X_t], they have mean zero: both give zero;
- if u does not depend on x they are not there at all: the lean adjoint is exact for
  every open-loop control, and so at theta = 0, at the start of training;
- else they need not vanish, and on the problems here they do not.

On problems with an exact chain both means are known, `Truth.gradient` and
`Truth.matching_gradient`, in continuous time and for N steps.  The two differ by
O(1/N) at theta*, because theta* is not the optimum of the N-step chain; the ladder in
N shows that the difference vanishes.  The simulation knows none of this: it measures
the mean of the estimator's numba kernel and compares it with the exact gradient of the
chain.

Source: Domingo-Enrich, Drozdzal, Karrer and Chen 2024, arXiv:2409.08861, section 5
(lean adjoint); the remark on open-loop controls is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.experiments.experiment import Progress, columns, interval_of, records
from sdebench.experiments.measuring import (
    Array,
    distance,
    exact_chain_problems,
    gradient_scale,
)
from sdebench.measure.intervals import Interval
from sdebench.problem import POINTS, Problem
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN = 1.0
"""Percent of the gradient that tells "wrong" from "right"."""
HALF_WIDTHS = {"right": 0.004, "wrong": 0.01}
"""Aimed at for the intervals, relative to the gradient, where the lean adjoint should
be right and where not."""
LADDER = (1, 2, 4, 8)
"""Multiples of a problem's default number of steps."""
FINE = 8
"""Multiple at which the optimum is simulated: its O(1/N) is then small enough."""
ROUNDING = 1e-9
"""Relative difference of exact numbers that counts as none."""


def is_open_loop(problem: Problem, theta: Array) -> bool:
    """Return whether u_theta(x, t) is the same for two x, at a few times."""
    start, end = problem.time_span
    policy = problem.truth.policy
    states = np.stack([np.zeros(problem.dim), np.linspace(1.0, 2.0, problem.dim)])
    return all(
        np.ptp(policy(states, t, theta), axis=0).max() == 0.0
        for t in np.linspace(start, end, 5)
    )


def difference(problem: Problem, point: str, n_steps: int | None = None) -> float:
    """Return |lean - full| / |full| of the exact means, in percent.

    At the optimum, where the gradient is zero, relative to that at the point zero.
    """
    truth = problem.truth
    lean = truth.matching_gradient(point, n_steps)
    gap = float(np.linalg.norm(lean - truth.gradient(point, n_steps)))
    return 100.0 * gap / gradient_scale(problem, point)


def cosine(problem: Problem, point: str) -> float:
    """Return the cosine between the two exact means; nan where one is zero."""
    lean, full = problem.truth.matching_gradient(point), problem.truth.gradient(point)
    size = np.linalg.norm(lean) * np.linalg.norm(full)
    scale = gradient_scale(problem, point)
    return float(lean @ full / size) if size > (ROUNDING * scale) ** 2 else np.nan


@dataclass(frozen=True)
class LeanAdjoint(Claim):
    """The lean adjoint is right at the optimum and wrong off it."""

    statement: ClassVar[str] = (
        "With the lean adjoint, adjoint matching follows the gradient of the control "
        "objective J at the optimum, where both vanish, and at open-loop controls, but "
        "not at other feedback controls: there its mean is another vector."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich et al. 2024, arXiv:2409.08861, section 5; the remark on "
        "open-loop controls is ours"
    )
    procedure: ClassVar[str] = (
        "On every problem whose N-step chain has exact gradients: the exact mean of "
        "adjoint matching against the exact ∇J, in continuous time and for N steps; "
        "and the mean of the simulated estimator against the exact ∇J of the chain, at "
        "the published number of steps, at the optimum with "
        f"{FINE} times as many. Differences are relative to |∇J|, at the optimum to "
        "that at θ = 0."
    )
    decision_rule: ClassVar[str] = (
        f"Supported if the simulated mean differs from ∇J by more than {MARGIN:.0f} % "
        "at every feedback control off the optimum (halfway, overshoot) and by less at "
        "the optimum and at every open-loop control (θ = 0 among them), and if the "
        f"exact difference is zero there in continuous time (below {ROUNDING:g}) and "
        "at the optimum falls like 1/N (order 0.8 to 1.2 at the last doubling); "
        "refuted if one of these is excluded; undecided otherwise. All intervals "
        f"{JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        problems = exact_chain_problems()
        n_cells = len(problems) * len(POINTS)
        rows: list[dict[str, object]] = []
        for problem in problems:
            for point, theta in problem.points.items():
                n_steps = problem.default_steps * (FINE if point == "optimum" else 1)
                open_loop = is_open_loop(problem, theta)
                right = open_loop or point == "optimum"
                found = distance(
                    problem,
                    "adjoint_matching",
                    point,
                    n_steps,
                    problem.truth.gradient(point, n_steps),
                    half_width=HALF_WIDTHS["right" if right else "wrong"],
                    n_intervals=n_cells,
                    seed=seed,
                )
                rows.append(
                    {
                        "kind": "simulated",
                        "problem": problem.name,
                        "point": point,
                        "n_steps": n_steps,
                        "open_loop": open_loop,
                        "right": right,
                        **columns(found.scaled(100.0)),
                        "exact": difference(problem, point, n_steps),
                        "continuous": difference(problem, point),
                        "cosine": cosine(problem, point),
                    }
                )
                progress(len(rows), n_cells)
        return pd.concat([pd.DataFrame(rows), _ladder(problems)], ignore_index=True)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        wrong, right = [], []
        for row in records(evidence[evidence["kind"] == "simulated"]):
            where = f"{row.problem}, {row.point}"
            found = interval_of(row)
            if row.right:
                right.append(
                    Check(
                        quantity=f"{where}: simulated difference",
                        interval=found,
                        most=MARGIN,
                        unit="%",
                    )
                )
                exact = row.continuous
                right.append(
                    Check(
                        quantity=f"{where}: exact difference, continuous time",
                        interval=Interval(exact, exact, exact),
                        most=100.0 * ROUNDING,
                        unit="%",
                    )
                )
            else:
                wrong.append(
                    Check(
                        quantity=f"{where}: simulated difference",
                        interval=found,
                        least=MARGIN,
                        unit="%",
                    )
                )
        return wrong + right + _orders(evidence)

    def summary(self, evidence: pd.DataFrame) -> str:
        simulated = evidence[evidence["kind"] == "simulated"]
        right = simulated["right"].astype(bool)
        wrong = simulated[~right]
        optimum = simulated[simulated["point"] == "optimum"]
        open_loop = simulated[right & (simulated["point"] != "optimum")]
        low, high = _ends(wrong["exact"], wrong["exact"])
        simulated_low, simulated_high = _ends(wrong["low"], wrong["high"])
        return (
            f"Off the optimum the mean of adjoint matching differs from ∇J by {low} to "
            f"{high} % (exact; the simulated intervals span {simulated_low} to "
            f"{simulated_high} %), mostly in length: the cosine is at least "
            f"{plain(float(wrong['cosine'].min()))}. At the optimum the difference is "
            "zero in continuous time and O(1/N) in chains, "
            f"{_ends(optimum['exact'], optimum['exact'])[1]} % or less in those "
            f"simulated. It is exactly zero at all {len(open_loop)} open-loop "
            "controls: the start of training, θ = 0, follows the true gradient."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        simulated = evidence[evidence["kind"] == "simulated"]
        return pd.DataFrame(
            [
                {
                    "problem": row.problem,
                    "point": row.point,
                    "control": "open-loop" if row.open_loop else "feedback",
                    "N": str(row.n_steps),
                    "difference from ∇J, simulated": interval(*interval_of(row), "%"),
                    "exact": f"{plain(row.exact)} %",
                    "continuous time": f"{plain(_rounded(row.continuous))} %",
                    "cosine": "–" if np.isnan(row.cosine) else f"{row.cosine:.3f}",
                }
                for row in records(simulated)
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import (
            add_legend,
            draw_ladder,
            draw_slope,
            problem_looks,
        )
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        simulated = evidence[evidence["kind"] == "simulated"]
        names = sorted(set(simulated["problem"]))
        looks = problem_looks(names)
        with style():
            figure = new_figure(PAGE, 3.2)
            left, right = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
            _draw_points(left, simulated, looks)
            draw_ladder(right, evidence[evidence["kind"] == "ladder"], "exact", looks)
            right.set_title("at the optimum θ*, exact", loc="left", pad=3)
            right.set_ylabel("difference, % of |∇J(0)|")
            draw_slope(right, 1)
            add_legend(figure, left, 4)
            for axes in (left, right):
                finish_axes(axes)
            settle(figure)
        return figure


def _ends(low: pd.Series, high: pd.Series) -> tuple[str, str]:
    """Return the smallest of ``low`` and the largest of ``high`` as texts."""
    return plain(float(low.min()), 2), plain(float(high.max()), 2)


def _rounded(percent: float) -> float:
    """Return zero for a difference that is rounding."""
    return 0.0 if percent < 100.0 * ROUNDING else percent


def _ladder(problems: list[Problem]) -> pd.DataFrame:
    """Return the exact difference at the optimum for growing numbers of steps."""
    return pd.DataFrame(
        [
            {
                "kind": "ladder",
                "problem": problem.name,
                "point": "optimum",
                "n_steps": multiple * problem.default_steps,
                "exact": difference(
                    problem, "optimum", multiple * problem.default_steps
                ),
            }
            for problem in problems
            for multiple in LADDER
        ]
    )


def _orders(evidence: pd.DataFrame) -> list[Check]:
    """Return the order in 1/N of the last doubling, where there is a difference."""
    checks = []
    for name, mine in evidence[evidence["kind"] == "ladder"].groupby("problem"):
        before, last = mine.sort_values("n_steps")["exact"].to_numpy()[-2:]
        if last > 100.0 * ROUNDING:
            order = float(np.log2(before / last))
            checks.append(
                Check(
                    quantity=f"{name}, optimum: order of the difference in 1/N",
                    interval=Interval(order, order, order),
                    least=0.8,
                    most=1.2,
                )
            )
    return checks


def _draw_points(
    axes: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw simulated differences by evaluation point; an arrow reaches zero."""
    from sdebench.experiments.drawing import plain_ticks

    floor = 0.05
    axes.set_yscale("log")
    axes.axhspan(floor, MARGIN, color="0.95", lw=0, zorder=0)
    for i, (name, look) in enumerate(looks.items()):
        mine = rows[rows["problem"] == name].set_index("point").loc[list(POINTS)]
        x = np.arange(len(POINTS)) + 0.09 * (i - 0.5 * (len(looks) - 1))
        shown = {"color": look["color"], "marker": look["marker"]}
        reaches = (mine["low"] <= floor).to_numpy()
        low = np.maximum(mine["low"].to_numpy(), floor)
        axes.vlines(x, low, mine["high"], color=look["color"], lw=1.2)
        axes.plot(x[~reaches], mine["value"][~reaches], ms=4, ls="", **shown)
        axes.plot(
            x[reaches], low[reaches], ls="", ms=3, marker="v", color=look["color"]
        )
        axes.plot([], [], ms=4, ls="", label=name, **shown)
    axes.set_ylim(floor, None)
    plain_ticks(axes)
    axes.set_xticks(range(len(POINTS)), list(POINTS))
    axes.set_title("mean of adjoint matching, simulated", loc="left", pad=3)
    axes.set_ylabel("difference from ∇J, % of |∇J|")
