"""Scores that composite estimators of the likelihood-ratio family ask for.

The score of the parameters on a path is S = sum_n (dw_n/dtheta)^T z_n; steps without
noise add nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import PathCosts, copy_totals
from sdebench.estimator import Array, Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tile import clear, path_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


@path_kernel
def _scores_kernel(
    prepared: Any, work: Any, X: Any, Z: Any, W: Any, totals: Any, B: int, OUT: Any
) -> None:
    """Set OUT (P + 4, .) to the rows of `Scores`."""
    clear(OUT, B)
    for n in range(W.shape[0]):
        if prepared.noisy[n] != 0.0:
            primitives.refresh_control(prepared, work, n, X[n], B)
            primitives.control_parameter_vjp(prepared, work, n, X[n], Z[n], OUT, 0, B)
    copy_totals(totals, OUT, prepared.n_parameters, B)


@dataclass(frozen=True, kw_only=True)
class Window(Estimator):
    """What is simulated with noise in the steps first, ..., first + count - 1 only.

    ``count`` 0 : noise in every step.
    """

    first: int = 0
    count: int = 0

    def noisy_steps(self, n_steps: int) -> Array | None:
        return window_mask(self.first, self.count, n_steps) if self.count else None


def window_mask(first: int, count: int, n_steps: int) -> Array:
    """Return 1 for the steps first, ..., first + count - 1 and 0 for the others."""
    mask = np.zeros(n_steps)
    mask[first : first + count] = 1.0
    return mask


@dataclass(frozen=True, kw_only=True)
class WindowCosts(Window, PathCosts):
    """`PathCosts` of paths with noise in a window."""


@dataclass(frozen=True, kw_only=True)
class Scores(Window):
    """Rows: score of each path (P), and those of `PathCosts`."""

    estimand: ClassVar[str] = "gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})
    block_kernel = staticmethod(_scores_kernel)

    def n_statistics(self, n_params: int) -> int:
        return n_params + 4

    def statistics(self, view: View) -> Tensor:
        import torch

        paths = view.rollout()
        score = paths.reward.new_zeros(view.n_paths, view.n_params)
        for n in np.flatnonzero(view.noisy):
            x, z = paths.states[n], paths.noises[n]
            score = score + view.control_parameter_vjp(int(n), x, z)
        return torch.cat([score, PathCosts().statistics(view)], dim=1)
