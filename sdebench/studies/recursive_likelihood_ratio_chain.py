r"""The recursive likelihood ratio on a chain of four steps.

x' = a x + sigma z four times, from x = 1.2, with a = 0.9, sigma = 0.7 and R = x^2 at
the end; the derivative of E R in a is

    d/da (a^8 1.2^2 + sigma^2 sum_k a^(2k)),  k = 0, ..., 3.

With R and the states x_0, ..., x_4 of a path, one sample of each term is

    first order, last step        2 x_4 x_3
    zeroth order, step n          R x_n z_n / sigma
    half order, block a, ..., b   R (sum_n a^(b - n) x_n) z_b / sigma,

polynomials in four normals: their means and variances are exact by Gauss-Hermite
quadrature.  RLR adds them so that every step has one term; as printed the zeroth-order
terms, or the block, hold the last step too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from sdebench.experiments.experiment import Progress, exact, interval_of
from sdebench.experiments.measuring import mean_interval, sample
from sdebench.linear_problem import Array, Profile
from sdebench.measure.intervals import variance_interval
from sdebench.problems.ddpm_chain import DDPMChain
from sdebench.studies._study import Study, compared, count_agreeing, level_of_each

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_STEPS, FACTOR, NOISE, START = 4, 0.9, 0.7, 1.2
N_REPLICATES = 1 << 14
N_NODES = 6
"""Nodes of the quadrature for each normal: exact up to the degree 11."""


@dataclass(frozen=True)
class Case:
    """An estimator and its printed mean and variance; none where there is no number.

    ``block`` : first and last step with the half-order term, or empty.
    ``zeroth`` : steps with a zeroth-order term; ``first`` : a first-order term last.
    """

    options: str
    mean: str
    variance: str
    block: tuple[int, ...] = ()
    zeroth: Sequence[int] = ()
    first: bool = True

    @property
    def estimator(self) -> str:
        """The estimator as `registry.estimator` reads it."""
        return f"rlr:baseline=none,{self.options}"


CASES = {
    "REINFORCE": Case(
        "terms=zeroth_order", "9.557", "1350", zeroth=range(4), first=False
    ),
    "half order, whole chain": Case(
        "terms=half_order,block=4", "9.557", "1800", block=(0, 3), first=False
    ),
    "first and zeroth order": Case("block=0", "9.557", "866", zeroth=range(3)),
    "RLR, steps 2 and 3 in the block": Case(
        "block=2,start=1", "9.554", "945", block=(1, 2), zeroth=(0,)
    ),
    "RLR, steps 1 to 3 in the block": Case(
        "block=3,start=0", "9.554", "1031", block=(0, 2)
    ),
    "RLR as printed": Case(
        "block=2,start=1,coverage=printed", "13.09", "", block=(1, 2), zeroth=(0, 3)
    ),
}
N_INTERVALS = 2 * len(CASES)


@dataclass(frozen=True, kw_only=True)
class _Chain(DDPMChain):
    """The chain with its factor as parameter; theta is what is added to it."""

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return (Profile("factor", 0, 0),)

    @property
    def theta_star(self) -> Array:
        return np.zeros(1)

    def spatial_map(self, name: str, t: Array) -> tuple[Array, Array]:
        eye = np.eye(self.dim) / self.noise_level
        return np.tile(eye, (len(t), 1, 1)), np.zeros((len(t), self.dim))


def rows_of(case: Case, z: Array) -> Array:
    """Return one sample of the estimator for each row of normals z (n, N_STEPS)."""
    x = [np.full(len(z), START)]
    for n in range(N_STEPS):
        x.append(FACTOR * x[n] + NOISE * z[:, n])
    weight = sum((x[n] * z[:, n] for n in case.zeroth), np.zeros(len(z)))
    if case.block:
        first, last = case.block
        slope = sum(FACTOR ** (last - n) * x[n] for n in range(first, last + 1))
        weight = weight + slope * z[:, last]
    value = x[-1] ** 2 * weight / NOISE
    return value + 2.0 * x[-1] * x[-2] if case.first else value


def exact_moments(case: Case) -> tuple[float, float]:
    """Return mean and variance of one sample, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(N_NODES)
    z = np.array(list(product(nodes, repeat=N_STEPS)))
    mass = np.prod(list(product(weights / weights.sum(), repeat=N_STEPS)), axis=1)
    rows = rows_of(case, z)
    mean = float(mass @ rows)
    return mean, float(mass @ (rows - mean) ** 2)


@dataclass(frozen=True)
class RecursiveLikelihoodRatioChain(Study):
    """Means and variances of RLR on a chain of four steps."""

    subject: ClassVar[str] = (
        "The recursive likelihood ratio (RLR) on a linear chain of four steps: as "
        "printed it counts the last step twice; its variance is below that of "
        "REINFORCE and above that of first- and zeroth-order terms without a block."
    )
    source: ClassVar[str] = (
        "The estimators of R. Tan et al. 2025, arXiv:2502.00639; the numbers are "
        "derived, from 4 million samples with heavy tails, variances to about 2 %"
    )
    procedure: ClassVar[str] = (
        f"x' = {FACTOR} x + {NOISE} ξ four times from {START}, R = x²; derivative of "
        "E R in the factor, one path, no baseline. Exact by Gauss–Hermite quadrature "
        "over the four normals, and simulated with the estimators of the catalogue, "
        f"{N_REPLICATES:,} replicates of 256 paths. Steps count from the first; the "
        "first-order term is that of the last."
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        chain = _Chain(factor=FACTOR, noise_level=NOISE, start=START)
        level, rows = level_of_each(N_INTERVALS), []
        for done, (name, case) in enumerate(CASES.items(), start=1):
            mean, variance = exact_moments(case)
            ((moments, paths),) = sample(
                chain, [case.estimator], [0.0], N_STEPS, N_REPLICATES, seed
            )
            measured = variance_interval(moments, level, paths)
            for what, printed, answer, ours in (
                ("mean", case.mean, mean, mean_interval(moments, level)),
                ("variance", case.variance, variance, measured),
            ):
                keys = {"case": name, "what": what}
                if printed:
                    text = f"{name}: {what}"
                    rows.append(compared(f"{text}, exact", printed, exact(answer)))
                    rows[-1] |= keys | {"simulated": False}
                    rows.append(compared(f"{text}, simulated", printed, ours))
                    rows[-1] |= keys | {"simulated": True}
            progress(done, len(CASES))
        return pd.DataFrame(rows)

    def summary(self, evidence: pd.DataFrame) -> str:
        simulated = evidence["simulated"].astype(bool)
        found = evidence[~simulated].set_index(["case", "what"])["value"]
        variance = found.xs("variance", level="what")
        blocks = variance[[name for name in variance.index if name.startswith("RLR")]]
        return (
            f"As printed the mean is {found['RLR as printed', 'mean']:.3f}, the "
            f"gradient {found['REINFORCE', 'mean']:.3f}. Exact variances: REINFORCE "
            f"{variance['REINFORCE']:.0f}, RLR {blocks.min():.0f} to "
            f"{blocks.max():.0f}, and {variance['first and zeroth order']:.0f} without "
            f"the block. {count_agreeing(evidence[simulated])} of {simulated.sum()} "
            "numbers of the source lie in our simulated intervals."
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.report.style import COLUMN, finish_axes, new_figure, settle, style

        rows = evidence[evidence["what"] == "variance"]
        names = list(dict.fromkeys(rows["case"]))
        with style():
            figure = new_figure(COLUMN, 2.3)
            axes = figure.subplots()
            for name, mine in rows.groupby("case"):
                place = len(names) - 1 - names.index(str(name))
                truth, measured = (
                    mine[mine["simulated"].astype(bool) == flag].iloc[0]
                    for flag in (False, True)
                )
                axes.plot(truth["value"], place, "|", ms=17, color="0.2")
                value, low, high = interval_of(measured)
                axes.plot(value, place + 0.16, "o", ms=4, color="C0")
                axes.hlines(place + 0.16, low, high, color="C0", lw=1.2)
                axes.plot(float(truth["printed"]), place - 0.18, "x", ms=5, color="C3")
            for text, marker, size, color in (
                ("exact", "|", 9.0, "0.2"),
                ("simulated", "o", 4.0, "C0"),
                ("source", "x", 5.0, "C3"),
            ):
                axes.plot([], [], marker, ms=size, color=color, label=text)
            axes.set_yticks(range(len(names)), names[::-1])
            axes.set_xlim(left=0.0)
            axes.set_ylim(-0.5, len(names) - 0.5)
            axes.set_xlabel("variance of one path")
            figure.legend(ncols=3, loc="outside upper center")
            finish_axes(axes, grid="x")
            settle(figure)
        return figure
