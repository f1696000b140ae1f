r"""The lean adjoint of strongly log-concave data is bounded path by path.

With data of least curvature m > 0, -Hess log p_T >= m I, and memoryless noise, every
path of every control has

    |a_t| <= alpha_t / (alpha_t^2 + m beta_t^2) |grad g(X_T)|,

with equality for Gaussian data of variance 1/m; a chain of Euler-Maruyama steps has the
product of the largest step Jacobians instead, which tends to that at order one in h
(`sdebench.closed_form.lean_adjoint_bound`).  Along simulated optimal paths the
recursion a_n = J_n^T a_{n+1} is run with the Hessian of log p_t at every state, which
knows nothing of the bound.

Mixtures with separated modes have no m > 0.  They are held against the bound of the
Gaussian of the same covariance (m = one over its largest eigenvalue), which is what one
would use if the theorem were read as one about scales: paths that are undecided between
two modes exceed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.closed_form import log_quadratics as lq
from sdebench.closed_form.base_process import MemorylessBase
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.lean_adjoint_bound import (
    bound,
    chain_bound,
    least_curvature,
    peak,
)
from sdebench.closed_form.schedule import (
    Cosine,
    LinearFlow,
    Schedule,
    VariancePreserving,
)
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    exact,
    interval_of,
    records,
)
from sdebench.experiments.measuring import Array, n_threads
from sdebench.measure.intervals import Interval
from sdebench.report.format import interval, plain
from sdebench.simulate.paths import simulate
from sdebench.tilting_problem import TiltingProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAUSSIAN, LOG_CONCAVE, MIXTURE = "Gaussian", "log-concave mixture", "separated mixture"
START_TIME = 0.05
"""Where the linear and the cosine flow start: at 0 their noise is infinite."""
SCHEDULES: Mapping[str, tuple[Schedule, float]] = {
    "VP": (VariancePreserving(1.0, 6.0), 0.0),
    "linear flow": (LinearFlow(1.0), START_TIME),
    "cosine": (Cosine(1.0), START_TIME),
}
BLOCK, N_BLOCKS = 1 << 13, 8
N_PATHS = BLOCK * N_BLOCKS
N_STEPS = 100
LADDER = (200, 400)
"""Numbers of steps between which the chain's bound must tend to f at order one."""
ROUNDING = 1e-10
"""What rounding may add to a product of so many Jacobians."""
EXCEEDING = 1.0
"""Percent of the paths that must exceed the bound for a mixture to break it."""
TAIL = 0.999
"""The quantile over paths that is shown."""
PEAKS = {1.0: 1.2071, 0.25: 1.6180}
"""Peaks of the bound on the linear flow as printed, by m."""


@dataclass(frozen=True, kw_only=True)
class Base(TiltingProblem):
    """Memoryless noising of a mixture, reward -|x - 1|^2 / 2."""

    schedule: str
    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    variances: tuple[float, ...]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return "linear", "quadratic"

    @property
    def data(self) -> GaussianMixture:
        """The law of the data."""
        return GaussianMixture.from_weights(
            np.array(self.weights), np.array(self.means), np.array(self.variances)
        )

    def build(self) -> TiltingFamily:
        schedule, start_time = SCHEDULES[self.schedule]
        data = self.data.as_diagonal()
        base = MemorylessBase(
            schedule, data.log_weights, data.means, data.covariances, start_time
        )
        dim = base.dim
        features = np.zeros((2, 2 * dim + 1))
        features[0, :dim], features[1, dim:-1] = 1.0, -0.5
        masses, centres, spreads = lq.gaussian_parameters(base.marginal(start_time))
        return TiltingFamily(
            base=base,
            features=features,
            reference=np.zeros((1, 2 * dim + 1)),
            constant=-0.5 * dim,
            theta_star=np.ones(2),
            start=StartLaw(np.exp(masses), centres, np.sqrt(spreads)),
            start_is_marginal=True,
        )

    @cached_property
    def curvatures(self) -> tuple[float, float]:
        """Least and most curvature; separated modes have that of their covariance."""
        least = -np.inf
        if np.ptp(self.variances) == 0.0:
            least = least_curvature(np.array(self.means), self.variances[0])
        if least <= 0.0:
            least = 1.0 / float(np.linalg.eigvalsh(self.data.covariance())[-1])
        return least, 1.0 / min(self.variances)


@dataclass(frozen=True)
class Case:
    """A law of the data under some schedules."""

    kind: str
    data: str
    schedules: tuple[str, ...]
    mixture: dict[str, Any]


CASES = (
    Case(
        GAUSSIAN,
        "N(0.5, 4)",
        tuple(SCHEDULES),
        {"weights": (1.0,), "means": ((0.5,),), "variances": (4.0,)},
    ),
    Case(
        LOG_CONCAVE,
        "0.5 N(±1.5, 3)",
        tuple(SCHEDULES),
        {
            "weights": (0.5, 0.5),
            "means": ((1.5,), (-1.5,)),
            "variances": (3.0, 3.0),
        },
    ),
    Case(
        LOG_CONCAVE,
        "four in the plane, N((±0.5, ±0.5), 1)",
        ("linear flow",),
        {
            "weights": (0.1, 0.2, 0.3, 0.4),
            "means": ((0.5, 0.5), (0.5, -0.5), (-0.5, 0.5), (-0.5, -0.5)),
            "variances": (1.0,) * 4,
        },
    ),
    Case(
        MIXTURE,
        "0.3 N(−1.5, 0.2) + 0.7 N(1, 0.4)",
        tuple(SCHEDULES),
        {
            "weights": (0.3, 0.7),
            "means": ((-1.5,), (1.0,)),
            "variances": (0.2, 0.4),
        },
    ),
    Case(
        MIXTURE,
        "four in the plane, N((±2, ±2), 0.5)",
        ("linear flow",),
        {
            "weights": (0.1, 0.2, 0.3, 0.4),
            "means": ((2.0, 2.0), (2.0, -2.0), (-2.0, 2.0), (-2.0, -2.0)),
            "variances": (0.5,) * 4,
        },
    ),
)
N_CASES = sum(len(case.schedules) for case in CASES)


def lean_adjoint_sizes(problem: Base, states: Array, times: Array) -> Array:
    """Return |a_n| / |grad g(X_N)| along paths, (N + 1, n); states (N + 1, d, n)."""
    tables = problem.tables(problem.theta_star, times)
    x = np.moveaxis(states, 1, -1)
    adjoint = -lq.gradient(tables.reward, x[-1])
    last = np.linalg.norm(adjoint, axis=-1)
    sizes = [np.ones(len(last))]
    for n in range(len(times) - 2, -1, -1):
        moved = tables.scale[n] * adjoint
        if tables.base.shape[1]:
            hessian = lq.hessian(tables.base[n], x[n])
            moved += tables.base_gain[n] * np.einsum("pij,pj->pi", hessian, adjoint)
        adjoint = moved
        sizes.append(np.linalg.norm(adjoint, axis=-1) / last)
    return np.array(sizes[::-1])


def share_interval(hits: int, count: int) -> Interval:
    """Return a share in percent with its Clopper-Pearson interval."""
    from scipy.stats import binomtest

    level = 1.0 - (1.0 - LEVEL) / N_CASES
    found = binomtest(hits, count).proportion_ci(level, method="exact")
    return Interval(hits / count, found.low, found.high).scaled(100.0)


def order_of_the_chain(problem: Base) -> float:
    """Return the order in 1/N at which the chain's bound tends to f."""
    schedule, _ = SCHEDULES[problem.schedule]
    gaps = []
    for n_steps in LADDER:
        times = problem.time_grid(n_steps)
        limit = bound(schedule, problem.curvatures[0], times)
        chain = chain_bound(schedule, *problem.curvatures, times)
        gaps.append(float(np.max(np.abs(chain / limit - 1.0))))
    return float(np.log(gaps[0] / gaps[1]) / np.log(LADDER[1] / LADDER[0]))


@dataclass(frozen=True)
class LeanAdjointBound(Claim):
    """The bound on the lean adjoint holds path by path for log-concave data only."""

    statement: ClassVar[str] = (
        "If the data are strongly log-concave, −∇² log p ≥ m, the lean adjoint of a "
        "memoryless base obeys |a_t| ≤ α/(α² + mβ²) |∇g(X_T)| on every path, with "
        "equality for Gaussian data; for mixtures of separated modes the bound of the "
        "Gaussian of the same covariance does not hold."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich, Du and Albergo 2026, arXiv:2605.00229 (the bound under strong "
        "log-concavity, by its abstract); the closed form, its version for chains and "
        "the failure for mixtures are ours"
    )
    procedure: ClassVar[str] = (
        f"{N_PATHS:,} paths of {N_STEPS} Euler–Maruyama steps under the optimal "
        "control of the reward −|x − 1|²/2, for each law of the data and schedule; the "
        "lean adjoint by the recursion along each path with the exact Hessian of "
        "log p_t. The bound of the chain is the product of the largest step Jacobians "
        "that curvatures between m and M allow. Mixtures of separated modes are held "
        "against the chain's bound with m = 1/(largest variance of the data). The "
        f"linear and the cosine flow start at t = {START_TIME}."
    )
    decision_rule: ClassVar[str] = (
        "Supported if no path of log-concave data exceeds the chain's bound, all paths "
        "of Gaussian data reach it (both up to rounding), the chain's bound tends to "
        "α/(α² + mβ²) at order 0.8 to 1.2 in 1/N, and if more than "
        f"{EXCEEDING:.0f} % of the paths exceed it on each mixture of separated modes; "
        "refuted if one of these is excluded; undecided otherwise. A path above the "
        "bound refutes it: those numbers need no interval. The intervals of the shares "
        f"{JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        done = 0
        for case in CASES:
            for schedule in case.schedules:
                rows += _evidence(case, schedule, seed)
                done += 1
                progress(done, N_CASES)
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        found = []
        for row in records(evidence[evidence["part"] == "paths"]):
            where = f"{row.data}, {row.schedule}"
            if row.kind == MIXTURE:
                found.append(
                    Check(
                        quantity=f"{where}: paths above the bound",
                        interval=interval_of(row),
                        least=EXCEEDING,
                        unit="%",
                    )
                )
                continue
            found.append(
                Check(
                    quantity=f"{where}: largest |a| over the chain's bound, minus one",
                    interval=exact(row.largest - 1.0),
                    most=ROUNDING,
                )
            )
            if row.kind == GAUSSIAN:
                found.append(
                    Check(
                        quantity=f"{where}: smallest |a| over the bound, minus one",
                        interval=exact(row.smallest - 1.0),
                        least=-ROUNDING,
                    )
                )
            found.append(
                Check(
                    quantity=f"{where}: order of the chain's bound in 1/N",
                    interval=exact(row.order),
                    least=0.8,
                    most=1.2,
                )
            )
        flow = LinearFlow(1.0)
        for m, printed in PEAKS.items():
            found.append(
                Check(
                    quantity=f"linear flow, m = {m:g}: peak of the bound",
                    interval=exact(peak(flow, m)[1]),
                    least=printed - 6e-5,
                    most=printed + 6e-5,
                )
            )
        return found

    def summary(self, evidence: pd.DataFrame) -> str:
        paths = evidence[evidence["part"] == "paths"]
        inside = paths[paths["kind"] == LOG_CONCAVE]
        beyond = paths[paths["kind"] == MIXTURE]
        return (
            f"On log-concave mixtures none of {N_PATHS:,} paths exceeds the bound: the "
            f"largest ratio at any time is {inside['largest'].max():.4f}; on Gaussian "
            "data every path has the bound's size. On mixtures of separated modes "
            f"{plain(float(beyond['value'].min()), 2)} to "
            f"{plain(float(beyond['value'].max()), 2)} % of the paths exceed the "
            "bound of the Gaussian of the same covariance, one in a thousand by a "
            f"factor of {plain(float(beyond['tail'].min()), 2)} to "
            f"{plain(float(beyond['tail'].max()), 2)} and more."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "data": f"{row.data} ({row.kind})",
                    "schedule": row.schedule,
                    "m": plain(row.m),
                    "peak of f": f"{plain(row.peak, 4)} at t = {row.peak_time:.2f}",
                    "largest |a| over the bound": plain(round(row.largest, 9), 4),
                    f"exceeded by {100 * (1 - TAIL):g} % of paths": plain(
                        round(row.tail, 9), 4
                    ),
                    "paths above the bound": interval(*interval_of(row), "%"),
                }
                for row in records(evidence[evidence["part"] == "paths"])
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend, plain_ticks
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        curves = evidence[evidence["part"] == "curve"]
        curves = curves[curves["schedule"] == "linear flow"]
        with style():
            figure = new_figure(PAGE, 2.8)
            panels = figure.subplots(1, 3, sharey=True)
            for axes, case in zip(panels, (CASES[0], CASES[1], CASES[3]), strict=True):
                _draw(axes, curves[curves["data"] == case.data])
                axes.set_title(f"{case.kind}\n{case.data}", loc="left", pad=3)
                finish_axes(axes)
            panels[0].set_yscale("log")
            panels[0].set_ylim(1e-2, None)
            plain_ticks(panels[0])
            panels[0].set_ylabel("|a_t| / |∇g(X_T)|, linear flow")
            add_legend(figure, panels[2], 4)
            settle(figure)
        return figure


def _evidence(case: Case, schedule: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield one row for all paths of a case, and its curves over time."""
    problem = Base(schedule=schedule, **case.mixture)
    least, most = problem.curvatures
    times = problem.time_grid(N_STEPS)
    sizes = np.concatenate(
        [_sizes(problem, times, seed, block) for block in range(N_BLOCKS)], axis=1
    )
    limit = chain_bound(SCHEDULES[schedule][0], least, most, times)
    ratio = sizes / limit[:, None]
    worst = ratio[:-1].max(axis=0)
    hits = int(np.sum(worst > 1.0 + ROUNDING))
    time, height = peak(SCHEDULES[schedule][0], least)
    keys = {"kind": case.kind, "data": case.data, "schedule": schedule, "m": least}
    yield {
        "part": "paths",
        **keys,
        **columns(share_interval(hits, N_PATHS)),
        "largest": float(worst.max()),
        "smallest": float(ratio.min()),
        "tail": float(np.quantile(worst, TAIL)),
        "order": order_of_the_chain(problem),
        "peak_time": time,
        "peak": height,
    }
    for n in range(0, len(times), 2):
        middle, tail = np.quantile(sizes[n], [0.5, TAIL])
        yield {
            "part": "curve",
            **keys,
            "t": times[n],
            "median": middle,
            "tail": tail,
            "largest": sizes[n].max(),
            "bound": limit[n],
        }


def _sizes(problem: Base, times: Array, seed: int, block: int) -> Array:
    """Return `lean_adjoint_sizes` of a block of optimal paths."""
    run = simulate(
        problem,
        n_steps=N_STEPS,
        n_paths=BLOCK,
        seed=seed,
        replicate=block,
        threads=n_threads(),
        keep_states=True,
    )
    assert run.states is not None
    return lean_adjoint_sizes(problem, run.states, times)


def _draw(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw the bound and quantiles over the paths against time."""
    import seaborn as sns

    blue, orange = sns.color_palette("colorblind")[:2]
    axes.plot(rows["t"], rows["bound"], color="0.2", lw=1.6, label="bound")
    looks: dict[str, dict[str, Any]] = {
        "largest": {"color": orange, "ls": (0, (4, 1.5)), "label": "largest path"},
        "tail": {"color": orange, "label": f"{100 * TAIL:g} % quantile"},
        "median": {"color": blue, "label": "median path"},
    }
    for column, look in looks.items():
        axes.plot(rows["t"], rows[column], lw=1.1, **look)
    axes.set_xlabel("time t")
