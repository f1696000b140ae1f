r"""Without memoryless noise the optimal control misses the tilted law.

The base process dX = (kappa X + (sigma^2/2 + eta) grad log p_t) dt + sigma dW has the
marginals p_t for every noise level sigma.  The optimal control leaves the law of X_0
alone, so that

    law of X_1 under u*  =  p_1(x) e^{r(x)} E_base[1 / h(X_0, 0) | X_1 = x],

which is the tilted law p_1 e^r / Z for every r only if X_0 and X_1 are independent
under the base: if it is memoryless, as for sigma^2 = 2 eta.

On the linear flow with data N(0, C) all is Gaussian: X_1 | X_0 ~ N(a X_0, s^2) with
a^2 + s^2 = C and, for constant sigma,

    a^2 = C exp(-pi sigma^2 / (2 sqrt(C))),

    reward  b x           mean b s^2 instead of b C
    reward  -k x^2 / 2    variance a^2/(1 + k s^2)^2 + s^2/(1 + k s^2)
                          instead of C/(1 + k C).

The experiment shares nothing with these formulae but the problem: it simulates the
optimally controlled process by Euler-Maruyama with N and 2 N steps on independent
noise, removes the error of order 1/N by Richardson's extrapolation, and compares the
moments of X_1 with the closed form and with the tilted law.  The memoryless process
has infinite noise at t = 0 and starts at t = 0.02 from its exact law there, which
leaves an error of 0.04 %.

Source: Domingo-Enrich, Drozdzal, Karrer and Chen 2024, arXiv:2409.08861, section 4
(memoryless noise, Proposition 1 and Theorem 1); the closed form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.experiments.experiment import (
    Progress,
    columns,
    interval_of,
    records,
)
from sdebench.experiments.measuring import extrapolated, n_threads
from sdebench.measure.intervals import Interval
from sdebench.problem import Problem
from sdebench.report.format import interval, plain
from sdebench.simulate.paths import simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISE_LEVELS = (0.2, 0.5, 1.0, 2.0)
START_TIME = 0.02
N_STEPS = 50
BLOCK, N_BLOCKS = 1 << 20, 3
N_PATHS = BLOCK * N_BLOCKS
MISSED = 5.0
"""Percent of the tilted law's moment whose loss counts as missing the law."""
MARGIN = 1.0
"""Percent of the data's standard deviation or variance that counts as nothing."""

MEMORYLESS_AT = 2.6
"""Place of memoryless noise on the axis of noise levels."""

REWARDS = {
    "linear": {"slope": 1.0, "curvature": 0.0},
    "quadratic": {"slope": 0.0, "curvature": 1.0},
}
MOMENT = {"linear": "mean", "quadratic": "variance"}
N_INTERVALS = len(REWARDS) * (len(NOISE_LEVELS) + 1)


def terminal_moment(reward: str, noise_level: float) -> float:
    """Return mean (linear) or variance (quadratic) of X_1 under u*; C = b = k = 1."""
    memory = np.exp(-0.5 * np.pi * noise_level**2)  # a^2
    fresh = 1.0 - memory  # s^2
    if reward == "linear":
        return float(fresh)
    return float(memory / (1.0 + fresh) ** 2 + fresh / (1.0 + fresh))


def tilted_moment(reward: str) -> float:
    """Return the same moment of the tilted law."""
    return 1.0 if reward == "linear" else 0.5


def build(reward: str, noise_level: float | None) -> Problem:
    """Return the problem with constant noise, or with memoryless noise (None)."""
    noise = (
        {"start_time": START_TIME}
        if noise_level is None
        else {"noise": "constant", "noise_level": noise_level}
    )
    return registry.problem(
        "gaussian_tilt",
        schedule="linear_flow",
        variance=1.0,
        **noise,
        **REWARDS[reward],
    )


def _moment(x: NDArray[np.float64], reward: str) -> tuple[float, float]:
    """Return the moment of a sample and its squared standard error."""
    values = x if reward == "linear" else (x - x.mean()) ** 2
    return float(values.mean()), float(values.var() / len(values))


def _terminal(problem: Problem, n_steps: int, seed: int) -> NDArray[np.float64]:
    """Return X_1 of `N_PATHS` paths under u*; each number of steps has own noise."""
    blocks = range(n_steps * N_BLOCKS, (n_steps + 1) * N_BLOCKS)
    return np.concatenate(
        [
            simulate(
                problem,
                n_steps=n_steps,
                n_paths=BLOCK,
                seed=seed,
                replicate=block,
                threads=n_threads(),
            ).terminal[0]
            for block in blocks
        ]
    )


def simulated_moment(problem: Problem, reward: str, seed: int) -> Interval:
    """Return the moment of X_1 under u*, extrapolated to continuous time."""
    coarse, fine = (
        _moment(_terminal(problem, n_steps, seed), reward)
        for n_steps in (N_STEPS, 2 * N_STEPS)
    )
    return extrapolated(coarse, fine, N_PATHS, N_INTERVALS)


@dataclass(frozen=True)
class MemorylessNoise(Claim):
    """Constant noise misses the tilted law, memoryless noise reaches it."""

    statement: ClassVar[str] = (
        "Fine-tuning by stochastic optimal control reaches the tilted law p e^r / Z "
        "only if the noise is memoryless. On the linear flow with Gaussian data of "
        "variance 1, constant noise σ realizes only the share 1 − exp(−πσ²/2) of a "
        "linear reward's shift, however well the control is trained."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich et al. 2024, arXiv:2409.08861, section 4; the size of the bias "
        "is our closed form"
    )
    procedure: ClassVar[str] = (
        f"The optimally controlled process is simulated ({N_PATHS:,} paths with "
        f"{N_STEPS} and as many with {2 * N_STEPS} Euler–Maruyama steps, extrapolated) "
        f"at constant noise σ = {', '.join(map(str, NOISE_LEVELS))} and with "
        f"memoryless noise, which starts at t = {START_TIME}. Measured is the mean of "
        "X₁ for the reward x and its variance for the reward −x²/2, in percent of the "
        "tilted law's."
    )
    decision_rule: ClassVar[str] = (
        f"Supported if at σ ≤ 1 at most {100 - MISSED:.0f} % of the linear reward's "
        f"shift is realized and all simulated moments are within {MARGIN:.0f} % (of "
        "the data's standard deviation or variance, both 1) of the closed form, which "
        "with memoryless noise is the tilted law itself; refuted if one of these is "
        "excluded; undecided otherwise. "
        f"All {N_INTERVALS} intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, object]] = []
        for reward in REWARDS:
            for level in (*NOISE_LEVELS, None):
                found = simulated_moment(build(reward, level), reward, seed)
                target = tilted_moment(reward)
                share = found.scaled(100.0 / target)
                exact = target if level is None else terminal_moment(reward, level)
                rows.append(
                    {
                        "reward": reward,
                        "noise": "memoryless" if level is None else "constant",
                        "noise_level": np.nan if level is None else level,
                        **columns(share),
                        "closed_form": 100.0 * exact / target,
                    }
                )
                progress(len(rows), N_INTERVALS)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        missed, agreed = [], []
        for row in records(evidence):
            share, exact = interval_of(row), row.closed_form
            moment = f"{MOMENT[row.reward]}, {row.reward} reward"
            noise = "memoryless noise"
            if row.noise == "constant":
                noise = f"σ = {row.noise_level:g}"
                if row.reward == "linear" and row.noise_level <= 1.0:
                    missed.append(
                        Check(
                            quantity=f"{noise}: realized {moment}",
                            interval=share,
                            most=100.0 - MISSED,
                            unit="%",
                        )
                    )
            agreed.append(
                Check(
                    quantity=f"{noise}: simulated minus closed-form {moment}",
                    interval=Interval(
                        *(tilted_moment(row.reward) * (x - exact) for x in share)
                    ),
                    least=-MARGIN,
                    most=MARGIN,
                    unit="%",
                )
            )
        return missed + agreed

    def summary(self, evidence: pd.DataFrame) -> str:
        linear = evidence[evidence["reward"] == "linear"].set_index("noise_level")
        texts = [
            f"{interval(*interval_of(row), '%')} at σ = {row.Index:g} (closed form "
            f"{plain(row.closed_form)} %)"
            for row in records(linear[linear["noise"] == "constant"])
        ]
        memoryless = records(linear[linear["noise"] == "memoryless"])[0]
        return (
            f"Of a linear reward's shift {', '.join(texts)} is realized, and "
            f"{interval(*interval_of(memoryless), '%')} with memoryless noise; the "
            "loss exp(−πσ²/2) is never zero but soon too small to see."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "reward": row.reward,
                    "noise": row.noise
                    if row.noise == "memoryless"
                    else f"constant, σ = {row.noise_level:g}",
                    "moment": MOMENT[row.reward],
                    "simulated, % of the tilted law's": interval(*interval_of(row)),
                    "closed form": plain(row.closed_form, 4),
                }
                for row in records(evidence)
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.6)
            for axes, reward in zip(figure.subplots(1, 2), REWARDS, strict=True):
                _draw(axes, reward, evidence[evidence["reward"] == reward])
                finish_axes(axes)
            settle(figure)
        return figure


def _draw(axes: Axes, reward: str, rows: pd.DataFrame) -> None:
    """Draw simulated moments and the closed form against the noise level."""
    import seaborn as sns

    blue, orange = sns.color_palette("colorblind")[:2]
    levels = np.linspace(0.05, 2.2, 200)
    target = tilted_moment(reward)
    exact = [100.0 * terminal_moment(reward, level) / target for level in levels]
    axes.plot(levels, exact, color=blue, lw=1.2, label="constant noise, closed form")
    axes.axhline(100.0, color="0.35", lw=0.8, ls=(0, (4, 1.5)), label="tilted law")
    for noise, color in (("constant", blue), ("memoryless", orange)):
        mine = rows[rows["noise"] == noise]
        value = mine["value"].to_numpy()
        axes.errorbar(
            mine["noise_level"].fillna(MEMORYLESS_AT),
            value,
            yerr=[value - mine["low"], mine["high"] - value],
            fmt="o",
            ms=4,
            lw=1.2,
            color=color,
            label=f"{noise} noise, simulated",
        )
    ticks = {0.2: "0.2", 0.5: "0.5", 1.0: "1", 1.5: "1.5", 2.0: "2"}
    axes.set_xticks([*ticks, MEMORYLESS_AT], [*ticks.values(), "memoryless"])
    axes.set_xlim(0.0, MEMORYLESS_AT + 0.35)
    axes.set_xlabel("noise level σ")
    axes.set_ylabel(f"{MOMENT[reward]} of X₁, % of the tilted law's")
    axes.set_title(f"{reward} reward", loc="left", pad=3)
    axes.legend(loc="lower right" if reward == "linear" else "upper right")
