r"""Labels of SOC Matching with reparametrisation matrices learned from other paths.

The label before step k is, with eta_k = G_k^{-T} y_k and J_k the Jacobian of the base,

    a_k = R_k^T (a_{k+1} + eta_k) + grad f_k - J_k^T eta_k,

linear in R_k.  As its conditional mean does not depend on R_k, the matrix of the least
conditional variance is a regression of J_k^T eta_k - grad f_k on a_{k+1} + eta_k, with
affine functions of X_k for the conditional mean: one least-squares problem per step,
backwards in time.  M_t(s) is the product of the matrices between, M_t(t) = I.

The even paths use the matrices of the odd ones and the other way round, so that they
are independent of the labels that they make, whose mean is exact for every matrix.  The
paths are weighted by (1 + alpha / mean alpha) / 2: the variance under P*, kept from
resting on a few paths by that under the law of the paths.

On a linear-quadratic chain the regression has no residual: a_{k+1} = P X_{k+1} + p
leaves R_k^T = J_k^T (I + P G_k G_k^T)^{-1}, the Jacobian of the *optimally controlled*
step, and a_k = P_k X_k + p_k with P_k, p_k of the value function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.composite import PathCosts, copy_totals
from sdebench.estimators._matching_labels import MatchingLabels
from sdebench.estimators._off_policy import OffPolicy
from sdebench.estimators._rlr_terms import solve_noise, solve_noise_transpose
from sdebench.simulate import primitives
from sdebench.simulate.jit import inner, kernel
from sdebench.simulate.tile import clear, combine

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

FULL, DIAGONAL = 0, 1
FAMILIES = {"full": FULL, "diagonal": DIAGONAL}
PATHS_PER_FEATURE = 2
"""Of each half; with fewer the fit follows the noise."""
RIDGE = 1e-12
"""Of the Gram matrix of standardized features."""


def n_features(dim: int, family: str) -> int:
    """Return the number of features of a regression, with its constant."""
    return 1 + 2 * (dim if family == "full" else 1)


# ---- numba: one block is a whole replicate, columns are paths -----------------------
@inner
def fit_weights(totals, count, half, weights):  # type: ignore[no-untyped-def]
    """Set the weights of the paths half, half + 2, ... < count; their mean is one."""
    largest = -np.inf
    for p in range(half, count, 2):
        weights[p] = totals[3, p] - totals[1, p] - totals[2, p] - totals[0, p]
        largest = max(largest, weights[p])
    total, number = 0.0, 0
    for p in range(half, count, 2):
        weights[p] = np.exp(weights[p] - largest)
        total += weights[p]
        number += 1
    for p in range(half, count, 2):
        weights[p] = 0.5 * (1.0 + weights[p] * number / total)


@inner
def slopes(features, labels, weights):  # type: ignore[no-untyped-def]
    """Return the slopes (F, L) of labels (n, L) on features (n, F), with a constant."""
    n, F = features.shape
    scale = np.empty(F)
    for f in range(F):
        mean = np.sum(weights * features[:, f]) / n
        features[:, f] -= mean
        scale[f] = np.sqrt(np.sum(weights * features[:, f] ** 2) / n)
        if scale[f] <= 1e-12 * abs(mean):
            scale[f] = 1.0
        features[:, f] /= scale[f]
    for i in range(labels.shape[1]):
        labels[:, i] -= np.sum(weights * labels[:, i]) / n
    weighted = np.ascontiguousarray(features.T * weights)
    gram = weighted @ features / n
    for f in range(F):
        gram[f, f] += RIDGE
    found = np.linalg.solve(gram, weighted @ labels / n)
    for f in range(F):
        found[f] /= scale[f]
    return found


@inner
def fit_matrix(BASIS, WANTED, X, weights, half, count, diagonal, D):  # type: ignore[no-untyped-def]
    """Set D (d, d): WANTED ~ D^T BASIS + an affine function of X, over a half."""
    d, n = D.shape[0], (count - half + 1) // 2
    own = np.empty(n)
    for k in range(n):
        own[k] = weights[half + 2 * k]
    D[:] = 0.0
    if diagonal:
        single, one = np.empty((n, 2)), np.empty((n, 1))
        for i in range(d):
            for k in range(n):
                single[k, 0] = BASIS[i, half + 2 * k]
                single[k, 1] = X[i, half + 2 * k]
                one[k, 0] = WANTED[i, half + 2 * k]
            D[i, i] = slopes(single, one, own)[0, 0]
        return
    features, labels = np.empty((n, 2 * d)), np.empty((n, d))
    for k in range(n):
        for i in range(d):
            features[k, i] = BASIS[i, half + 2 * k]
            features[k, d + i] = X[i, half + 2 * k]
            labels[k, i] = WANTED[i, half + 2 * k]
    found = slopes(features, labels, own)
    for i in range(d):
        for j in range(d):
            D[i, j] = found[i, j]


@inner
def add_shifted(BASIS, D, first, B, OUT):  # type: ignore[no-untyped-def]
    """OUT += (I + D)^T BASIS in the columns first, first + 2, ... < B."""
    d = D.shape[0]
    for p in range(first, B, 2):
        for i in range(d):
            total = BASIS[i, p]
            for j in range(d):
                total += D[j, i] * BASIS[j, p]
            OUT[i, p] += total


@kernel
def _learned_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    other: Any,
    other_work: Any,
    count: int,
    diagonal: int,
    OUT: Any,
) -> None:
    """Set OUT (P + 4, .) to the rows of `LearnedLabels` of a whole replicate."""
    P, N, d = prepared.n_parameters, W.shape[0], W.shape[1]
    A, V, NEXT = work.adjoint, work.direction, work.adjoint_next
    fitted, later = np.zeros_like(X[N]), np.zeros_like(X[N])
    Y, T = np.zeros_like(X[N]), np.zeros_like(X[N])
    weights, D = np.ones(count), np.zeros((2, d, d))
    for half in range(2):
        fit_weights(totals, count, half, weights)
    clear(OUT, B)
    primitives.reward_gradient(prepared, work, X[N], A, B)
    combine(-1.0, A, 0.0, A, A, B)
    combine(1.0, A, 0.0, A, fitted, B)
    for n in range(N - 1, -1, -1):
        primitives.noise_transpose(prepared, work, n, A, T, B)
        primitives.evaluate(other, other_work, n, X[n], V, B)
        combine(1.0, V, 1.0, T, V, B)
        primitives.control_parameter_vjp(other, other_work, n, X[n], V, OUT, 0, B)
        if n == 0:
            break
        primitives.refresh(prepared, work, n, X[n], B)
        combine(1.0, Z[n], 1.0, W[n], V, B)
        solve_noise_transpose(prepared, work, n, V, Y, B)
        primitives.base_vjp(prepared, work, n, X[n], Y, T, B)
        # what is left without the matrix, and its share of the labels
        combine(-1.0, T, 0.0, T, NEXT, B)
        primitives.running_cost_gradient(prepared, work, n, X[n], NEXT, B)
        combine(1.0, A, 1.0, Y, A, B)
        combine(1.0, fitted, 1.0, Y, fitted, B)
        combine(-1.0, NEXT, -1.0, fitted, T, B)
        combine(1.0, NEXT, 0.0, NEXT, later, B)
        for half in range(2):
            fit_matrix(fitted, T, X[n], weights, half, count, diagonal, D[half])
            add_shifted(fitted, D[half], half, B, later)
            add_shifted(A, D[half], 1 - half, B, NEXT)
        A, NEXT = NEXT, A
        fitted, later = later, fitted
    copy_totals(totals, OUT, P, B)


@dataclass(frozen=True, kw_only=True)
class LearnedLabels(OffPolicy):
    """The rows of `MatchingLabels` with learned matrices.

    Parameters
    ----------
    old : control of the paths.
    family : of the matrices of a step, "full" or "diagonal".
    """

    needs: ClassVar[frozenset[str]] = MatchingLabels.needs - {"control_vjp"}
    block_kernel = staticmethod(_learned_kernel)

    family: str = "full"

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (FAMILIES[self.family],)

    def n_statistics(self, n_params: int) -> int:
        return n_params + 4

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def statistics(self, view: View) -> Tensor:
        import torch

        assert view.other is not None
        paths = view.rollout()
        weights = _fit_weights(paths.log_weight)
        label = -view.reward_gradient(paths.states[-1])
        fitted = label.double()
        gradient = label.new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n]
            residual = view.other.control(n, x) + view.noise_transpose(n, label)
            gradient = gradient + view.other.control_parameter_vjp(n, x, residual)
            if n == 0:
                break
            noise = solve_noise(view, n, paths.noises[n] + paths.controls[n])
            rest = view.running_cost_gradient(n, x) - view.base_vjp(n, x, noise)
            basis, fit_basis = label + noise, fitted + noise.double()
            label, fitted = rest + basis, rest.double() + fit_basis
            shift, fit_shift = torch.zeros_like(fitted), torch.zeros_like(fitted)
            for half in range(2):
                own, others = slice(half, None, 2), slice(1 - half, None, 2)
                matrix = self._fit(
                    fit_basis[own], -fitted[own], x[own].double(), weights[own]
                )
                fit_shift[own] = fit_basis[own] @ matrix
                shift[others] = basis[others].double() @ matrix
            label, fitted = label + shift.to(label.dtype), fitted + fit_shift
        return torch.cat([gradient, PathCosts().statistics(view)], dim=1)

    def _fit(self, basis: Tensor, wanted: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """Return D (d, d) with wanted ~ basis D + an affine function of x."""
        import torch

        if self.family == "full":
            features = torch.cat([basis, x], dim=1)
            return _slopes(features, wanted, weights)[: basis.shape[1]]
        pairs = torch.stack([basis, x], dim=2).unbind(1)
        single = [
            _slopes(pair, wanted[:, i : i + 1], weights)[0, 0]
            for i, pair in enumerate(pairs)
        ]
        return torch.diag(torch.stack(single))


def _fit_weights(log_weight: Tensor) -> Tensor:
    """Return the paths' weights in the regressions, of mean one in each half."""
    import torch

    log_weight = log_weight.double()
    weights = torch.empty_like(log_weight)
    for half in range(2):
        own = log_weight[half::2]
        tilted = torch.exp(own - own.max())
        weights[half::2] = 0.5 * (1.0 + tilted / tilted.mean())
    return weights


def _slopes(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the slopes (F, L) of labels (n, L) on features (n, F), with a constant."""
    import torch

    weights = weights[:, None]
    mean = (weights * features).mean(0)
    centred = features - mean
    scale = (weights * centred**2).mean(0).sqrt()
    scale = torch.where(scale > 1e-12 * mean.abs(), scale, 1.0)
    centred = centred / scale
    wanted = labels - (weights * labels).mean(0)
    weighted = (weights * centred).T
    gram = weighted @ centred / len(features)
    gram.diagonal().add_(RIDGE)
    found = torch.linalg.solve(gram, weighted @ wanted / len(features))
    return found / scale[:, None]
