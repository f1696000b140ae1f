r"""Flow-GRPO's sampler and its group baseline, in numbers.

**Sampler.**  Data N(0, 0.5), exact velocity, K steps: the variance of the last state,
by the exact recursion of `sdebench.closed_form.flow_sampler`; the claim
``flow_grpo_sampler_order`` simulates the sampler and decides its order.

**Group.**  G actions x ~ N(0.7, 0.25) with the rewards R = x^2, dE R/dm = 1.4.  The
mean of the group-relative gradient is

    rewards less their mean              (1 - 1/G) 1.4
    divided by their deviation, too      no closed form; `closed_form.group_advantage`
    the latter for G -> inf              1.4 / std R,    Var R = 4 m^2 s^2 + 2 s^4.

The deviation is that of the group, divisor G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from sdebench.closed_form.flow_sampler import terminal_variance_error
from sdebench.closed_form.group_advantage import standardized_gradient
from sdebench.experiments.experiment import Progress, exact
from sdebench.linear_problem import Array
from sdebench.measure.intervals import Interval, t_quantile
from sdebench.report.format import plain
from sdebench.simulate.noise import normals
from sdebench.studies._study import (
    Study,
    compared,
    count_agreeing,
    level_of_each,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA_VARIANCE = 0.5
VARIANCES = {
    (0.0, (10, 20, 40, 100, 400)): ".383 .438 .468 .487 .497",
    (0.7, (10, 20, 40, 100, 400)): ".466 .488 .498 .5026 .5030",
    (1.0, (10, 20, 40, 100, 400)): ".492 .498 .50005 .5008 .5005",
    (0.7, (1600, 6400, 25600, 102400)): ".5020 .5011 .5006 .5003",
    (1.0, (400, 1600, 6400, 25600, 102400)): ".50051 .50021 .50007 .50002 .50001",
}
MEAN, DEVIATION = 0.7, 0.5
GROUP = 4
SIZES = (3, 4, 6, 8, 12, 16, 24, 48)
N_GROUPS = 1 << 21
N_INTERVALS = 2


def mean_only(group_size: int) -> float:
    """Return the mean of the group's gradient with the rewards less their mean."""
    return (1.0 - 1.0 / group_size) * 2.0 * MEAN


def limit() -> float:
    """Return the mean with standardized rewards for an infinite group."""
    variance = 4.0 * MEAN**2 * DEVIATION**2 + 2.0 * DEVIATION**4
    return float(2.0 * MEAN / np.sqrt(variance))


def standardized(group_size: int) -> float:
    """Return the mean with standardized rewards."""
    return standardized_gradient(group_size, MEAN, DEVIATION)


def group_gradients(z: Array, *, standardize: bool) -> Array:
    """Return the gradient of every group, (n,), from normals z (G, n)."""
    rewards = (MEAN + DEVIATION * z) ** 2
    advantages = rewards - rewards.mean(axis=0)
    if standardize:
        advantages /= rewards.std(axis=0)
    return np.asarray((advantages * z / DEVIATION).mean(axis=0))


def simulated_gradients(seed: int) -> dict[bool, Interval]:
    """Return the mean without and with standardization, with intervals."""
    z = normals(seed, 0, 0, N_GROUPS, 0, GROUP, 1)[..., 0]
    reach = t_quantile(level_of_each(N_INTERVALS), N_GROUPS - 1)
    found = {}
    for standardize in (False, True):
        values = group_gradients(z, standardize=standardize)
        value, error = float(values.mean()), float(values.std() / np.sqrt(N_GROUPS))
        found[standardize] = Interval(
            value, value - reach * error, value + reach * error
        )
    return found


@dataclass(frozen=True)
class MixedSampling(Study):
    """Terminal variance of Flow-GRPO's sampler, and what its group baseline does."""

    subject: ClassVar[str] = (
        "Flow-GRPO on Gaussians: the variance that its sampler ends with, by noise "
        "level and number of steps, and the mean of its gradient with a group's mean "
        "and standard deviation taken out of the rewards."
    )
    source: ClassVar[str] = (
        "J. Liu et al. 2025, arXiv:2505.05470 (Flow-GRPO), and Z. Shao et al. 2024, "
        "arXiv:2402.03300 (GRPO), the sampler and the estimator; the numbers are "
        "derived"
    )
    procedure: ClassVar[str] = (
        f"Data N(0, {DATA_VARIANCE}) with the exact velocity: exact recursion of the "
        f"variance. Groups of {GROUP} actions N({MEAN}, {DEVIATION**2}) with the "
        f"reward x²: quadrature to 1e-5, and {N_GROUPS:,} simulated groups."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows = []
        for (noise_level, steps), line in VARIANCES.items():
            for k, printed in zip(steps, line.split(), strict=True):
                error = terminal_variance_error(noise_level, k, DATA_VARIANCE)
                rows.append(
                    compared(
                        f"variance, η = {noise_level:g}, K = {k:,}",
                        f"0{printed}",
                        exact(DATA_VARIANCE + error),
                    )
                    | {"noise_level": noise_level, "n_steps": k}
                )
        progress(1, 2)
        found = simulated_gradients(seed)
        group = f"group of {GROUP}"
        for text, printed, ours in (
            (f"{group}, rewards less mean: quadrature", "1.050", mean_only(GROUP)),
            (f"{group}, rewards less mean: simulated", "1.050", found[False]),
            (f"{group}, standardized: quadrature", "1.500", standardized(GROUP)),
            (f"{group}, standardized: simulated", "1.500", found[True]),
            ("infinite group, standardized", "1.786", limit()),
        ):
            given = ours if isinstance(ours, Interval) else exact(ours)
            rows.append(compared(text, printed, given))
        progress(2, 2)
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        found = evidence.set_index("quantity")["value"]
        return (
            f"{count_agreeing(evidence)} of {len(evidence)} numbers agree. With "
            f"{GROUP} samples standardization turns the gradient 1.4 into "
            f"{plain(found[f'group of {GROUP}, standardized: quadrature'], 4)}, and an "
            f"infinite group into {plain(limit(), 4)}."
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.6)
            left, right = figure.subplots(1, 2)
            _draw_variances(left, evidence[evidence["noise_level"].notna()])
            _draw_groups(right, evidence.set_index("quantity"))
            for axes in (left, right):
                finish_axes(axes)
            settle(figure)
        return figure


def _draw_variances(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw the recursion and the source's numbers against the number of steps."""
    import seaborn as sns

    steps = np.unique(np.geomspace(10, 102400, 60).astype(int))
    palette = sns.color_palette("colorblind")
    for (level, rows), color in zip(
        evidence.groupby("noise_level"), palette, strict=False
    ):
        eta = float(str(level))
        curve = [100 * terminal_variance_error(eta, int(k)) / 0.5 for k in steps]
        axes.plot(steps, curve, color=color, lw=1.2, label=f"η = {eta:g}")
        printed = 100.0 * (rows["printed"].astype(float) / 0.5 - 1.0)
        axes.plot(rows["n_steps"], printed, "x", ms=5, color=color)
    axes.plot([], [], "x", ms=5, color="0.35", label="source")
    axes.axhline(0.0, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
    axes.set_xscale("log")
    axes.set_ylim(-2.5, 1.0)
    axes.set_xlabel("number of steps K")
    axes.set_title("error of the last variance, %", loc="left", pad=3)
    axes.legend(loc="lower right")


def _draw_groups(axes: Axes, evidence: pd.DataFrame) -> None:
    """Draw the gradient's mean against the group size."""
    import seaborn as sns
    from matplotlib.ticker import NullLocator

    blue, orange = sns.color_palette("colorblind")[:2]
    lines: list[tuple[str, Callable[[int], float], object, str]] = [
        ("less mean", mean_only, blue, "rewards less mean"),
        ("standardized", standardized, orange, "standardized"),
    ]
    for label, curve, color, key in lines:
        axes.plot(SIZES, [curve(size) for size in SIZES], color=color, label=label)
        row = evidence.loc[f"group of {GROUP}, {key}: simulated"]
        ends = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        axes.errorbar(GROUP, row["value"], yerr=ends, fmt="o", ms=4, color=color)
        axes.plot(GROUP, float(str(row["printed"])), "x", ms=7, color="0.2")
    for level, text in ((2.0 * MEAN, "dE R/dm"), (limit(), "dE R/dm / std R")):
        axes.axhline(level, color="0.35", lw=0.8, ls=(0, (4, 1.5)))
        axes.text(48.0, level + 0.01, text, ha="right", va="bottom", color="0.35")
    axes.plot([], [], "o", ms=4, color="0.35", label="simulated")
    axes.plot([], [], "x", ms=7, color="0.2", label="source")
    axes.set_xscale("log")
    axes.set_xticks(list(SIZES), [str(size) for size in SIZES])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(top=1.9)
    axes.set_xlabel("group size G")
    axes.set_title("mean of the group's gradient", loc="left", pad=3)
    axes.legend(loc="lower right")
