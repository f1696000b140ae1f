"""Scores of a policy along the paths of another one.

The path is simulated with the control w' of the estimator's `control`; w is that of
`other_control`, here always "theta".  The noise of a step as w sees it is
z + w' - w, and

    log (p_theta / p')(X_{n+1} | X_n) = (w - w') . z - 1/2 |w - w'|^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sdebench.composite import PathCosts, copy_totals
from sdebench.estimator import Control, Estimator
from sdebench.simulate import primitives
from sdebench.simulate.tile import block_loop, clear, lanes, load, path_kernel, store

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View


@block_loop
def compare_controls(W, Z, V, ratio, row, B):  # type: ignore[no-untyped-def]
    """V: from w to z + w' - w;  ratio[row] += log-ratio of the step."""
    for p in range(0, B, lanes(V)):
        total = load(ratio, row, p)
        for i in range(W.shape[0]):
            z = load(Z, i, p)
            difference = load(V, i, p) - load(W, i, p)
            total = total + difference * (z - 0.5 * difference)
            store(V, i, p, z - difference)
        store(ratio, row, p, total)


@path_kernel
def _path_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    other: Any,
    other_work: Any,
    OUT: Any,
) -> None:
    """Set OUT (P + 5, .) to the rows of `OffPolicyScores`."""
    P = prepared.n_parameters
    V = other_work.direction
    clear(OUT, B)
    for n in range(W.shape[0]):
        primitives.evaluate(other, other_work, n, X[n], V, B)
        compare_controls(W[n], Z[n], V, OUT, P, B)
        primitives.control_parameter_vjp(other, other_work, n, X[n], V, OUT, 0, B)
    copy_totals(totals, OUT, P + 1, B)


@block_loop
def clip_ratio(log_ratio, scale, clip, V, LOW, HIGH, B):  # type: ignore[no-untyped-def]
    """LOW, HIGH = ratio V where the ratio is <= 1 + clip, >= 1 - clip; else 0."""
    for p in range(B):
        ratio = math.exp(scale * log_ratio[0, p])
        low = ratio if ratio <= 1.0 + clip else ratio * 0.0
        high = ratio if ratio >= 1.0 - clip else ratio * 0.0
        for i in range(V.shape[0]):
            LOW[i, p] = low * V[i, p]
            HIGH[i, p] = high * V[i, p]


@path_kernel
def _step_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    other: Any,
    other_work: Any,
    scale: float,
    clip: float,
    OUT: Any,
) -> None:
    """Set OUT (2P + 4, .) to the rows of `ClippedScores`."""
    P = prepared.n_parameters
    V, LOW, HIGH = other_work.direction, work.direction, other_work.adjoint
    log_ratio = work.adjoint
    clear(OUT, B)
    for n in range(W.shape[0]):
        x = X[n]
        primitives.evaluate(other, other_work, n, x, V, B)
        clear(log_ratio, B)
        compare_controls(W[n], Z[n], V, log_ratio, 0, B)
        clip_ratio(log_ratio, scale, clip, V, LOW, HIGH, B)
        primitives.control_parameter_vjp(other, other_work, n, x, LOW, OUT, 0, B)
        primitives.control_parameter_vjp(other, other_work, n, x, HIGH, OUT, P, B)
    copy_totals(totals, OUT, 2 * P, B)


@dataclass(frozen=True, kw_only=True)
class OffPolicy(Estimator):
    """Paths of the control ``old``, evaluated at theta."""

    estimand: ClassVar[str] = "gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"control_parameter_vjp"})

    old: Control = "theta"

    @property
    def control(self) -> Control:
        return self.old

    @property
    def other_control(self) -> str:
        return "theta"


def compared(view: View, n: int) -> tuple[Tensor, Tensor]:
    """Return the noise of step n as theta sees it, and the step's log-ratio."""
    assert view.other is not None
    paths = view.rollout()
    z = paths.noises[n]
    difference = view.other.control(n, paths.states[n]) - paths.controls[n]
    return z - difference, (difference * (z - 0.5 * difference)).sum(1)


@dataclass(frozen=True, kw_only=True)
class OffPolicyScores(OffPolicy):
    """Rows: score at theta (P), log p_theta / p', and those of `PathCosts`."""

    block_kernel = staticmethod(_path_kernel)

    def n_statistics(self, n_params: int) -> int:
        return n_params + 5

    def statistics(self, view: View) -> Tensor:
        import torch

        assert view.other is not None
        paths = view.rollout()
        score = paths.reward.new_zeros(view.n_paths, view.n_params)
        log_ratio = paths.reward.new_zeros(view.n_paths)
        for n, x in enumerate(paths.states[:-1]):
            noise, step = compared(view, n)
            log_ratio = log_ratio + step
            score = score + view.other.control_parameter_vjp(n, x, noise)
        costs = PathCosts().statistics(view)
        return torch.cat([score, log_ratio[:, None], costs], dim=1)


@dataclass(frozen=True, kw_only=True)
class ClippedScores(OffPolicy):
    """Scores times the ratio of every step, where it is not clipped.

    Rows: sum_n rho_n s_n over the steps with rho_n <= 1 + clip (P), the same with
    rho_n >= 1 - clip (P), and those of `PathCosts`.

    Parameters
    ----------
    clip : infinite for none.
    mean_over : rho_n to the power of its inverse: d for the mean log-probability.
    """

    block_kernel = staticmethod(_step_kernel)

    clip: float = math.inf
    mean_over: int = 1

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return 1.0 / self.mean_over, self.clip

    def n_statistics(self, n_params: int) -> int:
        return 2 * n_params + 4

    def statistics(self, view: View) -> Tensor:
        import torch

        assert view.other is not None
        paths = view.rollout()
        low = paths.reward.new_zeros(view.n_paths, view.n_params)
        high = torch.zeros_like(low)
        for n, x in enumerate(paths.states[:-1]):
            noise, log_ratio = compared(view, n)
            ratio = torch.exp(log_ratio / self.mean_over)
            score = view.other.control_parameter_vjp(n, x, ratio[:, None] * noise)
            low = low + score * (ratio <= 1.0 + self.clip)[:, None]
            high = high + score * (ratio >= 1.0 - self.clip)[:, None]
        return torch.cat([low, high, PathCosts().statistics(view)], dim=1)
