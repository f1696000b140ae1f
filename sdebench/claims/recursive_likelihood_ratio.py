r"""The recursive likelihood ratio: its bias as printed, and its variance.

RLR adds a first-order term for the last step, a half-order term for a block of b steps
and likelihood-ratio (zeroth-order) terms for the others.  The gradient of -E r(X_N) is
a sum over steps, and the sum of terms has that mean if every step is covered once.
The printed index set of the likelihood-ratio terms is the complement of the block and
so holds the last step, which the first-order term covers already: the mean is the
gradient plus the last step's share of it, a number known exactly on affine chains.
Leaving the last step out ("corrected") makes RLR unbiased, for every place of the
block.

For the variance no order holds in general.  For short steps the half-order term of a
block a, ..., c is r times sum_n (dw_n)^T z_c, in place of r sum_n (dw_n)^T z_n: the
steps of a block have one noise in common, so that b of them weigh like b^2 and not like
b.  One step (b = 1) is a likelihood-ratio term.  The first-order term saves the last
step's share, which is large where the last steps have most of the gradient.

Source: R. Tan et al. 2025, arXiv:2502.00639.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.experiments.comparisons import (
    relative_bias,
    replicate_values,
    variance_ratio,
)
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    interval_of,
    records,
)
from sdebench.measure.moments import sample_moments
from sdebench.problem import Problem
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBLEMS = (
    "ddpm_chain",
    "ddpm_chain:n_steps=20",
    "brownian_linear",
    "gaussian_tilt",
    "ou_quadratic_easy",
)
POINT = "halfway"
BLOCK = 2
"""Length of the block that the paper recommends."""
BLOCKS = (0, 1, 2, 4, 8, 16, 32)
BASELINES = {"none": "none", "leave_one_out": "leave-one-out"}
CENTERED = "leave_one_out"
N_REPLICATES = 1 << 13
MARGIN = 2.0
"""Percent of the gradient that counts as a bias."""
REINFORCE, HALF_ORDER = "REINFORCE", "half order"
PRINTED, CORRECTED = "printed", "corrected"


def rlr(block: int, baseline: str, coverage: str = CORRECTED) -> str:
    """Return RLR with these options."""
    return f"rlr:block={block},baseline={baseline},coverage={coverage}"


def references(n_steps: int, baseline: str) -> dict[str, str]:
    """Return what RLR is compared with; the half-order block is the whole chain."""
    return {
        REINFORCE: f"reinforce:objective=reward,baseline={baseline}",
        HALF_ORDER: f"rlr:terms=half_order,block={n_steps},baseline={baseline}",
    }


def exact_bias(problem: Problem, coverage: str, n_steps: int) -> float:
    """Return |exact mean of RLR - gradient| / |gradient|, in percent."""
    policy = problem.truth.policy_chain(POINT, n_steps)
    target = registry.estimator(rlr(BLOCK, CENTERED, coverage)).target(policy)
    gradient = policy.gradient(reward_only=True)
    assert target is not None
    return 100.0 * float(np.linalg.norm(target - gradient) / np.linalg.norm(gradient))


@dataclass(frozen=True)
class RecursiveLikelihoodRatio(Claim):
    """RLR is unbiased and has less variance than REINFORCE and half order."""

    statement: ClassVar[str] = (
        "The recursive likelihood ratio (RLR), with its index set as printed, is an "
        "unbiased estimator of the gradient of the expected reward, and has a lower "
        "variance than REINFORCE and than the half-order term alone."
    )
    source: ClassVar[str] = (
        "R. Tan et al. 2025, arXiv:2502.00639, section 4; the exact biases are ours"
    )
    procedure: ClassVar[str] = (
        "The reward-only gradient at the point halfway, on chains of 4 to 50 steps. "
        "RLR with a block of two steps, its place drawn anew for every replicate; bias "
        "as printed and corrected (the last step counted once) against the chain's "
        "exact gradient; variance of the corrected RLR, on the same noise, over that "
        "of REINFORCE and of the half-order term over the whole chain, without a "
        f"baseline and with the leave-one-out baseline. {N_REPLICATES:,} replicates of "
        "256 paths."
    )
    decision_rule: ClassVar[str] = (
        f"Supported if the simulated bias of RLR is below {MARGIN:.0f} % of the "
        "gradient on every problem, as printed and corrected, and its variance with a "
        f"block of {BLOCK} below that of REINFORCE and of the half-order term, with "
        "either baseline (ratio at most 1); refuted if one of these is excluded; "
        f"undecided otherwise. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for done, spec in enumerate(PROBLEMS, start=1):
            rows += _measured(registry.problem(spec), seed)
            progress(done, len(PROBLEMS))
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        biases = [
            Check(
                quantity=f"{where(row)}: bias, {row.coverage}",
                interval=interval_of(row),
                most=MARGIN,
                unit="%",
            )
            for row in records(evidence[evidence["kind"] == "bias"])
        ]
        return biases + [
            Check(
                quantity=f"{where(row)}: variance by that of {row.reference}, "
                f"baseline {BASELINES[row.baseline]}",
                interval=interval_of(row),
                most=1.0,
            )
            for row in records(_recommended(evidence))
        ]

    def summary(self, evidence: pd.DataFrame) -> str:
        biases = evidence[evidence["kind"] == "bias"]
        printed = biases[biases["coverage"] == PRINTED]["exact"]
        corrected = biases[biases["coverage"] == CORRECTED]
        ratios = _recommended(evidence)
        by_block = evidence[evidence["reference"] == REINFORCE].groupby("block")
        without = by_block.get_group(0)["value"]
        longest = float(by_block["value"].max().max())
        parts = []
        for name in (REINFORCE, HALF_ORDER):
            mine = ratios[ratios["reference"] == name]
            parts.append(
                f"{_span(mine['value'])} times that of {name} (below it in "
                f"{(mine['high'] < 1.0).sum()} of {len(mine)} cases, above it in "
                f"{(mine['low'] > 1.0).sum()})"
            )
        return (
            f"As printed RLR is biased by {_span(printed)} % of the gradient (exact): "
            "the last step counts twice. Counted once it is exactly unbiased, and "
            f"below {plain(float(corrected['high'].max()), 2)} % as simulated. With a "
            f"block of {BLOCK} its variance is {' and '.join(parts)}. Without a "
            f"half-order block it is {_span(without)} times that of REINFORCE, with "
            f"longer ones up to {plain(longest, 2)} times."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        biases = evidence[evidence["kind"] == "bias"]
        ratios = _recommended(evidence)
        rows = []
        for place in dict.fromkeys(map(where, records(biases))):
            row = {"problem": place}
            for bias in records(_at(biases, place)):
                if bias.coverage == PRINTED:
                    row["bias as printed, exact"] = f"{plain(bias.exact)} %"
                row[f"{bias.coverage}, simulated"] = interval(*interval_of(bias), "%")
            for ratio in records(_at(ratios, place)):
                column = f"variance by {ratio.reference}, "
                row[column + f"baseline {BASELINES[ratio.baseline]}"] = interval(
                    *interval_of(ratio)
                )
            rows.append(row)
        return pd.DataFrame(rows)

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, problem_looks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        names = list(dict.fromkeys(map(where, records(evidence))))
        looks = problem_looks(names)
        with style():
            figure = new_figure(PAGE, 3.1)
            left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.5))
            _draw_biases(left, evidence[evidence["kind"] == "bias"], looks)
            _draw_ratios(right, evidence[evidence["kind"] == "ratio"], looks)
            add_legend(figure, right, 3)
            for axes in (left, right):
                finish_axes(axes)
            settle(figure)
        return figure


def where(row: Any) -> str:
    """Return problem and number of steps of a row of evidence."""
    return f"{row.problem}, N = {row.n_steps}"


def _at(rows: pd.DataFrame, place: str) -> pd.DataFrame:
    """Return the rows of one problem and number of steps."""
    return rows[[where(row) == place for row in records(rows)]]


def _recommended(evidence: pd.DataFrame) -> pd.DataFrame:
    """Return the ratios that decide."""
    return evidence[(evidence["kind"] == "ratio") & (evidence["block"] == BLOCK)]


def _blocks(n_steps: int, baseline: str) -> list[int]:
    """Return the blocks that are simulated; the corrected one leaves the last step."""
    if baseline != CENTERED:
        return [BLOCK]
    return [block for block in BLOCKS if block < n_steps]


def _n_intervals() -> int:
    blocks = [len(_blocks(1 << 10, baseline)) for baseline in BASELINES]
    return len(PROBLEMS) * (2 + 2 * sum(blocks))


def _measured(problem: Problem, seed: int) -> Iterator[dict[str, Any]]:
    """Yield biases and ratios of variances on one problem."""
    n_steps = problem.default_steps
    level = 1.0 - (1.0 - LEVEL) / _n_intervals()
    gradient = problem.truth.reward_only_gradient(POINT, n_steps)
    scale = float(np.linalg.norm(gradient))
    keys = {"problem": problem.name, "n_steps": n_steps}
    for baseline in BASELINES:
        blocks = _blocks(n_steps, baseline)
        names = {**references(n_steps, baseline)}
        names |= {f"{block}": rlr(block, baseline) for block in blocks}
        if baseline == CENTERED:
            names[PRINTED] = rlr(BLOCK, baseline, PRINTED)
        found = [
            replicate_values(problem, [name], POINT, n_steps, N_REPLICATES, seed)[0]
            for name in names.values()
        ]
        values = dict(zip(names, found, strict=True))
        for block in blocks:
            for reference in (REINFORCE, HALF_ORDER):
                ratio = variance_ratio(values[f"{block}"], values[reference], level)
                labels = {"block": block, "baseline": baseline, "reference": reference}
                yield {"kind": "ratio"} | keys | labels | columns(ratio)
        if baseline != CENTERED:
            continue
        for coverage, name in ((PRINTED, PRINTED), (CORRECTED, f"{BLOCK}")):
            moments = sample_moments(values[name])
            bias = relative_bias(moments, gradient, level, scale).scaled(100.0)
            share = {"exact": exact_bias(problem, coverage, n_steps)}
            labels = {"coverage": coverage}
            yield {"kind": "bias"} | keys | labels | share | columns(bias)


def _span(numbers: pd.Series) -> str:
    return f"{plain(float(numbers.min()), 3)} to {plain(float(numbers.max()), 3)}"


def _draw_biases(
    axes: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw biases, exact ones as bars; an arrow is an upper end above zero."""
    from sdebench.experiments.drawing import plain_ticks

    floor = 0.1
    axes.set_yscale("log")
    axes.set_ylim(floor, 100.0)
    plain_ticks(axes)
    axes.axhspan(floor, MARGIN, color="0.95", lw=0, zorder=0)
    names = list(looks)
    for row in records(rows):
        look = looks[where(row)]
        place = float(row.coverage == CORRECTED)
        place += 0.14 * (names.index(where(row)) - 0.5 * (len(names) - 1))
        value, low, high = interval_of(row)
        axes.vlines(place, max(low, floor), high, color=look["color"], lw=1.2)
        if low <= floor:
            axes.plot(place, high, "v", ms=4, color=look["color"])
        else:
            axes.plot(place, value, look["marker"], ms=4, color=look["color"])
        axes.plot(place, max(row.exact, floor), "_", ms=9, color="0.2", zorder=1)
    axes.set_xticks((0.0, 1.0), ("as printed", "corrected"))
    axes.set_xlim(-0.5, 1.5)
    axes.set_ylabel("bias, % of the gradient")
    axes.set_title("bias; bars: exact", loc="left", pad=3)


def _draw_ratios(
    axes: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw variances by that of REINFORCE against the length of the block."""
    from sdebench.experiments.drawing import plain_ticks

    axes.set_yscale("log")
    plain_ticks(axes)
    axes.axhline(1.0, color="0.35", lw=0.9)
    rows = rows[rows["reference"].eq(REINFORCE) & rows["baseline"].eq(CENTERED)]
    places = {block: i for i, block in enumerate(BLOCKS)}
    for name, look in looks.items():
        mine = _at(rows, name)
        x, value = mine["block"].map(places), mine["value"]
        reach = [value - mine["low"], mine["high"] - value]
        axes.errorbar(x, value, yerr=reach, ms=4, lw=1.1, label=name, **look)
    axes.set_yticks((0.5, 1.0, 2.0, 5.0, 10.0))
    axes.set_xticks(range(len(BLOCKS)), [f"{block}" for block in BLOCKS])
    axes.set_xlabel("steps in the half-order block")
    axes.set_title("variance / variance of REINFORCE", loc="left", pad=3)
