"""Estimators made of several simulations: wrappers, perturbations, groups, levels.

A composite estimator sees no path.  It asks a `Runner` for the statistics that other
estimators return, under the noise, the parameters or the time grid that it chooses,
and combines them in numpy.  It is written once for both backends, its cost is that of
all it runs, and like every estimator it has no access to the truth.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.estimator import Array, Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tile import block_loop, clear, lanes, load, path_kernel, store

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.simulate.noise import Noise
    from sdebench.view import View


def some_paths(noise: Noise, first: int, count: int) -> Noise:
    """Return the noise of ``count`` paths from path ``first`` on."""
    part = slice(first, first + count)
    return noise._replace(
        steps=noise.steps[:, :, part],
        start=noise.start[:, part],
        uniforms=noise.uniforms[part],
    )


class Runner:
    """What a composite estimator may do with one block of paths.

    Attributes
    ----------
    theta : (P,) the evaluation point.
    times : (n_steps + 1,) the time grid.
    n_steps, n_params, n_paths, dim : sizes.
    """

    theta: Array
    times: Array
    n_steps: int
    n_params: int
    n_paths: int
    dim: int

    def rng(self) -> np.random.Generator:
        """Return a generator of the estimator's own randomness, fixed for the block."""
        raise NotImplementedError

    def noise(self, n_steps: int | None = None) -> Noise:
        """Return the noise of the block's paths on a grid of ``n_steps`` steps."""
        raise NotImplementedError

    def normals(self, count: int) -> Array:
        """Return standard normals (count, n_paths) that no path uses."""
        raise NotImplementedError

    def run(
        self,
        *estimators: Estimator,
        noise: Noise | None = None,
        theta: Array | None = None,
        times: Array | None = None,
        first: int = 0,
    ) -> list[Array]:
        """Simulate the block and return each estimator's statistics (C, n_paths).

        Parameters
        ----------
        estimators : with the same control, so that they share the paths.
        noise : default: the noise of the block; of fewer paths to simulate those only.
        theta : (P,) default: the evaluation point.
        times : default: the time grid of the block.
        first : the path of the block with which the noise begins.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CompositeEstimator(Estimator):
    """An estimator that combines the statistics of other estimators."""

    @abstractmethod
    def run(self, runner: Runner) -> Array:
        """Return the statistics (n_statistics, runner.n_paths) of a block.

        As with every estimator, their mean over the paths goes to `combine`, and only
        columns of the same group may depend on each other.
        """

    @property
    def backends(self) -> tuple[str, ...]:
        return "numba", "torch"

    def statistics(self, view: View) -> Tensor:
        """Not available: a composite estimator sees no paths."""
        raise NotImplementedError(f"{self.name} runs simulations of its own: see run()")


@block_loop
def copy_totals(totals, OUT, row, B):  # type: ignore[no-untyped-def]
    """Rows row, ..., row + 3 of OUT = totals."""
    for i in range(4):
        for p in range(0, B, lanes(OUT)):
            store(OUT, row + i, p, load(totals, i, p))


@path_kernel
def _scores_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (2P + 4, .) to the rows of `PathScores`."""
    P = prepared.n_parameters
    clear(OUT, B)
    for n in range(W.shape[0]):
        primitives.refresh_control(prepared, work, n, X[n], B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], Z[n], OUT, 0, B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], W[n], OUT, P, B)
    copy_totals(totals, OUT, 2 * P, B)


@path_kernel
def _costs_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (4, .) to the totals of every path."""
    copy_totals(totals, OUT, 0, B)


@dataclass(frozen=True, kw_only=True)
class PathCosts(Estimator):
    """The cost of each path in parts: not an estimator, but what composites ask for.

    Rows: control cost sum 1/2 |w_n|^2, running cost, martingale sum w_n . z_n, reward.
    """

    estimand: ClassVar[str] = "gradient"
    block_kernel = staticmethod(_costs_kernel)

    def n_statistics(self, n_params: int) -> int:
        return 4

    def statistics(self, view: View) -> Tensor:
        import torch

        paths = view.rollout()
        parts = (
            paths.control_cost,
            paths.running_cost,
            paths.martingale,
            paths.reward,
        )
        return torch.stack(parts, dim=1)


@dataclass(frozen=True, kw_only=True)
class PathScores(Estimator):
    """Score and cost of each path: not an estimator, but what composites ask for.

    Rows: the score S = sum_n (dw_n/dtheta)^T z_n (P), the derivative of the control
    cost at fixed states D = sum_n (dw_n/dtheta)^T w_n (P), and those of `PathCosts`.
    Steps without noise add nothing to S.
    """

    estimand: ClassVar[str] = "gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    block_kernel = staticmethod(_scores_kernel)

    def n_statistics(self, n_params: int) -> int:
        return 2 * n_params + 4

    def statistics(self, view: View) -> Tensor:
        import torch

        paths = view.rollout()
        score = view.start().new_zeros(view.n_paths, view.n_params)
        direct = torch.zeros_like(score)
        for n in range(view.n_steps):
            x, z, w = paths.states[n], paths.noises[n], paths.controls[n]
            score = score + view.control_parameter_vjp(n, x, z)
            direct = direct + view.control_parameter_vjp(n, x, w)
        return torch.cat([score, direct, PathCosts().statistics(view)], dim=1)
