r"""Backpropagation through a part of the steps is biased, reweighting removes it.

The gradient of -E r(X_N) is a sum over steps, sum_n E g_n with the pathwise terms
g_n = (dw_n/dtheta)^T G_n^T lambda_{n+1}.  An estimator that differentiates step n with
the probability c_n has the mean sum_n c_n E g_n, and misses sum_n (1 - c_n) E g_n:

    DRaFT-K              c_n = 1 for the last K steps, else 0
    AlignProp            c_n = P(K >= N - n) = (n + 1) / N, K uniform on 1, ..., N
    Russian roulette     g_n / P(K >= N - n) in place of g_n: c_n = 1

DRaFT-LV and ReFL differentiate the reward of the denoised prediction through a single
step: their mean is the gradient of another functional.  On affine chains all of these
means are exact, so that the bias is known for every K, beside the one that is
measured.  That of DRaFT-K falls with K as the steps forget: the terms decay with the
distance to the end like the derivative of X_N in X_n.

Sources: Clark et al. 2024, arXiv:2309.17400 (DRaFT-K, DRaFT-LV); Prabhudesai et al.
2023, arXiv:2310.03739 (AlignProp); Xu et al. 2023, arXiv:2304.05977 (ReFL); Beatson
and Adams 2019, arXiv:1905.07006 (Russian roulette of truncated gradients).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.experiments.comparisons import relative_bias
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    interval_of,
    records,
)
from sdebench.experiments.measuring import Array, sample
from sdebench.measure.intervals import variance_interval
from sdebench.problem import Problem
from sdebench.report.format import interval, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROBLEMS = ("gaussian_tilt", "ddpm_chain:n_steps=20", "ou_quadratic_easy")
DENOISING = "gaussian_tilt"
"""The problem with a denoised prediction, which DRaFT-LV and ReFL need."""
POINT = "halfway"
SHARES = (0.02, 0.1, 0.25, 0.5)
"""K / N of the simulated DRaFT-K; at least one step."""
N_REPLICATES = 1 << 13
MARGIN = 1.0
"""Percent of the gradient that tells "biased" from "unbiased"."""
FULL = "pathwise:objective=reward"
ROULETTE = "truncated:method=russian_roulette"
RANDOM = {"alignprop": "AlignProp", "refl": "ReFL", "draft_lv": "DRaFT-LV"}
NAMES = {FULL: "whole path", ROULETTE: "Russian roulette"} | {
    f"truncated:method={method}": name for method, name in RANDOM.items()
}
GRADIENT, OWN = "gradient", "own mean"
"""What a simulated mean is compared with; the second is the exact mean."""


def draft(n_last: int) -> str:
    """Return DRaFT-K with this K."""
    return f"truncated:n_last={n_last}" if n_last > 1 else "truncated"


def name_of(estimator: str) -> str:
    """Return the method's name in the literature."""
    n_last = estimator.partition("n_last=")[2]
    return NAMES.get(estimator) or f"DRaFT-{n_last or 1}"


def estimators(spec: str, n_steps: int) -> list[str]:
    """Return the estimators that are simulated on a problem."""
    lengths = dict.fromkeys(max(1, int(share * n_steps)) for share in SHARES)
    names = [FULL, *map(draft, lengths), "truncated:method=alignprop", ROULETTE]
    if spec == DENOISING:
        names += ["truncated:method=draft_lv", "truncated:method=refl"]
    return names


def exact_mean(problem: Problem, estimator: str, n_steps: int) -> Array:
    """Return the exact mean of an estimator on the chain."""
    policy = problem.truth.policy_chain(POINT, n_steps)
    target = registry.estimator(estimator).target(policy)
    return policy.gradient(reward_only=True) if target is None else target


def exact_bias(problem: Problem, estimator: str, n_steps: int) -> float:
    """Return |exact mean - gradient| / |gradient|, in percent."""
    gradient = problem.truth.reward_only_gradient(POINT, n_steps)
    gap = exact_mean(problem, estimator, n_steps) - gradient
    return 100.0 * float(np.linalg.norm(gap) / np.linalg.norm(gradient))


@dataclass(frozen=True)
class TruncatedBackpropagation(Claim):
    """Truncated backpropagation is biased, Russian roulette is not."""

    statement: ClassVar[str] = (
        "Backpropagation through a part of the steps is biased, with a fixed length "
        "(DRaFT-K), a random one (AlignProp), or through a prediction of the end "
        "(DRaFT-LV, ReFL); dividing each step by the probability that it is "
        "differentiated (Russian roulette) removes the bias of random lengths."
    )
    source: ClassVar[str] = (
        "Clark et al. 2024, arXiv:2309.17400; Prabhudesai et al. 2023, "
        "arXiv:2310.03739; Xu et al. 2023, arXiv:2304.05977; Beatson and Adams 2019, "
        "arXiv:1905.07006; the exact means are ours"
    )
    procedure: ClassVar[str] = (
        "The reward-only gradient at the point halfway: the exact mean of each method "
        "on the N-step chain for every K, and the mean of the simulated estimators, "
        f"{N_REPLICATES:,} replicates of 256 paths. DRaFT-LV and ReFL run where the "
        "process has a denoised prediction. Biases are relative to the norm of the "
        "chain's exact gradient."
    )
    decision_rule: ClassVar[str] = (
        f"Supported if every truncation (K up to N/2) is biased by more than "
        f"{MARGIN:.0f} %, exactly and as simulated, Russian roulette by less as "
        "simulated and by nothing (rounding) exactly, and if every simulated mean is "
        f"within {MARGIN:.0f} % of its exact one; refuted if one of these is excluded; "
        f"undecided otherwise. All intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        cells = list(_cells())
        n_intervals = 3 * sum(len(names) for *_, names in cells)
        rows: list[dict[str, Any]] = []
        for done, (problem, n_steps, names) in enumerate(cells, start=1):
            rows += _measured(problem, n_steps, names, n_intervals, seed)
            rows += [
                {
                    "kind": "exact",
                    "problem": problem.name,
                    "n_steps": n_steps,
                    "estimator": draft(length),
                    "length": length,
                    "exact": exact_bias(problem, draft(length), n_steps),
                }
                for length in range(1, n_steps + 1)
            ]
            progress(done, len(cells))
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        found = []
        for row in records(_simulated(evidence)):
            where = f"{row.problem}, {name_of(row.estimator)}"
            if row.against == OWN:
                found.append(
                    Check(
                        quantity=f"{where}: simulated from exact mean",
                        interval=interval_of(row),
                        most=MARGIN,
                        unit="%",
                    )
                )
                continue
            truncates = row.estimator not in (FULL, ROULETTE)
            region = {"least": MARGIN} if truncates else {"most": MARGIN}
            found.append(
                Check(
                    quantity=f"{where}: simulated bias",
                    interval=interval_of(row),
                    unit="%",
                    **region,
                )
            )
            exact = row._replace(value=row.exact, low=row.exact, high=row.exact)
            region = {"least": MARGIN} if truncates else {"most": 1e-9}
            found.append(
                Check(
                    quantity=f"{where}: exact bias",
                    interval=interval_of(exact),
                    unit="%",
                    **region,
                )
            )
        return found

    def summary(self, evidence: pd.DataFrame) -> str:
        rows = _simulated(evidence)
        rows = rows[rows["against"] == GRADIENT]
        exact = rows.groupby("estimator")["exact"]
        single, random = exact.get_group("truncated"), exact.get_group(_RANDOM_LENGTH)
        half = rows[rows["length"] == rows["n_steps"] // 2]["exact"]
        roulette = rows[rows["estimator"] == ROULETTE]
        return (
            f"One step of backpropagation misses {_span(single)} % of the gradient, "
            f"half of the steps {_span(half)} %, AlignProp's random length "
            f"{_span(random)} % (exact). Russian roulette is exactly unbiased; its "
            f"simulated bias is below {plain(float(roulette['high'].max()), 2)} %."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        rows = _simulated(evidence)
        spread = evidence[evidence["kind"] == "variance"]
        spread = spread.set_index(["problem", "estimator"])
        return pd.DataFrame(
            [
                {
                    "problem": row.problem,
                    "method": name_of(row.estimator),
                    "N": str(row.n_steps),
                    "bias, exact": f"{plain(_rounded(row.exact))} %",
                    "simulated": interval(*interval_of(row), "%"),
                    "relative variance": interval(
                        *interval_of(spread.loc[(row.problem, row.estimator)])
                    ),
                }
                for row in records(rows[rows["against"] == GRADIENT])
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, problem_looks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        looks = problem_looks(sorted(set(evidence["problem"])))
        with style():
            figure = new_figure(PAGE, 3.0)
            left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1.0))
            _draw_lengths(left, evidence, looks)
            _draw_random(right, evidence, looks)
            add_legend(figure, left, 4)
            for axes in (left, right):
                finish_axes(axes)
            settle(figure)
        return figure


_RANDOM_LENGTH = "truncated:method=alignprop"


def _cells() -> Iterator[tuple[Problem, int, list[str]]]:
    """Yield problem, number of steps and what is simulated."""
    for spec in PROBLEMS:
        problem = registry.problem(spec)
        n_steps = problem.default_steps
        yield problem, n_steps, estimators(spec, n_steps)


def _measured(
    problem: Problem, n_steps: int, names: list[str], n_intervals: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the biases and the variance of the simulated estimators."""
    level = 1.0 - (1.0 - LEVEL) / n_intervals
    gradient = problem.truth.reward_only_gradient(POINT, n_steps)
    scale = float(np.linalg.norm(gradient))
    found = sample(problem, names, POINT, n_steps, N_REPLICATES, seed)
    for name, (moments, n_paths) in zip(names, found, strict=True):
        _, _, last = name.partition("n_last=")
        keys = {"problem": problem.name, "n_steps": n_steps, "estimator": name} | {
            "length": int(last or 1) if name_of(name).startswith("DRaFT-") else np.nan,
            "exact": exact_bias(problem, name, n_steps),
        }
        own = exact_mean(problem, name, n_steps)
        for against, answer in ((GRADIENT, gradient), (OWN, own)):
            bias = relative_bias(moments, answer, level, scale).scaled(100.0)
            yield {"kind": "simulated", "against": against} | keys | columns(bias)
        spread = variance_interval(moments, level, n_paths / scale**2)
        yield {"kind": "variance"} | keys | columns(spread)


def _simulated(evidence: pd.DataFrame) -> pd.DataFrame:
    return evidence[evidence["kind"] == "simulated"]


def _span(percents: pd.Series) -> str:
    return f"{plain(float(percents.min()), 2)} to {plain(float(percents.max()), 2)}"


def _rounded(percent: float) -> float:
    """Return zero for a bias that is rounding."""
    return 0.0 if percent < 1e-9 else percent


def _draw_lengths(
    axes: Axes, evidence: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw the bias of DRaFT-K against K / N: exact lines, simulated marks."""
    from sdebench.experiments.drawing import plain_ticks

    axes.set_yscale("log")
    axes.set_ylim(0.1, 150.0)
    plain_ticks(axes)
    axes.axhspan(0.1, MARGIN, color="0.95", lw=0, zorder=0)
    rows = _simulated(evidence)
    rows = rows[(rows["against"] == GRADIENT) & rows["length"].notna()]
    for name, look in looks.items():
        exact = evidence[(evidence["kind"] == "exact") & (evidence["problem"] == name)]
        exact = exact[exact["length"] < exact["n_steps"]]
        color, line = look["color"], look["ls"]
        share = exact["length"] / exact["n_steps"]
        axes.plot(share, exact["exact"], color=color, ls=line, lw=1.1)
        mine = rows[rows["problem"] == name]
        _draw_marks(axes, mine["length"] / mine["n_steps"], mine, look)
        axes.plot([], [], **look, ms=4, lw=1.1, label=name)
    axes.set_xlabel("K / N, share of the steps that are differentiated")
    axes.set_ylabel("bias, % of the gradient")
    axes.set_title("DRaFT-K: exact (lines), simulated (marks)", loc="left", pad=3)


def _draw_random(
    axes: Axes, evidence: pd.DataFrame, looks: dict[str, dict[str, Any]]
) -> None:
    """Draw the other methods; an arrow is an upper end, of an interval with zero."""
    rows = _simulated(evidence)
    rows = rows[rows["against"] == GRADIENT]
    shown = ["truncated:method=draft_lv", "truncated:method=refl", _RANDOM_LENGTH]
    shown.append(ROULETTE)
    axes.axhspan(0.1, MARGIN, color="0.95", lw=0, zorder=0)
    for i, (name, look) in enumerate(looks.items()):
        mine = rows[rows["problem"].eq(name) & rows["estimator"].isin(shown)]
        places = [shown.index(estimator) for estimator in mine["estimator"]]
        _draw_marks(axes, np.array(places) + 0.15 * (i - 1), mine, look)
    axes.set_xticks(range(len(shown)), [name_of(e).replace(" ", "\n") for e in shown])
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_title("random lengths and predictions", loc="left", pad=3)


def _draw_marks(axes: Axes, x: Any, rows: pd.DataFrame, look: dict[str, Any]) -> None:
    """Draw values with intervals; where one reaches zero, its upper end."""
    for place, row in zip(x, records(rows), strict=True):
        value, low, high = interval_of(row)
        reaches = low <= 0.1
        axes.vlines(place, max(low, 0.1), high, color=look["color"], lw=1.2)
        marker = "v" if reaches else look["marker"]
        axes.plot(place, high if reaches else value, marker, ms=4, color=look["color"])
