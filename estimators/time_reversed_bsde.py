"""Time-reversed backward SDE: costates regressed along reversed paths.

The costate phi_n(x) = E[a_n | X_n = x] is the conditional mean of the lean adjoint a
(``adjoint="frozen"``: derivatives at a frozen control) or of the full adjoint.  It is
learned on paths that run backwards from the simulated X_N, with noise of their own:

    X_n = X_{n+1} - (mu_n - X_{n+1} + G_n w_n) + delta_n
    Y_n = (d mu_n/dx)^T Y_{n+1} + grad f_n + tr(G_n G_n^T phi'') + phi' delta_n,
    delta_n = G_n G_n^T s_{n+1} + G_n xi_n,    Y_N = -grad r(X_N),

all functions at X_{n+1}, phi = phi_{n+1}, s the score of the simulated X_{n+1}.
With the exact phi the label Y_n is phi_n(X_n) up to the time step, without any noise,
because state and label take the **same** xi; and whatever s is.  Regressing Y_n on
features of X_n gives phi_n, which the next step uses: one sweep is the fixed point of
the published iteration over sweeps, since the label of a slice depends on later slices
only.  The gradient is that of adjoint matching with phi for the adjoint,

    sum_n (dw_n/dtheta)^T (w_n + G_n^T phi_{n+1}(X_{n+1})),

on the forward paths.  The trace term has all of G G^T: one half is phi's own equation,
one half Ito's formula along the reversed path.

The noise xi of a path is the forward noise of another one, so that it costs nothing.
Where theta moves the law of X_0 as well, phi_0(X_0) gives its part.

References
----------
Y. Mei, A. Taghvaei, "Time-reversed BSDEs for accurate gradient estimation in diffusion
models", arXiv:2603.20455; its predecessors are arXiv:2403.02044 and arXiv:2410.04615.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench.errors import unknown
from sdebench.estimator import Array, Estimator, Sizes
from sdebench.estimators._costate_network import NetworkScore, NetworkSlice
from sdebench.estimators._costate_regression import (
    Slice,
    check_degree,
    factor_table,
    fill_slopes,
    fill_state,
    fill_traces,
    fill_values,
    fit_gaussian_score,
    fit_slice,
    gaussian_score,
    too_few_paths,
)
from sdebench.simulate import primitives
from sdebench.simulate.jit import kernel
from sdebench.simulate.tile import clear, combine

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.view import View

Costate = Slice | NetworkSlice

SHIFT = 3
"""The reversed path i takes the noise of the forward path i + SHIFT."""


@kernel
def block_kernel(
    prepared: Any,
    work: Any,
    X: Any,
    Z: Any,
    W: Any,
    totals: Any,
    B: int,
    count: int,
    degree: int,
    full: int,
    aligned: int,
    fitted: int,
    OUT: Any,
) -> None:
    """Set OUT (P, B + PADDING) to the gradient of every path of a whole replicate."""
    N, d = W.shape[0], W.shape[1]
    clear(OUT, B)
    factors = factor_table(d, degree)
    F = factors.shape[0]
    mean, scale, u, v = np.empty(d), np.empty(d), np.empty(d + 1), np.zeros(d + 1)
    slopes, traces = np.empty(F), np.empty(F)
    slope, offset = np.zeros((d, d)), np.zeros(d)
    G, spread, padded = np.empty((d, d)), np.empty((d, d)), np.zeros((d + 1, d + 1))
    x, y, zero = np.zeros_like(X[N]), np.zeros_like(X[N]), np.zeros_like(X[N])
    x_next, y_next, push = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    w, V, phi = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    sums = np.zeros_like(totals)
    combine(1.0, X[N], 0.0, X[N], x, B)
    primitives.reward_gradient(prepared, work, x, y, B)
    combine(-1.0, y, 0.0, y, y, B)
    combine(1.0, y, 0.0, y, phi, B)
    for n in range(N - 1, -1, -1):
        coefficients = fit_slice(x, y, count, factors, mean, scale)
        # the gradient's term of this step, on the forward paths
        if n < N - 1:
            fill_values(X[n + 1], count, factors, mean, scale, coefficients, phi)
        primitives.refresh(prepared, work, n, X[n], B)
        primitives.noise_transpose(prepared, work, n, phi, V, B)
        combine(1.0, V, 1.0, W[n], V, B)
        primitives.control_parameter_vjp(prepared, work, n, X[n], V, OUT, 0, B)
        if n == 0 and not primitives.has_start_parameters(prepared):
            break
        # G, row i from G^T e_i, and G G^T
        clear(V, B)
        for i in range(d):
            V[i, i] = 1.0
        primitives.noise_transpose(prepared, work, n, V, push, B)
        for i in range(d):
            for j in range(d):
                G[i, j] = push[j, i]
        for i in range(d):
            for j in range(d):
                spread[i, j] = 0.0
                for k in range(d):
                    spread[i, j] += G[i, k] * G[j, k]
                padded[i, j] = spread[i, j] / (scale[i] * scale[j])
        if fitted:
            fit_gaussian_score(X[n + 1], count, slope, offset)
        # the controlled mean, and the transported label
        primitives.evaluate(prepared, work, n, x, w, B)
        primitives.step(prepared, work, n, x, w, zero, x_next, sums, B)
        primitives.refresh(prepared, work, n, x, B)
        primitives.base_vjp(prepared, work, n, x, y, y_next, B)
        primitives.running_cost_gradient(prepared, work, n, x, y_next, B)
        if full:
            primitives.noise_transpose(prepared, work, n, y, V, B)
            combine(1.0, V, 1.0, w, V, B)
            primitives.control_vjp(prepared, work, n, x, V, y_next, B)
        for p in range(count):
            q = (p + SHIFT) % count
            for i in range(d):
                drift = 0.0
                noise = 0.0
                for j in range(d):
                    score = offset[j]
                    for k in range(d):
                        score += slope[j, k] * x[k, p]
                    drift += spread[i, j] * score
                    noise += G[i, j] * Z[n, j, q]
                push[i, p] = drift + (noise if aligned else 0.0)
                x_next[i, p] = 2.0 * x[i, p] - x_next[i, p] + drift + noise
            for i in range(d):
                v[i] = push[i, p] / scale[i]
            fill_state(x, p, mean, scale, u)
            fill_slopes(u, v, factors, slopes)
            fill_traces(u, padded, factors, traces)
            if not aligned:
                # a later increment, and phi' at the new state; no increment comes
                # later than the last one: take another path's
                m = n - 1 if n > 0 else 0
                s = q if n > 0 else (p - SHIFT) % count
                for i in range(d):
                    noise = 0.0
                    for j in range(d):
                        noise += G[i, j] * Z[m, j, s]
                    v[i] = noise / scale[i]
                fill_state(x_next, p, mean, scale, u)
                for f in range(F):
                    traces[f] += slopes[f]
                fill_slopes(u, v, factors, slopes)
            for i in range(d):
                total = 0.0
                for f in range(F):
                    total += (slopes[f] + traces[f]) * coefficients[f, i]
                y_next[i, p] += total
        x, x_next = x_next, x
        y, y_next = y_next, y
    if primitives.has_start_parameters(prepared):
        coefficients = fit_slice(x, y, count, factors, mean, scale)
        fill_values(X[0], count, factors, mean, scale, coefficients, phi)
        primitives.start_cost_gradient(prepared, work, 1.0, OUT, B)
        primitives.start_parameter_vjp(prepared, work, X[0], phi, OUT, B)


ADJOINTS = {"frozen": "matching_gradient", "full": "gradient"}
INCREMENTS = ("aligned", "misaligned")
FEATURES = ("polynomials", "network")
SCORES = ("fitted", "network", "none")
NEEDS = {
    "drift_vjp",
    "control_parameter_vjp",
    "running_cost_gradient",
    "reward_gradient",
}


@dataclass(frozen=True, kw_only=True)
class TimeReversedBSDE(Estimator):
    """Costate regression along time-reversed paths.

    Parameters
    ----------
    degree : of the polynomials that the costate is regressed on.
    features : "polynomials", by least squares, or a small "network" on top of them,
        which is trained by gradient descent and runs in torch alone.
    adjoint : "frozen" control (lean adjoint) or "full", whose estimand is the gradient
        of J.
    increments : "aligned", the same in state and label, or "misaligned", as in the
        first released code: the label takes the increment of the next step and the
        slope at the new state.
    score : of the simulated states: "fitted", affine, a small "network", or "none".
    """

    source: ClassVar[str] = "Mei and Taghvaei 2026, arXiv:2603.20455, algorithm"
    formula: ClassVar[str] = r"""\begin{aligned}
X_n &= 2 X_{n+1} - \mu_n - G_n w_n + \delta_n, \quad
  \delta_n = G_n G_n^\top s_{n+1} + G_n \xi_n \\
Y_n &= \left( \frac{\partial \mu_n}{\partial x} \right)^\top Y_{n+1} + \nabla f_n
  + \mathrm{tr}\left( G_n G_n^\top \varphi_{n+1}'' \right)
  + \varphi_{n+1}' \delta_n, \quad Y_N = -\nabla r(X_N) \\
\varphi_n &= \mathrm{argmin}_{\varphi} \sum | \varphi(X_n) - Y_n |^2 \\
g &= \sum_n \left( \frac{\partial w_n}{\partial \theta} \right)^\top
  \left( w_n + G_n^\top \varphi_{n+1} \right)
\end{aligned}"""
    unbiased: ClassVar[str] = (
        "with many paths, on a linear-quadratic chain, the gradient of the discretized "
        "adjoint-matching loss (full adjoint: of J_N) up to the error of the reversed "
        "Euler steps, of first order and known exactly"
    )
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {},
        {"degree": 3},
        {"adjoint": "full"},
        {"increments": "misaligned"},
    )
    block_kernel = staticmethod(block_kernel)

    degree: int = 1
    features: str = "polynomials"
    adjoint: str = "frozen"
    increments: str = "aligned"
    score: str = "fitted"

    trace_weight: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_degree(self.degree)
        for name, allowed in (
            ("features", FEATURES),
            ("adjoint", ADJOINTS),
            ("increments", INCREMENTS),
            ("score", SCORES),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return ADJOINTS[self.adjoint]

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        own = {"control_vjp"} if self.adjoint == "full" else set()
        return frozenset(NEEDS | own)

    @property
    def declared_bias(self) -> str:
        return "any"

    @property
    def handles_initial_law(self) -> bool:
        return True

    @property
    def backends(self) -> tuple[str, ...]:
        trained = "network" in (self.features, self.score)
        return ("torch",) if trained else ("numba", "torch")

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        return (
            self.degree,
            int(self.adjoint == "full"),
            int(self.increments == "aligned"),
            int(self.score == "fitted"),
        )

    def group_size(self, n_paths: int) -> int:
        return n_paths

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        if sizes.n_paths <= 2 * SHIFT:
            return f"it needs at least {2 * SHIFT + 1} paths; n_paths = {sizes.n_paths}"
        return too_few_paths(self.degree, sizes)

    def statistics(self, view: View) -> Tensor:
        paths = view.rollout()
        slices, _, _ = self.costates(view, first=1 - view.has_start_parameters)
        gradient = paths.states[0].new_zeros(view.n_paths, view.n_params)
        for n in reversed(range(view.n_steps)):
            x = paths.states[n + 1]
            last = n == view.n_steps - 1
            phi = -view.reward_gradient(x) if last else slices[n + 1](x)
            direction = paths.controls[n] + view.noise_transpose(n, phi)
            gradient = gradient + view.control_parameter_vjp(
                n, paths.states[n], direction
            )
        if view.has_start_parameters:
            x = paths.states[0]
            gradient = gradient + view.start_cost_gradient()
            gradient = gradient + view.start_parameter_vjp(x, slices[0](x))
        return gradient

    def costates(
        self, view: View, first: int = 1
    ) -> tuple[dict[int, Costate], dict[int, Tensor], dict[int, Tensor]]:
        """Return the fitted costates and the reversed states and labels by step.

        Parameters
        ----------
        first : the earliest step, 0 to learn the costate of the initial law.
        """
        x = view.rollout().states[-1]
        y = -view.reward_gradient(x)
        states: dict[int, Tensor] = {}
        labels: dict[int, Tensor] = {}
        slices: dict[int, Costate] = {}
        score: Callable[[Tensor], Tensor] | None = None
        for n in reversed(range(first - 1, view.n_steps)):
            states[n + 1], labels[n + 1] = x, y
            slices[n + 1] = self._fit(x, y, slices.get(n + 2))
            if n >= first:
                score = self.fit_score(view.rollout().states[n + 1], score)
                x, y = self.step_back(view, n, x, y, slices[n + 1], score)
        return slices, states, labels

    def _fit(self, x: Tensor, y: Tensor, last: Costate | None) -> Costate:
        if self.features == "polynomials":
            return Slice.fit(x, y, self.degree)
        assert last is None or isinstance(last, NetworkSlice)
        return NetworkSlice.fit(x, y, self.degree, last)

    def fit_score(
        self, states: Tensor, last: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[Tensor], Tensor] | None:
        """Return the score fitted to simulated states (n, d), or None for none.

        ``last`` : that of the later slice, with which the training of a network begins.
        """
        if self.score == "none":
            return None
        if self.score == "network":
            assert last is None or isinstance(last, NetworkScore)
            return NetworkScore.fit(states, last)
        slope, offset = gaussian_score(states)
        return lambda x: x.double() @ slope.T + offset

    def step_back(
        self,
        view: View,
        n: int,
        x: Tensor,
        y: Tensor,
        phi: Any,
        score: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return states and labels at n from those at n + 1, phi_{n+1} and s_{n+1}."""
        import torch

        paths = view.rollout()
        eye = torch.eye(view.dim, dtype=x.dtype, device=x.device)
        noise = view.apply_noise(n, eye).T
        spread = noise @ noise.T
        drift = torch.zeros_like(x)
        if score is not None:
            drift = (score(x) @ spread.double()).to(x.dtype)

        def shock(step: int, shift: int = SHIFT) -> Tensor:
            return paths.noises[step].roll(-shift, 0) @ noise.T

        w = view.control(n, x)
        label = view.base_vjp(n, x, y) + view.running_cost_gradient(n, x)
        if self.adjoint == "full":
            along = w + view.noise_transpose(n, y)
            label = label + view.control_vjp(n, x, along)
        label = label + self.trace_weight * phi.trace(x, spread)
        before = 2.0 * x - view.base_mean(n, x) - w @ noise.T + drift + shock(n)
        if self.increments == "aligned":
            return before, label + phi.along(x, drift + shock(n))
        label = label + phi.along(x, drift)
        # no increment comes later than the last one: take another path's
        later = shock(n - 1) if n else shock(0, -SHIFT)
        return before, label + phi.along(before, later)

    def start_gradient(self, view: View) -> tuple[Tensor, Tensor]:
        """Return E phi_0(X_0) (d,) and E phi_0(X_0) (X_0 - E X_0)^T (d, d).

        The gradient with respect to the mean of X_0 and, times the inverse transpose
        of a factor of its covariance, to that factor: of J with ``adjoint="full"``,
        and at the optimum with both adjoints.
        """
        x = view.rollout().states[0]
        phi = self.costates(view, first=0)[0][0](x)
        return phi.mean(0), phi.T @ (x - x.mean(0)) / len(x)

    def target(self, policy: PolicyChain) -> Array | None:
        """Return the limit of many paths, by the joint normal law of X_n and Y_n.

        None with a quartic reward, whose labels are not normal.
        """
        chain = policy.chain
        if np.any(np.asarray(chain.reward_quartic)):
            return None
        costate = reversed_costates(
            policy,
            full=self.adjoint == "full",
            aligned=self.increments == "aligned",
            fitted=self.score != "none",
        )
        return policy.costate_gradient(costate)


def reversed_costates(
    policy: PolicyChain, *, full: bool, aligned: bool, fitted: bool
) -> tuple[Array, Array]:
    """Return S (N + 1, d, d), s (N + 1, d) of phi_n = S x + s on an affine chain.

    X and Y are jointly normal, and the regression is Cov(Y, X) Cov(X)^-1.
    """
    chain, gain, bias = policy.chain, policy.gain, policy.bias
    means, covariances = chain.moments(gain, bias)
    count, d = chain.n_steps, chain.dim
    S, s = np.zeros((count + 1, d, d)), np.zeros((count + 1, d))
    S[-1], s[-1] = chain.reward_quadratic, -np.asarray(chain.reward_linear)
    mean, cov = means[-1], covariances[-1]
    y_mean, y_cov = S[-1] @ mean + s[-1], S[-1] @ cov
    later = np.zeros((d, d))  # covariance of the label with the next increment
    for n in range(count - 1, -1, -1):
        M, G, K = chain.transition[n], chain.noise[n], gain[n]
        spread = G @ G.T
        slope, level = np.zeros((d, d)), np.zeros(d)
        if fitted:
            slope = -np.linalg.inv(covariances[n + 1])
            level = -slope @ means[n + 1]
        A = 2.0 * np.eye(d) - M - G @ K + spread @ slope
        b = spread @ level - chain.offset[n] - G @ bias[n]
        left = M + G @ K if full else M
        H = chain.running[n] + S[n + 1] @ spread @ slope
        c = S[n + 1] @ spread @ level
        if full:
            H, c = H + K.T @ K, c + K.T @ bias[n]
        push = S[n + 1] @ G
        y_cov = left.T @ (y_cov @ A.T + later @ G.T) + H @ cov @ A.T
        y_mean = left.T @ y_mean + H @ mean + c
        mean, cov = A @ mean + b, A @ cov @ A.T + spread
        if aligned:
            y_cov = y_cov + push @ G.T
        else:
            later = push
        S[n] = np.linalg.solve(cov, y_cov.T).T
        s[n] = y_mean - S[n] @ mean
    return S, s
