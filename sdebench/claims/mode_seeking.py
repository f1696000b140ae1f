r"""On-policy losses and the modes of `forty_modes`.

From the pinned start of `forty_modes` a control is the Foellmer drift to the law p it
samples, and the relative entropies of paths are those of the laws at the end,

    J(u) + log Z = KL(P_u | P*) = KL(p | nu),      KL(P* | P_u) = KL(nu | p),

the objective of on-policy losses (relative entropy, log-variance at the current
control, adjoint matching's fixed point) and the cross-entropy.  Both have the same
curvature at p = nu.  Three families of controls:

tilts    the problem's own, p = nu exp((theta - theta*)^T phi): an exponential family,

             grad KL(p | nu) = I(theta) (theta - theta*),
             grad KL(nu | p) = E_p phi - E_nu phi,

         so that both losses have the optimum as only stationary point.  Where p sits in
         one mode, I(theta) is the small variance inside it: the first gradient is
         small, the second one is not.
weights  p = sum_k lambda_k N_k, N_k = N(m_k, I), lambda = softmax(eta), with gamma_k
         the responsibilities under p,

             d KL(p | nu) / d eta_k = lambda_k (E_{N_k} log(p / nu) - KL(p | nu)),
             d KL(nu | p) / d eta_k = lambda_k - E_nu gamma_k;

         the first one vanishes with lambda_k: a mode that is missed has no gradient;
         the second one is about lambda_k - 1/40.
Gaussian p = N(mu, s^2 I): controls affine in the state, which cannot hold the optimum.
         The second loss is fitted by the moments of nu, the first one has a local
         minimum at every mode.

All expectations are sums over quadrature nodes; no sampling noise: what is lost is
lost by the loss.  The laws at the ends are then simulated: paths of their Foellmer
drifts, by the kernels.

Source: Blessing et al. 2025 (trust-region stochastic optimal control) and 2410.00345
report it for networks; the three families are ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import logsumexp, softmax

from sdebench import registry
from sdebench.claims._claim import JOINTLY, Check, Claim
from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.closed_form.log_quadratics import gaussian_rows
from sdebench.closed_form.tilting import StartLaw, TiltingFamily
from sdebench.experiments.experiment import (
    LEVEL,
    Progress,
    columns,
    interval_of,
    records,
)
from sdebench.experiments.measuring import Array, n_threads
from sdebench.experiments.mode_weights import (
    mode_weights,
    total_variation,
    total_variation_interval,
)
from sdebench.measure.intervals import Interval
from sdebench.problems.forty_modes import N_MODES, FortyModes
from sdebench.report.format import interval, plain
from sdebench.simulate.paths import simulate
from sdebench.tilting_problem import TiltingProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGET = np.full(N_MODES, 1.0 / N_MODES)
ON_POLICY, CROSS_ENTROPY = "J", "cross-entropy"
LOSSES = {ON_POLICY: "KL(P_u‖P*)", CROSS_ENTROPY: "KL(P*‖P_u)"}
FOUND = 1.0
"""Percent of total variation at which a descent has found all modes."""
STEP = 0.5
"""Length of the steps times the largest curvature at the optimum."""
SETTLED = 1e-9
"""Squared length of a gradient, and length of a step, that count as none."""
PATIENCE = 100
"""The on-policy descent has so many times the iterations of the cross-entropy's."""
GAUSSIAN_ITERATIONS = 50
"""Of both losses in the family that never finds all modes."""
FAR = -4.0
"""Multiple of theta* where the tilts start whose law misses nearly all modes."""
MISSED = 1e-6
"""Weight of each mode with x_1 > 0 at the start of the free weights."""
KEPT, LOST = 10.0, 40.0
"""Percent of total variation below which the modes are kept, above which lost."""
COLLAPSED = 90.0
N_STEPS, BLOCK, N_BLOCKS = 128, 1 << 13, 4
N_PATHS = BLOCK * N_BLOCKS


class Loss(NamedTuple):
    """A loss and its gradient."""

    value: float
    gradient: Array


class Descent(NamedTuple):
    """Parameters at the end, and the total variation after every iteration."""

    end: Array
    distances: list[float]


def square_nodes(order: int) -> tuple[Array, Array]:
    """Return tensor Gauss-Hermite nodes (n, 2) and weights (n,)."""
    return _square(*hermegauss(order))


def fine_nodes(count: int) -> tuple[Array, Array]:
    """Return equidistant nodes (n, 2) and weights (n,) of two standard normals.

    For functions with kinks, which Gauss-Hermite nodes do not resolve.
    """
    x = np.linspace(-6.5, 6.5, count)
    return _square(x, np.exp(-0.5 * x**2))


def _square(x: Array, w: Array) -> tuple[Array, Array]:
    """Return the tensor rule of a rule for a standard normal; tiny weights are cut."""
    nodes = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2)
    weights = np.outer(w, w).ravel() / w.sum() ** 2
    kept = weights > 1e-14
    return nodes[kept], weights[kept] / weights[kept].sum()


@dataclass(frozen=True)
class Family(ABC):
    """Controls of `forty_modes` by the laws that they sample."""

    problem: FortyModes

    @cached_property
    def target(self) -> GaussianMixture:
        """The law nu."""
        return self.problem.truth.ideal_law()

    @abstractmethod
    def law(self, parameters: Array) -> GaussianMixture:
        """Return p."""

    @abstractmethod
    def loss(self, name: str, parameters: Array) -> Loss:
        """Return one of the two losses, up to a constant."""

    @abstractmethod
    def weights(self, parameters: Array) -> Array:
        """Return the mode weights of p."""

    def distance(self, parameters: Array) -> float:
        """Return the total variation of the mode weights."""
        return total_variation(self.weights(parameters), TARGET)

    @abstractmethod
    def step(self, name: str, parameters: Array) -> Array:
        """Return the parameters after one iteration of gradient descent."""


class Tilts(Family):
    """The problem's own family."""

    def law(self, parameters: Array) -> GaussianMixture:
        weights, means, variances = self.problem.family.ideal_law(parameters)
        kept = weights > 0.0
        return GaussianMixture(np.log(weights[kept]), means[kept], variances[kept])

    def loss(self, name: str, parameters: Array) -> Loss:
        family, away = self.problem.family, parameters - self.problem.theta_star
        mean, information = family.start_feature_law(parameters)
        level = family.log_normalizer(parameters)[0] - family.log_normalizer()[0]
        if name == ON_POLICY:
            return Loss(float(away @ mean) - level, information @ away)
        return Loss(level - float(away @ self._due[0]), mean - self._due[0])

    @cached_property
    def _due(self) -> tuple[Array, Array]:
        """Mean and covariance of the features under nu."""
        return self.problem.family.start_feature_law(self.problem.theta_star)

    def weights(self, parameters: Array) -> Array:
        # exact: E_p gamma_k = (1/40) E_{N_k} exp((theta - theta*)^T phi) / normalizer
        return self.problem.family.ideal_law(parameters)[0]

    def step(self, name: str, parameters: Array) -> Array:
        length = STEP / np.linalg.eigvalsh(self._due[1])[-1]
        return parameters - length * self.loss(name, parameters).gradient


class Weights(Family):
    """Free weights of the forty modes, by their logarithms."""

    order: ClassVar[int] = 16

    def law(self, parameters: Array) -> GaussianMixture:
        logs = parameters - logsumexp(parameters)
        return GaussianMixture(logs, self.target.means, self._variances)

    @property
    def _variances(self) -> Array:
        return np.full_like(self.target.means, self.problem.variance)

    @cached_property
    def _nodes(self) -> tuple[Array, Array, Array]:
        """Node weights (n,), log densities of the modes and of nu at all modes' nodes.

        Modes, then nodes of each: (K, n, K) and (K, n).
        """
        z, mass = square_nodes(self.order)
        x = self.target.means[:, None] + np.sqrt(self.problem.variance) * z
        logs = self.target.log_component_densities(x) + np.log(N_MODES)
        return mass, logs, logsumexp(logs, axis=-1) - np.log(N_MODES)

    def loss(self, name: str, parameters: Array) -> Loss:
        mass, logs, log_nu = self._nodes
        terms = logs + (parameters - logsumexp(parameters))
        log_p = logsumexp(terms, axis=-1)
        own, excess = softmax(parameters), (log_p - log_nu) @ mass
        if name == ON_POLICY:
            value = float(own @ excess)
            return Loss(value, own * (excess - value))
        gamma = np.exp(terms - log_p[..., None])
        found = np.einsum("k,n,knj->j", TARGET, mass, gamma)
        return Loss(-float(TARGET @ excess), own - found)

    @cached_property
    def _mode_weights(self) -> Array:
        """Mode weights of every component, (K, K)."""
        mass, logs, log_nu = self._nodes
        due = TARGET * np.exp(logs - log_nu[..., None])
        result: Array = np.einsum("n,knj->kj", mass, due)
        return result

    def weights(self, parameters: Array) -> Array:
        return np.asarray(softmax(parameters) @ self._mode_weights)

    def step(self, name: str, parameters: Array) -> Array:
        # 1/40: the largest eigenvalue of either loss's curvature at the optimum
        return parameters - STEP * N_MODES * self.loss(name, parameters).gradient


class Gaussian(Family):
    """One isotropic Gaussian, by its mean and the log of its standard deviation."""

    nodes_per_axis: ClassVar[int] = 241

    def law(self, parameters: Array) -> GaussianMixture:
        mean, scale = parameters[:2], np.exp(parameters[2])
        return GaussianMixture(np.zeros(1), mean[None], np.full((1, 2), scale**2))

    @cached_property
    def _nodes(self) -> tuple[Array, Array]:
        return fine_nodes(self.nodes_per_axis)

    def loss(self, name: str, parameters: Array) -> Loss:
        mean, log_scale = parameters[:2], float(parameters[2])
        if name == CROSS_ENTROPY:
            excess = self.target.mean() - mean
            spread = float(np.trace(self.target.covariance()) + excess @ excess)
            precision = np.exp(-2.0 * log_scale)
            slope = np.append(-precision * excess, 2.0 - precision * spread)
            return Loss(2.0 * log_scale + 0.5 * precision * spread, slope)
        z, mass = self._nodes
        scale = np.exp(log_scale)
        x = mean + scale * z
        pull = -mass[:, None] * self.target.score(x)
        slope = np.append(pull.sum(axis=0), scale * np.sum(pull * z) - 2.0)
        value = -float(mass @ self.target.log_density(x)) - 2.0 * log_scale
        return Loss(value - 1.0 - np.log(2.0 * np.pi), slope)

    def weights(self, parameters: Array) -> Array:
        z, mass = self._nodes
        x = parameters[:2] + np.exp(parameters[2]) * z
        return mass @ self.target.responsibilities(x)

    def step(self, name: str, parameters: Array) -> Array:
        """Halve the step of the Fisher metric until the loss falls by half the slope's.

        Armijo's rule: the descent is monotone.
        """
        loss = self.loss(name, parameters)
        direction = loss.gradient * np.append(
            np.full(2, np.exp(2.0 * parameters[2])), 0.25
        )
        slope, length = float(loss.gradient @ direction), 1.0
        while slope > SETTLED and length > SETTLED:
            moved = parameters - length * direction
            fall = loss.value - self.loss(name, moved).value
            if fall >= 0.5 * length * slope:
                return moved
            length *= 0.5
        return parameters


def descend(
    family: Family, name: str, start: Array, most: int, until: float = 0.0
) -> Descent:
    """Descend a loss for ``most`` iterations, or until the modes are found."""
    parameters, distances = start, [family.distance(start)]
    while len(distances) <= most and distances[-1] > until:
        parameters = family.step(name, parameters)
        distances.append(family.distance(parameters))
    return Descent(parameters, distances)


@dataclass(frozen=True)
class Setting:
    """A family and a start, what they are called, and what is expected of J."""

    said: str
    family: Callable[[FortyModes], Family]
    start: Callable[[FortyModes], Array]
    loses: bool
    finds: bool = True
    """Whether the cross-entropy can find all modes: the family holds the optimum."""


def _half_missing(problem: FortyModes) -> Array:
    return np.where(problem.means[:, 0] > 0.0, np.log(MISSED), 0.0)


def _no_control(problem: FortyModes) -> Array:
    base = problem.family.base
    spread = base.forward(*problem.time_span)[2]
    return np.array([0.0, 0.0, 0.5 * np.log(spread)])


SETTINGS = (
    Setting("tilts, from θ = 0", Tilts, lambda p: 0.0 * p.theta_star, loses=False),
    Setting(
        f"tilts, from {FAR:g} θ*".replace("-", "−"),
        Tilts,
        lambda p: FAR * p.theta_star,
        loses=False,
    ),
    Setting("free weights, 21 modes missing", Weights, _half_missing, loses=True),
    Setting("one Gaussian, from u = 0", Gaussian, _no_control, loses=True, finds=False),
)
N_INTERVALS = 3 * len(SETTINGS)


@dataclass(frozen=True, kw_only=True)
class Sampler(TiltingProblem):
    """The Foellmer drift to a mixture, from the base process of a problem."""

    problem: FortyModes
    law: GaussianMixture

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("shift",)

    def build(self) -> TiltingFamily:
        base = self.problem.family.base
        features = np.zeros((1, 2 * base.dim + 1))
        features[0, 0] = 1.0
        law = self.law.as_diagonal()
        target = gaussian_rows(law.log_weights, law.means, law.covariances)
        point = np.zeros((1, base.dim))
        return TiltingFamily(
            base=base,
            features=features,
            reference=target - base.terminal,
            constant=0.0,
            theta_star=np.zeros(1),
            start=StartLaw(np.ones(1), point, point),
        )


def simulated_distance(
    problem: FortyModes, law: GaussianMixture, seed: int
) -> Interval:
    """Return the total variation of the mode weights of simulated paths, in percent."""
    target, sampler = problem.truth.ideal_law(), Sampler(problem=problem, law=law)
    found = np.concatenate(
        [
            target.responsibilities(
                simulate(
                    sampler,
                    n_steps=N_STEPS,
                    n_paths=BLOCK,
                    seed=seed,
                    replicate=block,
                    threads=n_threads(),
                ).terminal.T
            )
            for block in range(N_BLOCKS)
        ]
    )
    level = 1.0 - (1.0 - LEVEL) / N_INTERVALS
    weights, influence = mode_weights(found)
    return total_variation_interval(weights, influence, TARGET, level).scaled(100.0)


@dataclass(frozen=True)
class ModeSeeking(Claim):
    """Descending J loses modes of forty where the family of controls allows it."""

    statement: ClassVar[str] = (
        "On-policy losses lose modes of forty_modes that the cross-entropy keeps or "
        "finds, without any sampling noise: descending J = KL(P_u‖P*) in affine "
        "controls collapses to one mode from u = 0, which reaches them all, and with "
        "free mode weights does not find missing modes. It takes such a family: in the "
        "problem's own, an exponential family that holds the optimum, J finds them all."
    )
    source: ClassVar[str] = (
        "Domingo-Enrich 2024, arXiv:2410.00345, and experiments of trust-region "
        "stochastic optimal control (Blessing et al. 2025), for networks; families and "
        "exact losses ours"
    )
    procedure: ClassVar[str] = (
        "Gradient descent on J and on the cross-entropy KL(P*‖P_u) with exact losses "
        "and gradients (sums over quadrature nodes) and the same step length, half of "
        "one over the largest curvature at the optimum, which is that of both; for one "
        "Gaussian in the Fisher metric with backtracking. The cross-entropy stops when "
        f"the total variation of the mode weights is below {FOUND:.0f} %, J after "
        f"{PATIENCE} times as many iterations at most; both after "
        f"{GAUSSIAN_ITERATIONS} for one Gaussian. The laws at the start and at the "
        f"ends are simulated: {N_PATHS:,} paths of {N_STEPS} steps of the control that "
        "samples them."
    )
    decision_rule: ClassVar[str] = (
        "Total variation is that of the mode weights of simulated paths, 0 for all "
        f"forty alike. Supported if it is at least {COLLAPSED:.0f} % after descending "
        f"J in affine controls and at most {LOST:.0f} % at their start and after "
        f"descending the cross-entropy; at least {LOST:.0f} % after descending J with "
        f"free weights; and at most {KEPT:.0f} % after descending the cross-entropy "
        "with free weights and either loss in the problem's own family, from both "
        "starts; refuted if one of these is excluded; undecided otherwise. All "
        f"{N_INTERVALS} intervals {JOINTLY}"
    )

    def experiment(self, seed: int, progress: Progress) -> pd.DataFrame:
        problem = registry.problem("forty_modes")
        assert isinstance(problem, FortyModes)
        rows: list[dict[str, Any]] = []
        for done, setting in enumerate(SETTINGS, start=1):
            rows += _evidence(problem, setting, seed)
            progress(done, len(SETTINGS))
        return pd.DataFrame(rows)

    def checks(self, evidence: pd.DataFrame) -> list[Check]:
        found = []
        for row in records(evidence[evidence["part"] == "end"]):
            setting = next(s for s in SETTINGS if s.said == row.setting)
            bounds = _required(setting, row.loss)
            if bounds is not None:
                found.append(
                    Check(
                        quantity=f"{row.setting}: total variation, {row.loss}",
                        interval=interval_of(row),
                        least=bounds[0],
                        most=bounds[1],
                        unit="%",
                    )
                )
        return found

    def summary(self, evidence: pd.DataFrame) -> str:
        ends = evidence[evidence["part"] == "end"].set_index(["setting", "loss"])
        near, far, free, single = (s.said for s in SETTINGS)

        def kept(setting: str, loss: str) -> str:
            return f"{ends['kept'][setting, loss]:.0f} of {N_MODES} modes"

        def iterations(setting: str, loss: str) -> str:
            return f"{ends['iterations'][setting, loss]:.0f}"

        return (
            f"In affine controls descending J keeps {kept(single, ON_POLICY)} from a "
            f"start that has {kept(single, 'start')}, the cross-entropy keeps "
            f"{kept(single, CROSS_ENTROPY)}. With free weights J has "
            f"{kept(free, ON_POLICY)} after {iterations(free, ON_POLICY)} iterations, "
            f"the cross-entropy {kept(free, CROSS_ENTROPY)} after "
            f"{iterations(free, CROSS_ENTROPY)}. In the problem's own family J finds "
            f"{kept(near, ON_POLICY)} in {iterations(near, ON_POLICY)} iterations from "
            f"θ = 0 (cross-entropy: {iterations(near, CROSS_ENTROPY)}) and in "
            f"{iterations(far, ON_POLICY)} from a start with {kept(far, 'start')} "
            f"({iterations(far, CROSS_ENTROPY)}): slowly where it starts in few modes, "
            "but it has no other stationary point."
        )

    def table(self, evidence: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(
            [
                {
                    "family and start": row.setting,
                    "loss": row.loss
                    if row.loss == "start"
                    else f"{row.loss}, {LOSSES[row.loss]}",
                    "iterations": f"{row.iterations:.0f}",
                    "modes kept": f"{row.kept:.0f}",
                    "KL(p‖ν)": plain(row.divergence),
                    "total variation, computed": f"{plain(row.exact)} %",
                    "simulated": interval(*interval_of(row), "%"),
                }
                for row in records(evidence[evidence["part"] == "end"])
            ]
        )

    def figure(self, evidence: pd.DataFrame) -> Figure:
        from sdebench.experiments.drawing import add_legend
        from sdebench.report.style import PAGE, finish_axes, new_figure, settle, style

        with style():
            figure = new_figure(PAGE, 2.9)
            left, *planes = figure.subplots(1, 3, width_ratios=(1.5, 1.0, 1.0))
            _draw_descents(left, evidence[evidence["part"] == "curve"])
            modes = evidence[evidence["part"] == "mode"]
            for axes, setting in zip(planes, SETTINGS[2:], strict=True):
                _draw_modes(axes, modes[modes["setting"] == setting.said])
                said = setting.said.partition(",")[0]
                axes.set_title(f"{said}, at the end", loc="left", pad=3)
                finish_axes(axes)
            finish_axes(left)
            add_legend(figure, left, 4)
            settle(figure)
        return figure


def _required(setting: Setting, loss: str) -> tuple[float, float] | None:
    """Return where the simulated total variation must lie, or None."""
    if loss == "start":
        return None if setting.finds else (0.0, LOST)
    if loss == CROSS_ENTROPY:
        return (0.0, KEPT) if setting.finds else (0.0, LOST)
    if not setting.loses:
        return 0.0, KEPT
    return (LOST if setting.finds else COLLAPSED), 100.0


def _evidence(
    problem: FortyModes, setting: Setting, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield ends, curves and mode weights of both descents from one start."""
    family, start = setting.family(problem), setting.start(problem)
    until = 0.01 * FOUND if setting.finds else 0.0
    most = PATIENCE**2 if setting.finds else GAUSSIAN_ITERATIONS
    covering = descend(family, CROSS_ENTROPY, start, most, until)
    if setting.finds:
        most = PATIENCE * (len(covering.distances) - 1)
    seeking = descend(family, ON_POLICY, start, most, until)
    at_start = Descent(start, [family.distance(start)])
    runs = {"start": at_start, ON_POLICY: seeking, CROSS_ENTROPY: covering}
    for loss, run in runs.items():
        weights = family.weights(run.end)
        keys = {"setting": setting.said, "loss": loss}
        yield {
            "part": "end",
            **keys,
            **columns(simulated_distance(problem, family.law(run.end), seed)),
            "exact": 100.0 * run.distances[-1],
            "iterations": len(run.distances) - 1,
            "kept": int(np.sum(weights > 0.1 * TARGET)),
            "divergence": family.loss(ON_POLICY, run.end).value,
        }
        for k, mean in enumerate(problem.means):
            yield {"part": "mode", **keys, "x": mean[0], "y": mean[1]} | {
                "weight": weights[k]
            }
        yield from _curve(keys, run.distances)


def _curve(
    keys: dict[str, str], distances: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield the total variation at iterations that are spread on a log scale."""
    last = len(distances) - 1
    chosen = np.unique(np.geomspace(1, last + 1, 60).astype(int)) - 1
    for i in chosen:
        yield {"part": "curve", **keys, "iteration": i, "value": 100.0 * distances[i]}


def _draw_descents(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw the total variation of every descent against its iterations."""
    import seaborn as sns

    palette = sns.color_palette("colorblind")
    for color, setting in zip(palette, SETTINGS, strict=False):
        for loss, line in ((ON_POLICY, "-"), (CROSS_ENTROPY, (0, (4, 1.5)))):
            mine = rows[(rows["setting"] == setting.said) & (rows["loss"] == loss)]
            label = setting.said if loss == ON_POLICY else None
            axes.plot(
                mine["iteration"] + 1,
                mine["value"],
                color=color,
                ls=line,
                lw=1.2,
                label=label,
            )
    axes.plot([], [], color="0.35", ls="-", label="J")
    axes.plot([], [], color="0.35", ls=(0, (4, 1.5)), label="cross-entropy")
    axes.set_xscale("log")
    axes.set_ylim(0.0, 102.0)
    axes.set_xlabel("iteration + 1")
    axes.set_ylabel("total variation of mode weights, %")


def _draw_modes(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw the modes in the plane with the weights that the two losses end with."""
    import seaborn as sns

    blue, orange = sns.color_palette("colorblind")[:2]
    size = 18.0 * N_MODES
    for loss, look in (
        (ON_POLICY, {"color": orange, "alpha": 0.75, "lw": 0.0}),
        (CROSS_ENTROPY, {"facecolors": "none", "edgecolors": [blue], "lw": 0.8}),
    ):
        mine = rows[rows["loss"] == loss]
        axes.scatter(mine["x"], mine["y"], s=size * mine["weight"], **look)
    axes.set_xlim(-46.0, 46.0)
    axes.set_ylim(-46.0, 46.0)
    axes.set_aspect("equal")
    axes.set_xlabel("disks: J, rings: cross-entropy")
