r"""Noise in a window of steps: less variance, of a part of the gradient.

Flow-GRPO samples by an SDE.  MixGRPO has noise in a window W of steps and follows the
probability flow elsewhere, G2RPO has noise in one step after a start that its group
shares.  The likelihood ratio of the window's steps,

    E[-A sum_{n in W} (dw_n/dtheta)^T z_n]
        = -sum_{n in W} E[(dw_n/dtheta)^T G_n^T dr(X_N)/dX_{n+1}],

is the part of the gradient that goes through the window; the flow's steps depend on
theta, too, and their part is left out.  On the chain of gaussian_tilt the part and the
whole gradient of the sampler's own objective -E r(X_N) are exact.  With variance V of
one path and |b| = |part - whole|, the mean squared error of n paths is V/n + |b|^2, so
that noise everywhere, V_full/n, is more exact from

    n = (V_full - V) / |b|^2

paths on.  A step length may undo a gradient's length, but neither its direction nor
its noise relative to its own length: V / |part|^2 and the cosine are reported.

Advantages have the mean of the others taken out, and are not standardized, so that the
estimates have these means.

Source: Flow-GRPO arXiv:2505.05470, MixGRPO arXiv:2507.21802, G2RPO arXiv:2510.01982;
the exact parts are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.experiments.comparisons import LANES, in_lanes, variance_ratio
from sdebench.experiments.costates import positive_mean
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    exact,
    interval_of,
    records,
)
from sdebench.experiments.measuring import N_PATHS, Array, settings_at
from sdebench.measure.engine import group_means
from sdebench.measure.intervals import Interval
from sdebench.measure.workers import GRID_SHIFT, make_worker
from sdebench.problem import EULER, Problem
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBLEMS = ("gaussian_tilt", "four_modes")
"""With exact parts, and without."""
POINTS = ("zero", "halfway")
SHOWN = "halfway"
"""The point of the table and the figure."""
N_STEPS = 48
WINDOWS = (1, 2, 4, 8, 16)
GROUP = 8
PLACES = ("first", "middle", "last")
N_REPLICATES = 1024
MARGIN = 1.0
"""Percent of the gradient that counts as left out."""


class Sampler(NamedTuple):
    """Where the noise is: ``window`` steps at a ``place``, N_STEPS of them for all."""

    version: str
    window: int
    place: str

    @property
    def start(self) -> int:
        """The first step with noise."""
        free = N_STEPS - self.window
        return {"first": 0, "middle": free // 2, "last": free}[self.place]

    @property
    def estimator(self) -> str:
        """The estimator as typed."""
        options = f"version={self.version},group={GROUP},standardize=none"
        options += ",leave_one_out=true"
        if self.version != "flow_grpo":
            options += f",window={self.window},window_start={self.start}"
        return f"grpo:{options}"


EVERYWHERE = Sampler("flow_grpo", N_STEPS, "first")
SAMPLERS = (
    *(Sampler("mix_grpo", window, place) for place in PLACES for window in WINDOWS),
    *(Sampler("g2rpo", 1, place) for place in PLACES),
)
N_CELLS = len(PROBLEMS) * len(POINTS) * len(SAMPLERS)
LEVEL_EACH = 1.0 - (1.0 - LEVEL) / (2 * N_CELLS)
"""Of a variance or a ratio of variances."""


def group_values(problem: Problem, point: str, sampler: Sampler, seed: int) -> Array:
    """Return the estimate of every group of paths, (groups, parameters).

    All samplers have the same noise in the steps where they have noise.
    """
    estimator = registry.estimator(sampler.estimator)
    group = estimator.group_size(N_PATHS)
    settings = settings_at(problem, point, N_STEPS, seed)
    values = np.empty((N_REPLICATES, N_PATHS // group, problem.n_params))

    def lane(number: int) -> None:
        worker = make_worker(problem, [estimator], settings)
        for replicate in range(number, N_REPLICATES, LANES):
            (rows,), _, _ = worker.block(replicate, N_STEPS << GRID_SHIFT, N_PATHS)
            values[replicate] = group_means(rows, N_PATHS, group)[0].T

    in_lanes(lane)
    return values.reshape(-1, problem.n_params)


def variance_of_one_path(values: Array) -> Interval:
    """Return the trace of the covariance of one path, from those of groups."""
    squares = np.sum((values - values.mean(axis=0)) ** 2, axis=1)
    return positive_mean(squares, LEVEL_EACH).scaled(GROUP)


def exact_part(problem: Problem, point: str, sampler: Sampler) -> dict[str, float]:
    """Return squared norms of part, rest and SDE gradient, and share and cosine."""
    estimator = registry.estimator(sampler.estimator)
    noisy = estimator.noisy_steps(N_STEPS)
    policy = problem.truth.policy_chain(point, N_STEPS, EULER, noisy)
    part, whole = estimator.target(policy), policy.gradient(reward_only=True)
    assert part is not None
    rest = float(np.sum((part - whole) ** 2))
    return {
        "part": float(part @ part),
        "whole": float(np.sum(problem.truth.reward_only_gradient(point, N_STEPS) ** 2)),
        "rest": rest,
        "left_out": float(np.sqrt(rest / (whole @ whole))),
        "cosine": float(part @ whole / np.sqrt((part @ part) * (whole @ whole))),
    }


@dataclass(frozen=True)
class MixedSamplingWindows(Claim):
    """Windows of noise against noise everywhere."""

    statement: ClassVar[str] = (
        "Noise in a window of steps, and the probability flow elsewhere, lowers the "
        "variance of the policy gradient, with MixGRPO's windows and with G2RPO's "
        "single step. It estimates a part of the gradient then, and leaves out the "
        "rest."
    )
    source: ClassVar[str] = (
        "MixGRPO, arXiv:2507.21802, and G2RPO, arXiv:2510.01982, against Flow-GRPO, "
        "arXiv:2505.05470; what is left out is our derivation"
    )
    procedure: ClassVar[str] = (
        f"{N_STEPS} steps, noise in all, in {', '.join(map(str, WINDOWS[:-1]))} or "
        f"{WINDOWS[-1]} of them, or in one after a shared start, placed first, in the "
        "middle or last; groups of 8 paths, advantages without standardization. "
        f"Variance of one path from {N_REPLICATES} replicates of 256 paths on "
        "gaussian_tilt and four_modes at θ = 0 and halfway; table and figure show "
        "halfway. On gaussian_tilt the part of the gradient that is estimated and the "
        "whole one of the same sampler are exact; left out is their difference over "
        "the norm of the whole."
    )
    decision_rule: ClassVar[str] = (
        "Supported if every window has a lower variance than noise everywhere and "
        f"leaves out more than {MARGIN:.0f} % of the gradient; refuted if one of these "
        f"is excluded; undecided otherwise. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        unknown = dict.fromkeys(("part", "whole", "rest", "left_out", "cosine"), nan)
        rows: list[dict[str, object]] = []
        for name in PROBLEMS:
            problem = registry.problem(name)
            for point in POINTS:
                everywhere = group_values(problem, point, EVERYWHERE, seed)
                whole = variance_of_one_path(everywhere)
                for sampler in SAMPLERS:
                    values = group_values(problem, point, sampler, seed)
                    ratio = variance_ratio(values, everywhere, LEVEL_EACH)
                    known = name == PROBLEMS[0]
                    part = exact_part(problem, point, sampler) if known else unknown
                    rows.append(
                        {
                            "problem": name,
                            "point": point,
                            **sampler._asdict(),
                            **columns(ratio),
                            "everywhere_low": whole.low,
                            "everywhere": whole.estimate,
                            "everywhere_high": whole.high,
                            **part,
                        }
                    )
                    progress(len(rows), N_CELLS)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        lower, left_out = [], []
        for row in records(compared(evidence)):
            where = f"{row.problem}, {row.point}: {_said(row)}"
            lower.append(
                Check(
                    quantity=f"{where}, variance by that with noise everywhere",
                    interval=row.ratio,
                    most=1.0,
                )
            )
            if not np.isnan(row.left_out):
                left_out.append(
                    Check(
                        quantity=f"{where}, left out, exact",
                        interval=exact(100.0 * row.left_out),
                        least=MARGIN,
                        unit="%",
                    )
                )
        return lower + left_out

    def summary(self, evidence: pd.DataFrame) -> str:
        found = compared(evidence)
        known = found[found["left_out"].notna()]
        low, high = _ends(value.estimate for value in found["ratio"])
        least, most = _ends(100.0 * known["left_out"])
        relative = _ends(value.estimate for value in known["relative"])
        fewest, largest = _ends(value.estimate for value in known["break_even"])
        return (
            f"Windows have {low} to {high} of the variance with noise everywhere, and "
            f"leave out {least} to {most} % of the gradient (exact). Relative to the "
            "squared norm of the part that they estimate, the variance is "
            f"{relative[0]} to {relative[1]} times that with noise everywhere. From "
            f"{fewest} to {largest} paths on noise everywhere has the lower mean "
            "squared error; the cosine between part and whole is at least "
            f"{plain(float(known['cosine'].min()))}."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        found = compared(evidence)
        halfway = found[found["point"] == SHOWN]
        rows = []
        for sampler in SAMPLERS:
            own, other = (
                row
                for row in records(halfway)
                if (row.version, row.window, row.place) == sampler
            )
            rows.append(
                {
                    "noise in": _said(own),
                    f"variance by noise everywhere, {own.problem}": interval(
                        *own.ratio
                    ),
                    other.problem: interval(*other.ratio),
                    "left out, exact": f"{plain(100.0 * own.left_out)} %",
                    "cosine": f"{own.cosine:.3f}",
                    "variance/|part|² by noise everywhere": interval(*own.relative),
                    "paths from which noise everywhere has the lower MSE": interval(
                        *own.break_even
                    ),
                }
            )
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, plain_ticks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        found = compared(evidence)
        halfway = found[found["point"] == SHOWN]
        known = halfway[halfway["left_out"].notna()]
        other = halfway[halfway["left_out"].isna()]
        with style():
            figure = new_figure(PAGE, 4.6)
            panels = figure.subplots(2, 2, sharex=True)
            titles = {
                f"variance by noise everywhere, {PROBLEMS[0]}": (known, "ratio"),
                f"the same, {PROBLEMS[1]}": (other, "ratio"),
                f"left out, exact, {PROBLEMS[0]}": (known, "left_out"),
                "variance/|part|² by noise everywhere": (known, "relative"),
            }
            for axes, (title, (rows, column)) in zip(
                panels.flat, titles.items(), strict=True
            ):
                _draw(axes, rows, column)
                axes.set_title(title, loc="left", pad=3)
                if column == "ratio":
                    axes.set_yscale("log")
                    plain_ticks(axes)
                else:
                    axes.set_ylim(bottom=0.0)
                finish_axes(axes)
            for axes in panels[1]:
                axes.set_xlabel(f"steps with noise, of {N_STEPS}")
            add_legend(figure, panels[0, 0], 2)
            settle(figure)
        return figure


def compared(evidence: pd.DataFrame) -> pd.DataFrame:
    """Return the windows with what their exact parts make of the variance ratios."""
    ratios = [interval_of(row) for row in records(evidence)]
    relatives, break_evens = [], []
    for row, ratio in zip(records(evidence), ratios, strict=True):
        relatives.append(ratio.scaled(row.whole / row.part))
        # V_full (1 - ratio) / |b|^2
        saved = Interval(
            row.everywhere * (1.0 - ratio.estimate),
            row.everywhere_low * max(1.0 - ratio.high, 0.0),
            row.everywhere_high * max(1.0 - ratio.low, 0.0),
        )
        break_evens.append(saved.scaled(1.0 / row.rest))
    found = {"ratio": ratios, "relative": relatives, "break_even": break_evens}
    return evidence.assign(
        **{name: pd.Series(v, index=evidence.index) for name, v in found.items()}
    )


def _said(row: Any) -> str:
    """Return where the noise is."""
    if row.version == "g2rpo":
        return f"the {row.place} step, shared start"
    if row.window == 1:
        return f"the {row.place} step"
    return f"the {row.place} {row.window} steps"


def _ends(values: Iterable[float]) -> tuple[str, str]:
    """Return the smallest and the largest as texts."""
    known = list(values)
    return plain(min(known)), plain(max(known))


def _draw(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    """Draw a column against the window's size, one line per place."""
    import seaborn as sns
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.axhline(1.0, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
    colors = dict(zip(PLACES, sns.color_palette("colorblind"), strict=False))
    looks = {
        "mix_grpo": ("o", 1.0, "{} steps"),
        "g2rpo": ("D", 1.12, "{} step, shared start"),
    }
    for version, (marker, shift, label) in looks.items():
        for place, color in colors.items():
            chosen = (rows["place"] == place) & (rows["version"] == version)
            mine = rows[chosen].sort_values("window")
            x, value = shift * mine["window"], mine[column]
            if column != "left_out":
                value, low, high = np.array(list(mine[column])).T
                axes.vlines(x, low, high, color=color, lw=1.0)
            look = {"marker": marker, "ms": 3.5, "lw": 1.1, "color": color}
            axes.plot(x, value, label=label.format(place), **look)
    axes.set_xticks(WINDOWS, [str(n) for n in WINDOWS])
    axes.xaxis.set_minor_locator(NullLocator())
