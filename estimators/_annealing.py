r"""Paths of densities from p_0 to p_T e^r, and Markov chains that leave them invariant.

With levels lambda_n, powers (n / N)^p or given ones with linear interpolation, the
densities of a path are, up to constants,

    marginals    rho_n = p_n e^{lambda_n r},  p_n the marginals of the base process,
    geometric    rho_n = p_0^{1 - lambda_n} (p_T e^r)^{lambda_n},

both from rho_0 = p_0, which X_0 is drawn from, to rho_N = p_T e^r, whose integral is Z.
The first follows the process, the second needs no density but the first and the last.

A move at level n proposes y = x + s z ("random_walk") or the Langevin step
y = x + 1/2 s^2 grad log rho_n(x) + s z ("mala") and accepts it with probability

    min(1, rho_n(y) q(y, x) / (rho_n(x) q(x, y))),

which leaves rho_n invariant at any s, unlike the Langevin step alone.  The length
s = step N^(1/2) g_{n-1} comes from the noise of the step of the base process that leads
to level n; as it does not fall with N, many levels keep the states near rho_n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import ParameterError, unknown
from sdebench.estimator import Array
from sdebench.estimators._work import (
    WorkEstimator,
    level,
    levels,
    not_a_path_of_densities,
    push,
    uniform,
)
from sdebench.simulate import primitives
from sdebench.simulate.tables import Tables
from sdebench.simulate.tile import block_loop, combine, glue

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

PATHS = ("marginals", "geometric")
MOVES = ("mala", "random_walk")
SCRATCH = 2
"""Vectors of the kernels besides the normals: the gradients at x and at y."""


# ---- for kernels ---------------------------------------------------------------
@glue
def annealed_level(n, N, power, KNOTS):  # type: ignore[no-untyped-def]
    """Return lambda_n; KNOTS empty, or given levels at equidistant shares of steps."""
    last = KNOTS.shape[0] - 1
    if last < 0:
        return level(n, N, power)
    place = n * last / N
    i = min(int(place), last - 1)
    return KNOTS[i] + (place - i) * (KNOTS[i + 1] - KNOTS[i])


@glue
def annealed_density(prepared, work, n, N, power, KNOTS, geometric, X, ROWS, row, B):  # type: ignore[no-untyped-def]
    """ROWS[row] = log rho_n(x); overwrites ROWS[2]."""
    ours, first = annealed_level(n, N, power, KNOTS), n
    OUT, MORE = ROWS[row : row + 1], ROWS[2:3]
    if geometric:
        first = 0
    primitives.base_log_density(prepared, work, first, X, ROWS, row, B)
    if geometric:
        primitives.base_log_density(prepared, work, N, X, ROWS, 2, B)
        combine(1.0 - ours, OUT, ours, MORE, OUT, B)
    primitives.reward(prepared, work, X, ROWS, 2, B)
    combine(1.0, OUT, ours, MORE, OUT, B)


@glue
def annealed_score(prepared, work, n, N, power, KNOTS, geometric, X, R, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = grad log rho_n(x); overwrites R."""
    ours, first = annealed_level(n, N, power, KNOTS), n
    if geometric:
        first = 0
    primitives.base_score(prepared, work, first, X, OUT, B)
    if geometric:
        primitives.base_score(prepared, work, N, X, R, B)
        combine(1.0 - ours, OUT, ours, R, OUT, B)
    primitives.reward_gradient(prepared, work, X, R, B)
    combine(1.0, OUT, ours, R, OUT, B)


@block_loop
def accept(langevin, s, X, Y, G, Z, U, ROWS, B):  # type: ignore[no-untyped-def]
    """Replace x by y where accepted, and ROWS[0] = log rho(x) by ROWS[1]; G at y."""
    half, inverse = 0.5 * s * s, 1.0 / s
    for p in range(B):
        ratio = ROWS[1, p] - ROWS[0, p]
        if langevin:
            for i in range(X.shape[0]):
                back = inverse * (X[i, p] - Y[i, p] - half * G[i, p])
                ratio += 0.5 * (Z[i, p] * Z[i, p] - back * back)
        if math.log(uniform(U[0, p])) < ratio:
            ROWS[0, p] = ROWS[1, p]
            for i in range(X.shape[0]):
                X[i, p] = Y[i, p]


@glue
def anneal(prepared, work, n, N, path, langevin, moves, step, Z, OWN, B):  # type: ignore[no-untyped-def]
    """Move the states work.adjoint at level n; ROWS[0] = log rho_n of them.

    path : (power, KNOTS, geometric); Z : the first proposal's normals; OWN : those of
    all other moves, see `AnnealingEstimator`, then two scratch vectors.
    """
    A, Y, R, ROWS = work.adjoint, work.adjoint_next, work.direction, work.start
    last = OWN.shape[0]
    HERE, THERE = OWN[last - 2], OWN[last - 1]
    s = step * math.sqrt(N) * prepared.noise[n - 1]
    for m in range(moves):
        first = (n - 1) * (2 * moves - 1)
        NORMALS = Z
        if m > 0:
            NORMALS = OWN[first + moves - 1 + m]
        combine(1.0, A, 0.0, A, Y, B)
        if langevin:
            annealed_score(prepared, work, n, N, *path, A, R, HERE, B)
            push(0.5 * s * s, HERE, s, NORMALS, Y, B)
            annealed_score(prepared, work, n, N, *path, Y, R, THERE, B)
        else:
            combine(1.0, Y, s, NORMALS, Y, B)
        annealed_density(prepared, work, n, N, *path, Y, ROWS, 1, B)
        accept(langevin, s, A, Y, THERE, NORMALS, OWN[first + m], ROWS, B)


# ---- what the estimators share --------------------------------------------------
def check_levels(given: tuple[float, ...]) -> None:
    """Raise for levels that do not lead from 0 to 1 inside [0, 1]."""
    if not given:
        return
    values = np.asarray(given, np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.all(np.isfinite(values)):
        raise ParameterError(
            f"levels {given} must be at least two finite numbers, from 0 to 1"
        )
    if values[0] != 0.0:
        raise ParameterError(
            f"levels begin with {values[0]:g}: at the first time the path of densities "
            "would jump from p_0, the law of X_0, to its tilt by that share of the "
            "reward; the first level must be 0"
        )
    if values[-1] != 1.0:
        raise ParameterError(
            f"levels end with {values[-1]:g}: at the last time the path of densities "
            "would have to jump to the tilted law p_T e^r; the last level must be 1"
        )
    if values.min() < 0.0 or values.max() > 1.0:
        raise ParameterError(f"levels {given} must stay in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class AnnealingEstimator(WorkEstimator):
    """log Z from Metropolis moves along a path of densities.

    Move m of level n takes the normals of a step of the base process (m = 0) or own
    ones, and a uniform for its acceptance: level by level ``moves`` vectors for the
    uniforms, then ``moves - 1`` for proposals.
    """

    levels: tuple[float, ...] = ()
    path: str = "marginals"
    kernel: str = "mala"
    moves: int = 1
    step: float = 0.25

    needs: ClassVar[frozenset[str]] = frozenset({"reward_gradient", "base_density"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels(self.levels)
        if self.path not in PATHS:
            raise unknown("path", self.path, PATHS)
        if self.kernel not in MOVES:
            raise unknown("kernel", self.kernel, MOVES)
        if self.moves < 1:
            raise ParameterError(f"moves {self.moves} must be at least 1 per level")
        if not 0.0 < self.step < math.inf:
            raise ParameterError(f"step {self.step} must be positive and finite")

    @property
    def needs_denoiser(self) -> bool:
        return False

    @property
    def kernel_options(self) -> tuple[Any, ...]:
        return (
            self.power,
            np.array(self.levels, np.float64),
            self.path == "geometric",
            self.kernel == "mala",
            self.moves,
            self.step,
        )

    def own_normals(self, n_steps: int) -> int:
        return n_steps * (2 * self.moves - 1) + SCRATCH

    def not_applicable_on(self, tables: Tables, times: Array) -> str | None:
        # between two densities every geometric one is integrable
        geometric, count = self.path == "geometric", len(tables.offset)
        level = None if geometric else self.all_levels(count)
        return not_a_path_of_densities(tables, level)

    def all_levels(self, n_steps: int) -> Array:
        """Return lambda_n, (n_steps + 1,)."""
        if not self.levels:
            return levels(n_steps, self.power)
        place = np.arange(n_steps + 1) * (len(self.levels) - 1) / n_steps
        found: Array = np.interp(place, np.arange(len(self.levels)), self.levels)
        return found

    def log_density(self, view: View, n: int, x: Tensor) -> Tensor:
        """Return log rho_n(x), (n_paths,)."""
        ours = float(self.all_levels(view.n_steps)[n])
        if self.path == "marginals":
            return view.base_log_density(n, x) + ours * view.reward(x)
        end = view.base_log_density(view.n_steps, x) + view.reward(x)
        return (1.0 - ours) * view.base_log_density(0, x) + ours * end

    def score(self, view: View, n: int, x: Tensor) -> Tensor:
        """Return grad log rho_n(x), (n_paths, dim)."""
        ours = float(self.all_levels(view.n_steps)[n])
        if self.path == "marginals":
            return view.base_score(n, x) + ours * view.reward_gradient(x)
        end = view.base_score(view.n_steps, x) + view.reward_gradient(x)
        return (1.0 - ours) * view.base_score(0, x) + ours * end

    def log_acceptance(
        self, view: View, n: int, x: Tensor, z: Tensor, here: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a proposal y, log rho_n(y), and the log of the acceptance ratio.

        ``here`` : log rho_n(x).
        """
        noise = view.apply_noise(n - 1, x.new_ones(1, view.dim))[0, 0]
        s = self.step * math.sqrt(view.n_steps) * noise
        half, langevin = 0.5 * s * s, self.kernel == "mala"
        y = x + s * z
        if langevin:
            y = y + half * self.score(view, n, x)
        there = self.log_density(view, n, y)
        ratio = there - here
        if langevin:
            back = (x - y - half * self.score(view, n, y)) / s
            ratio = ratio + 0.5 * ((z * z).sum(1) - (back * back).sum(1))
        return y, there, ratio

    def moved(
        self, view: View, n: int, x: Tensor, here: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the states after all moves at level n, and log rho_n of them."""
        import torch

        first = view.n_steps + (n - 1) * (2 * self.moves - 1)
        for m in range(self.moves):
            z = view.noise(first + self.moves - 1 + m if m else n - 1)
            y, there, ratio = self.log_acceptance(view, n, x, z, here)
            uniforms = torch.special.ndtr(view.noise(first + m)[:, 0])
            accepted = uniforms.log() < ratio
            x = torch.where(accepted[:, None], y, x)
            here = torch.where(accepted, there, here)
        return x, here
