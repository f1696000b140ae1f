r"""Paths of products of powers of noised mixtures, and correctors that follow them.

The densities q_i, isotropic Gaussian mixtures on R^d, are noised by the process of rate
b: q_{i,t} is the law of alpha x + (1 - alpha^2)^(1/2) z, alpha = e^{-b (1 - t) / 2}.
Time runs from noise to data.  The path

    rho_t = prod_i q_{i,t}^{gamma_i(t)},    S = sum_i gamma_i s_i,    s_i = grad log q_i

holds annealing q^gamma, products q_1 q_2 and classifier-free guidance
q_1^w q_0^{1-w}.  From

    d_t log q_i = -d b/2 - (b/2) (x . s_i + div s_i + |s_i|^2)

and the Fokker-Planck equation of

    dX = (b/2 x + b S) dt + b^{1/2} dB

rho_t is the law of X with the weights e^A,

    dA/dt = (1 - sum gamma_i) d b/2 + (b/2) (|S|^2 - sum gamma_i |s_i|^2)
            + sum gamma_i' log q_i.

The same process, started from rho_0, runs backwards in time as the plain noising
dX = -b/2 x dt + b^{1/2} dB whatever the powers.  On a grid, with a = alpha_n over
alpha_{n+1}, step h and

    F_n(x, x') = N(x'; x + h (b/2 x + b S_n(x)), b h I),
    B_n(x', x) = N(x; a x', (1 - a^2) I),

the weight prod_n rho_{n+1}(x') B_n(x', x) / (rho_n(x) F_n(x, x')) times rho_0 over the
density of X_0 has the mean int rho_1 at any number of steps; the left sum of dA is off
by O(h).  Where int rho_0 is that of N(0, I)^{sum gamma}, the law of X_0 that fits is
N(0, I / sum gamma).

Source: Skreta et al. 2025, arXiv:2503.02819, for the weights; one formula for all
targets, the backward kernel and the exact moments are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp

from sdebench.closed_form.gaussian_mixture import GaussianMixture
from sdebench.errors import ParameterError, unknown

Array = NDArray[np.float64]

WEIGHTS = ("kernel_ratio", "riemann")
STARTS = ("matched", "standard")
"""Laws of X_0: N(0, I / sum gamma), or N(0, I) weighted as if it were that."""
SCAN = np.linspace(0.0, 1.0, 4097)
"""Times at which a path is checked."""


class Noised(NamedTuple):
    """log q_t (n,) and its score (n, d) at points."""

    log_density: Array
    score: Array


def noised(mixture: GaussianMixture, x: Array, alpha: float) -> Noised:
    """Return the noised density of a mixture of isotropic components at x (n, d)."""
    variances = 1.0 + alpha**2 * (mixture.covariances - 1.0)
    gap = x[:, None, :] - alpha * mixture.means
    logs = mixture.log_weights - 0.5 * mixture.dim * np.log(2.0 * np.pi * variances)
    logs = logs - 0.5 * np.sum(gap**2, axis=2) / variances
    value = logsumexp(logs, axis=1)
    share = np.exp(logs - value[:, None]) / variances
    return Noised(value, -np.einsum("nk,nkd->nd", share, gap))


class State(NamedTuple):
    """A path at one time and points: logs (m, n), scores (m, n, d), powers, alpha."""

    logs: Array
    scores: Array
    powers: Array
    alpha: float

    @property
    def log_density(self) -> Array:
        """Return log rho_t, (n,)."""
        return self.powers @ self.logs

    @property
    def score(self) -> Array:
        """Return S = grad log rho_t, (n, d)."""
        return np.tensordot(self.powers, self.scores, 1)


@dataclass(frozen=True, eq=False)
class DensityPath:
    """The path prod_i q_{i,t}^{gamma_i(t)}, piecewise linear in the powers.

    Parameters
    ----------
    factors : mixtures of isotropic components.
    powers : (m,), or (k, m) at the ``times``.
    times : (k,) from 0 to 1.
    rate : of the noising.

    Raises
    ------
    ParameterError
        A path that jumps, is not finite or does not reach from 0 to 1; components that
        are not isotropic; a density that is not integrable, with the first time at
        which that is so.
    """

    factors: Sequence[GaussianMixture]
    powers: ArrayLike
    times: ArrayLike = (0.0, 1.0)
    rate: float = 8.0

    def __post_init__(self) -> None:
        times = np.asarray(self.times, dtype=float)
        powers = np.atleast_2d(np.asarray(self.powers, dtype=float))
        if len(powers) == 1:
            powers = np.repeat(powers, len(times), axis=0)
        object.__setattr__(self, "times", times)
        object.__setattr__(self, "powers", powers)
        self._check_factors()
        self._check_continuity()
        self._check_integrability()

    def _check_factors(self) -> None:
        if not self.rate > 0.0:
            raise ParameterError(f"rate {self.rate!r} of the noising must be positive")
        kinds = {factor.kind for factor in self.factors}
        if kinds != {"isotropic"} or len({f.dim for f in self.factors}) != 1:
            raise ParameterError(
                "the densities must be mixtures of isotropic components of one "
                f"dimension; given {sorted(kinds)} in dimensions "
                f"{sorted({f.dim for f in self.factors})}"
            )

    def _check_continuity(self) -> None:
        times, powers = self._knots
        if powers.shape != (len(times), len(self.factors)):
            raise ParameterError(
                f"powers have the shape {powers.shape}; give one for each of "
                f"{len(self.factors)} densities at each of {len(times)} times"
            )
        if not np.all(np.isfinite(powers)):
            raise ParameterError(
                f"powers {powers.tolist()} of an annealing path must be finite"
            )
        gaps = np.diff(times)
        if times[0] != 0.0 or times[-1] != 1.0 or not np.all(gaps >= 0.0):
            raise ParameterError(
                f"times {times.tolist()} of an annealing path must increase from 0 to 1"
            )
        if np.any(gaps == 0.0):
            jump = float(times[int(np.argmax(gaps == 0.0))])
            raise ParameterError(
                f"the annealing path jumps at t = {jump:g}, so that it is not "
                "absolutely continuous and its work is no integral; give every time "
                "once"
            )

    def _check_integrability(self) -> None:
        bad = np.array([self.tail_precision(t) <= 0.0 for t in SCAN])
        if not bad.any():
            return
        first = int(np.argmax(bad))
        time = 0.0
        if first:
            time = brentq(self.tail_precision, SCAN[first - 1], SCAN[first])
        raise ParameterError(
            "the intermediate density prod q_i^gamma_i is not integrable from t = "
            f"{time:.4g} on: the precision sum gamma_i / variance_i of its tails, with "
            "the largest variance of every density, is not positive there; use smaller "
            "powers or a narrower density"
        )

    @property
    def _knots(self) -> tuple[Array, Array]:
        return np.asarray(self.times), np.asarray(self.powers)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.factors[0].dim

    def powers_at(self, t: float) -> Array:
        """Return gamma (m,)."""
        times, powers = self._knots
        return np.array([np.interp(t, times, column) for column in powers.T])

    def rates_at(self, t: float) -> Array:
        """Return gamma' (m,), from the right."""
        times, powers = self._knots
        piece = min(int(np.searchsorted(times, t, side="right")), len(times) - 1)
        rates: Array = np.diff(powers, axis=0)[piece - 1] / np.diff(times)[piece - 1]
        return rates

    def alpha(self, t: float) -> float:
        """Return the signal's scale."""
        return float(np.exp(-0.5 * self.rate * (1.0 - t)))

    def _tails(self, t: float) -> Array:
        """Return p_i of q_{i,t} ~ e^{-p_i |x|^2 / 2} far out, (m,)."""
        largest = np.array([np.max(factor.covariances) for factor in self.factors])
        return np.asarray(1.0 / (1.0 + self.alpha(t) ** 2 * (largest - 1.0)))

    def tail_precision(self, t: float) -> float:
        """Return p of rho_t ~ e^{-p |x|^2 / 2} far out."""
        return float(self.powers_at(t) @ self._tails(t))

    def at(self, x: Array, t: float) -> State:
        """Return the path at points (n, d)."""
        alpha = self.alpha(t)
        parts = [noised(factor, x, alpha) for factor in self.factors]
        return State(
            np.array([part.log_density for part in parts]),
            np.array([part.score for part in parts]),
            self.powers_at(t),
            alpha,
        )

    def work_rate(self, here: State) -> Array:
        """Return dA/dt without the term of gamma', (n,)."""
        squares = here.powers @ np.sum(here.scores**2, axis=2)
        excess = np.sum(here.score**2, axis=1) - squares
        growth = 0.5 * self.rate * self.dim * (1.0 - here.powers.sum())
        return np.asarray(growth + 0.5 * self.rate * excess)

    def step_mean(self, x: Array, here: State, h: float) -> Array:
        """Return the mean of F_n, (n, d)."""
        return np.asarray(x + h * self.rate * (0.5 * x + here.score))

    def tail_work(self, t: float, h: float) -> float:
        """Return p of e^{-p |x|^2 / 2}, the factor of a step's work far out."""
        inverse, powers = self._tails(t), self.powers_at(t)
        excess = (powers @ inverse) ** 2 - powers @ inverse**2
        change = (self.powers_at(t + h) - powers) @ inverse
        return float(change - h * self.rate * excess)

    # ---- the start -----------------------------------------------------------------
    @property
    def start_precision(self) -> float:
        """The precision sum gamma of the law of X_0 that fits."""
        return float(self.powers_at(0.0).sum())

    def start_scale(self, start: str) -> float:
        """Return the standard deviation of X_0."""
        if start not in STARTS:
            raise unknown("start", start, STARTS)
        return self.start_precision**-0.5 if start == "matched" else 1.0

    def log_start_weight(self, x: Array) -> Array:
        """Return log rho_0 - log N(0, I / sum gamma) at x (n, d)."""
        p = self.start_precision
        law = 0.5 * self.dim * np.log(p / (2.0 * np.pi)) - 0.5 * p * np.sum(x**2, 1)
        return np.asarray(self.at(x, 0.0).log_density - law)

    # ---- one step --------------------------------------------------------------------
    def log_riemann(self, here: State, later: Array, h: float) -> Array:
        """Return the work of a step, (n,); ``later`` are the powers at its end."""
        return h * self.work_rate(here) + (later - here.powers) @ here.logs

    def log_kernel_ratio(
        self, x: Array, after: Array, here: State, there: State, h: float
    ) -> Array:
        """Return log rho_{n+1} B_n / (rho_n F_n) of steps x -> after, (n, d)."""
        forth = _log_normal(after - self.step_mean(x, here, h), self.rate * h)
        shrink = here.alpha / there.alpha
        back = _log_normal(x - shrink * after, 1.0 - shrink**2)
        return np.asarray(there.log_density - here.log_density + back - forth)


def _log_normal(gap: Array, variance: float) -> Array:
    """Return log N(gap; 0, variance I), last axis the dimension."""
    square = np.sum(gap**2, axis=-1) / variance
    size = gap.shape[-1] * np.log(2.0 * np.pi * variance)
    return np.asarray(-0.5 * (square + size))


def log_start_ratio(path: DensityPath, x: Array) -> Array:
    """Return log E[mu(X_0) / N(X_0; 0, I / g) | X_1 = x] at x (n, d).

    mu = N(0, I), g = sum gamma at the start, X_0 ~ N(alpha_0 x, (1 - alpha_0^2) I) by
    the plain noising.  Kernel-ratio weights that take mu for N(0, I / g) have the mean
    int rho_1 times this, instead of int rho_1; it is infinite for
    (g - 1) (1 - alpha_0^2) >= 1.
    """
    alpha, excess = path.alpha(0.0), path.start_precision - 1.0
    left = 1.0 - excess * (1.0 - alpha**2)
    if left <= 0.0:
        return np.full(len(x), np.inf)
    square = excess * alpha**2 * np.sum(x**2, axis=1) / left
    size = path.dim * np.log(path.start_precision * left)
    return np.asarray(0.5 * (square - size))


# ---- exact answers -----------------------------------------------------------------
def product(mixtures: Sequence[GaussianMixture]) -> GaussianMixture:
    """Return the product of densities, a mixture whose mass is its integral."""
    found = mixtures[0]
    for other in mixtures[1:]:
        parts = [found.tilt(component) for component in other.log_components()]
        found = GaussianMixture.superposition(parts)
    return found


class Moments(NamedTuple):
    """log of the mass, and the second moment per dimension, of a measure."""

    log_mass: float
    second: float


def gaussian_moments(path: DensityPath, t: float) -> Moments:
    """Return int rho_t and E|x|^2 / d of Gaussian factors in closed form."""
    alpha, powers, dim = path.alpha(t), path.powers_at(t), path.dim
    variances = np.array(
        [1.0 + alpha**2 * (float(f.covariances[0]) - 1.0) for f in path.factors]
    )
    means = np.array([alpha * f.means[0] for f in path.factors])
    weights = powers / variances
    precision, pull = weights.sum(), weights @ means
    log_mass = powers @ (
        [float(f.log_weights[0]) for f in path.factors]
        - 0.5 * dim * np.log(2.0 * np.pi * variances)
        - 0.5 * np.sum(means**2, axis=1) / variances
    )
    log_mass += 0.5 * pull @ pull / precision
    log_mass += 0.5 * dim * np.log(2.0 * np.pi / precision)
    return Moments(
        float(log_mass), float(1.0 / precision + pull @ pull / precision**2 / dim)
    )


def quadrature_moments(path: DensityPath, t: float, nodes: Array) -> Moments:
    """Return int rho_t and E x^2 on a line, by the rule of equidistant nodes."""
    logs = path.at(nodes[:, None], t).log_density
    step = nodes[1] - nodes[0]
    total = float(logsumexp(logs))
    second = float(np.exp(logs - total) @ nodes**2)
    return Moments(total + float(np.log(step)), second)


class Weighted(NamedTuple):
    """E W^m, and the means of x^2 and x^4 under the paths' ends weighted by W^m."""

    log_mass: float
    second: float
    fourth: float


def weighted_ends(
    path: DensityPath,
    n_steps: int,
    weights: str,
    order: float,
    nodes: Array,
    start: str = "matched",
) -> Weighted:
    """Return moments of the chain of F_n, by iterated integrals on a line.

    Parameters
    ----------
    weights : "kernel_ratio" or "riemann".
    order : the power m of the weights; 0 for the chain itself.
    nodes : (k,) equidistant, as far as every integrand reaches.
    start : the law of X_0, of `STARTS`.
    """
    if weights not in WEIGHTS:
        raise unknown("weights", weights, WEIGHTS)
    x, step, h = nodes[:, None], nodes[1] - nodes[0], 1.0 / n_steps
    here = path.at(x, 0.0)
    logs = _log_normal(x, path.start_scale(start) ** 2)
    logs = logs + order * path.log_start_weight(x)
    for n in range(n_steps):
        there = path.at(x, (n + 1) * h)
        # (from, to): the kernel of the step times its weight to the power m
        forth = _log_normal(x - path.step_mean(x, here, h)[:, None], path.rate * h)
        if weights == "riemann":
            work = order * path.log_riemann(here, there.powers, h)
            logs = logs + work
        else:
            shrink = here.alpha / there.alpha
            back = _log_normal(x[:, None] - shrink * x, 1.0 - shrink**2)
            forth = forth + order * (back - forth)
            logs = logs - order * here.log_density
        top = logs.max()
        mass = np.exp(logs - top) @ np.exp(forth)
        with np.errstate(divide="ignore"):
            logs = top + np.log(mass * step)
        if weights == "kernel_ratio":
            logs = logs + order * there.log_density
        here = there
    total = float(logsumexp(logs))
    share = np.exp(logs - total)
    return Weighted(
        total + float(np.log(step)),
        float(share @ nodes**2),
        float(share @ nodes**4),
    )


def finite_weight_moment(
    path: DensityPath,
    n_steps: int,
    weights: str,
    order: float,
    start: str = "matched",
) -> bool:
    """Return whether E W^m is finite.

    Far out every factor is its widest component, so that the integrand of a step is
    e^{-quadratic}: the precision of what is left of it follows a Riccati recursion.
    """
    h, b = 1.0 / n_steps, path.rate
    tail = path.tail_precision(0.0)
    p = path.start_scale(start) ** -2 + order * (tail - path.start_precision)
    for n in range(n_steps):
        t = n * h
        tail, later = path.tail_precision(t), path.tail_precision(t + h)
        forth, back = 1.0 / (b * h), 0.0
        shrink = path.alpha(t) / path.alpha(t + h)
        if weights == "riemann":
            p += order * path.tail_work(t, h)
        else:
            p -= order * tail
            forth, back = (1.0 - order) * forth, order / (1.0 - shrink**2)
        move = 1.0 + h * b * (0.5 - tail)
        inside = p + forth * move**2 + back
        if inside <= 0.0:
            return False
        p = forth + back * shrink**2 - (forth * move + back * shrink) ** 2 / inside
        if weights == "kernel_ratio":
            p += order * later
    return p > 0.0
