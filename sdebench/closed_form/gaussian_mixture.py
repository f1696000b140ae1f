"""Exact algebra of Gaussian mixtures: noising, conditioning, tilting, moments.

For p(x) = sum_k w_k N(x; m_k, C_k), with w_k > 0 of any sum (the mass):

- push-forward   A X + a + N(0, B)  has components  N(A m_k + a, A C_k A^T + B);
- posterior given y = A X + N(0, B):  Q_k = A C_k A^T + B, G_k = C_k A^T Q_k^-1,
  weights w_k N(y; A m_k, Q_k), means m_k + G_k (y - A m_k) and covariances
  C_k - G_k A C_k;
- tilt by exp q, q(x) = c + b.x - 1/2 x^T K x, with g_k = b - K m_k:
  C'_k = (C_k^-1 + K)^-1,  m'_k = m_k + C'_k g_k,
  log w'_k = log w_k + q(m_k) + 1/2 g_k^T C'_k g_k - 1/2 log det(I + C_k K);
- covariance of two quadratics, by Isserlis within and by the law of total covariance
  between components.

A component's tilt is written at its mean, so nothing large cancels, and all weights
stay logarithms.  Covariances keep the cheapest of three forms, "isotropic" (K,),
"diagonal" (K, d) and "full" (K, d, d).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp, roots_hermitenorm

from sdebench.closed_form.quadratic import (
    Array,
    Quadratic,
    diagonals,
    frozen_array,
    multiply,
    operator,
    promote,
    symmetric,
    trace_product,
    trace_product_pair,
)
from sdebench.errors import ParameterError

Kind = Literal["isotropic", "diagonal", "full"]
_KINDS: tuple[Kind, Kind, Kind] = ("isotropic", "diagonal", "full")

# Points are evaluated in blocks whose temporaries (components x points x d) stay in
# the level-2 cache.
_BLOCK_ELEMENTS = 1 << 16
_LARGEST_TENSOR = 10_000_000
# An eigenvalue of I + L^T K L below a few roundings of its terms has no digit left.
_ROUNDING = 8 * np.finfo(np.float64).eps


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A finite sum of weighted Gaussians on R^d.

    Parameters
    ----------
    log_weights : shape (K,), finite; the mass sum(exp(log_weights)) is free.
    means : shape (K, d).
    covariances : shape (K,), variances of isotropic components; (K, d), diagonals;
        or (K, d, d), symmetric positive definite matrices.

    Raises
    ------
    ParameterError
        Wrong shapes, entries that are not finite, or a covariance that is not
        positive definite: the message names the component and its eigenvalue.
    """

    log_weights: Array
    means: Array
    covariances: Array

    def __post_init__(self) -> None:
        log_weights = frozen_array("log_weights", self.log_weights)
        means = frozen_array("means", self.means)
        covariances = frozen_array("covariances", self.covariances)
        if means.ndim != 2 or 0 in means.shape:
            raise ParameterError(
                f"means has shape {means.shape}; give (n_components, dim)"
            )
        count, dim = means.shape
        if log_weights.shape != (count,):
            raise ParameterError(
                f"log_weights has shape {log_weights.shape}; {count} means need "
                f"({count},)"
            )
        if covariances.shape not in ((count,), (count, dim), (count, dim, dim)):
            raise ParameterError(
                f"covariances has shape {covariances.shape}; give ({count},) "
                f"isotropic, ({count}, {dim}) diagonal or ({count}, {dim}, {dim}) full"
            )
        if covariances.ndim == 3:
            covariances = symmetric("covariances", covariances)
            covariances.setflags(write=False)
        object.__setattr__(self, "log_weights", log_weights)
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "covariances", covariances)
        self._require_positive_definite()

    def _require_positive_definite(self) -> None:
        if self.covariances.ndim < 3:
            smallest = np.min(self._spread, axis=1)
        else:
            try:
                _ = self._cholesky
                return
            except np.linalg.LinAlgError:
                smallest = np.linalg.eigvalsh(self.covariances)[:, 0]
        worst = int(np.argmin(smallest))
        if self.covariances.ndim == 3 or smallest[worst] <= 0:
            raise ParameterError(
                f"covariance of component {worst} is not positive definite: "
                f"eigenvalue {smallest[worst]:.6g}; give eigenvalues above 0"
            )

    # ---- other constructors -------------------------------------------------------

    @classmethod
    def from_weights(
        cls, weights: ArrayLike, means: ArrayLike, covariances: ArrayLike
    ) -> GaussianMixture:
        """Return the mixture of positive weights; a number is a shared variance."""
        given = frozen_array("weights", weights)
        if given.ndim != 1 or np.any(given <= 0):
            raise ParameterError(
                f"weights {given} are not all positive; leave out empty components"
            )
        spread = np.asarray(covariances, dtype=float)
        if spread.ndim == 0:
            spread = np.full(given.size, spread)
        return cls(np.log(given), np.asarray(means, dtype=float), spread)

    @classmethod
    def isotropic(
        cls, means: ArrayLike, variance: ArrayLike, weights: ArrayLike | None = None
    ) -> GaussianMixture:
        """Return isotropic components, of equal weights 1/K unless given."""
        centers = np.asarray(means, dtype=float)
        count = centers.shape[0] if centers.ndim else 0
        if weights is None:
            weights = np.full(count, 1 / max(count, 1))
        return cls.from_weights(weights, centers, np.broadcast_to(variance, (count,)))

    @classmethod
    def normal(
        cls, mean: ArrayLike, covariance: ArrayLike, log_mass: float = 0.0
    ) -> GaussianMixture:
        """Return one Gaussian; the covariance is a number, (d,) or (d, d)."""
        return cls(
            np.array([log_mass]),
            np.asarray(mean, dtype=float)[None],
            np.asarray(covariance, dtype=float)[None],
        )

    @classmethod
    def superposition(cls, mixtures: Sequence[GaussianMixture]) -> GaussianMixture:
        """Return the sum of the measures, in the cheapest form that holds them all."""
        if not mixtures:
            raise ParameterError("superposition of no mixtures; give at least one")
        dims = sorted({mixture.dim for mixture in mixtures})
        if len(dims) > 1:
            raise ParameterError(f"mixtures of dimensions {dims} cannot be added")
        rank = max(mixture._rank for mixture in mixtures)
        return cls(
            np.concatenate([m.log_weights for m in mixtures]),
            np.concatenate([m.means for m in mixtures]),
            np.concatenate([promote(m.covariances, rank, m.dim) for m in mixtures]),
        )

    # ---- form and mass ------------------------------------------------------------

    @property
    def n_components(self) -> int:
        """The number of components K."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.means.shape[1]

    @property
    def kind(self) -> Kind:
        """The form of the covariances: "isotropic", "diagonal" or "full"."""
        return _KINDS[self._rank]

    @property
    def weights(self) -> Array:
        """Normalized weights, shape (K,)."""
        return np.exp(self.log_weights - self.log_mass())

    def log_mass(self) -> float:
        """Return log sum_k w_k."""
        return float(logsumexp(self.log_weights))

    def scaled(self, log_factor: float) -> GaussianMixture:
        """Return the measure times exp(log_factor)."""
        return GaussianMixture(
            self.log_weights + log_factor, self.means, self.covariances
        )

    def normalized(self) -> GaussianMixture:
        """Return the probability law, of mass 1."""
        return self.scaled(-self.log_mass())

    def as_full(self) -> GaussianMixture:
        """Return the same mixture with (K, d, d) covariances."""
        return self._with_rank(2)

    def as_diagonal(self) -> GaussianMixture:
        """Return the same mixture with (K, d) covariances.

        Raises
        ------
        ParameterError
            A full covariance has a nonzero entry off its diagonal.
        """
        if self._rank < 2:
            return self._with_rank(1)
        off = self.covariances * (1 - np.eye(self.dim))
        if off.any():
            worst = int(np.argmax(np.max(np.abs(off), axis=(1, 2))))
            raise ParameterError(
                f"covariance of component {worst} is not diagonal: largest other entry "
                f"{np.max(np.abs(off[worst])):.6g}; use the full form"
            )
        return GaussianMixture(self.log_weights, self.means, self._spread)

    def log_components(self) -> list[Quadratic]:
        """Return log(w_k N(x; m_k, C_k)) as quadratics, one for each component."""
        zero = np.zeros(self.dim)
        return [
            Quadratic.log_normal(m, C) + Quadratic(float(w), zero)
            for w, m, C in zip(
                self.log_weights, self.means, self.covariances, strict=True
            )
        ]

    @property
    def _rank(self) -> int:
        return self.covariances.ndim - 1

    @property
    def _spread(self) -> Array:
        return diagonals(self.covariances, self.dim)

    def _with_rank(self, rank: int) -> GaussianMixture:
        if rank == self._rank:
            return self
        return GaussianMixture(
            self.log_weights, self.means, promote(self.covariances, rank, self.dim)
        )

    # ---- density and score --------------------------------------------------------

    @cached_property
    def _cholesky(self) -> Array:
        return np.asarray(np.linalg.cholesky(promote(self.covariances, 2, self.dim)))

    @cached_property
    def _whitening(self) -> Array:
        """W_k with C_k^-1 = W_k^T W_k: (K, 1), (K, d) or (K, d, d)."""
        if self._rank == 2:
            return np.asarray(np.tril(np.linalg.inv(self._cholesky)))
        root: Array = 1 / np.sqrt(self.covariances)
        return root[:, None] if self._rank == 0 else root

    @cached_property
    def _precision(self) -> Array:
        if self._rank == 2:
            return np.swapaxes(self._whitening, 1, 2) @ self._whitening
        return 1 / self.covariances

    @cached_property
    def _log_scale(self) -> Array:
        """log(w_k) - 1/2 log det(2 pi C_k), shape (K,)."""
        if self._rank == 2:
            roots = np.diagonal(self._cholesky, axis1=1, axis2=2)
        else:
            roots = np.sqrt(self._spread)
        half = np.sum(np.log(roots), axis=1) + 0.5 * self.dim * np.log(2 * np.pi)
        return self.log_weights - half

    def _terms(self, x: Array) -> tuple[Array, Array]:
        """Return log components (K, n) and their gradients (K, n, d) at x (n, d)."""
        # Differences first: |x|^2 - 2 x.m + |m|^2 loses digits far from the origin.
        away = x[None] - self.means[:, None]
        W = self._whitening
        if self._rank == 2:
            z = away @ np.swapaxes(W, 1, 2)
            pull = -(z @ W)
        else:
            z = away * W[:, None]
            pull = -(z * W[:, None])
        square = np.einsum("knd,knd->kn", z, z)
        return self._log_scale[:, None] - 0.5 * square, pull

    def _weighted_terms(self, x: Array) -> tuple[Array, Array]:
        """Return responsibilities (K, n) and gradients of the log components."""
        logs, pull = self._terms(x)
        return _softmax(logs), pull

    def _map(
        self, function: Callable[..., Array], shape: tuple[int, ...], *given: ArrayLike
    ) -> Array:
        """Evaluate a function of (n, d) points block by block."""
        arrays = [np.asarray(array, dtype=float) for array in given]
        for array in arrays:
            if array.ndim == 0 or array.shape[-1] != self.dim:
                raise ParameterError(
                    f"points have shape {array.shape}; give (..., {self.dim})"
                )
        arrays = list(np.broadcast_arrays(*arrays))
        leading = arrays[0].shape[:-1]
        flat = [array.reshape(-1, self.dim) for array in arrays]
        count = flat[0].shape[0]
        block = max(1, _BLOCK_ELEMENTS // self.means.size)
        if count <= block:
            return function(*flat).reshape(leading + shape)
        out = np.empty((count, *shape))
        for start in range(0, count, block):
            part = slice(start, start + block)
            out[part] = function(*(array[part] for array in flat))
        return out.reshape(leading + shape)

    def log_component_densities(self, x: ArrayLike) -> Array:
        """Return log(w_k N(x; m_k, C_k)), shape (..., K), at points (..., d)."""
        return self._map(lambda p: self._terms(p)[0].T, (self.n_components,), x)

    def log_density(self, x: ArrayLike) -> Array:
        """Return log p, shape (...), at points (..., d)."""
        return self._map(lambda p: logsumexp(self._terms(p)[0], axis=0), (), x)

    def responsibilities(self, x: ArrayLike) -> Array:
        """Return P(component k | x), shape (..., K), at points (..., d)."""
        return self._map(
            lambda p: self._weighted_terms(p)[0].T, (self.n_components,), x
        )

    def score(self, x: ArrayLike) -> Array:
        """Return grad log p, shape (..., d), at points (..., d)."""

        def block(points: Array) -> Array:
            return np.einsum("kn,knd->nd", *self._weighted_terms(points))

        return self._map(block, (self.dim,), x)

    def score_jacobian(self, x: ArrayLike) -> Array:
        """Return the Hessian of log p, shape (..., d, d), at points (..., d)."""

        def block(points: Array) -> Array:
            share, pull = self._weighted_terms(points)
            # Centered at the score: sum w g g^T - s s^T would cancel in the tails.
            pull -= np.einsum("kn,knd->nd", share, pull)
            left = np.moveaxis(share[..., None] * pull, 0, 2)
            mixing = left @ np.swapaxes(pull, 0, 1)
            forms = promote(np.tensordot(share.T, self._precision, 1), 2, self.dim)
            return mixing - forms

        return self._map(block, (self.dim, self.dim), x)

    def score_vjp(self, x: ArrayLike, v: ArrayLike) -> Array:
        """Return (d score / dx)^T v, shape (..., d), without forming the Jacobian."""

        def block(points: Array, vectors: Array) -> Array:
            share, pull = self._weighted_terms(points)
            pull -= np.einsum("kn,knd->nd", share, pull)
            along = share * np.einsum("knd,nd->kn", pull, vectors)
            mixing = np.einsum("kn,knd->nd", along, pull)
            if self._rank == 2:
                W = self._whitening
                curved = (vectors[None] @ np.swapaxes(W, 1, 2)) @ W
                return mixing - np.einsum("kn,knd->nd", share, curved)
            precision = np.tensordot(share.T, self._precision, 1)
            return mixing - promote(precision, 1, self.dim) * vectors

        return self._map(block, (self.dim,), x, v)

    # ---- linear observation -------------------------------------------------------

    def push_forward(
        self,
        matrix: ArrayLike = 1.0,
        offset: ArrayLike = 0.0,
        noise_covariance: ArrayLike = 0.0,
    ) -> GaussianMixture:
        """Return the law of A X + a + N(0, B).

        Parameters
        ----------
        matrix : A, a number, (d,) (a diagonal) or (p, d).
        offset : a, a number or (p,).
        noise_covariance : B, a number, (p,) or (p, p); zero is allowed where the
            result keeps positive definite covariances.
        """
        A = np.asarray(frozen_array("matrix", matrix))
        if A.ndim == 2 and A.shape[1] == self.dim:
            means, size = self.means @ A.T, A.shape[0]
            covariances = A @ promote(self.covariances, 2, self.dim) @ A.T
        elif A.shape in ((), (self.dim,)):
            means, size = self.means * A, self.dim
            if self._rank == 2:
                covariances = self.covariances * A[..., None] * A
            else:
                covariances = promote(self.covariances, A.ndim, self.dim) * A * A
        else:
            raise ParameterError(
                f"matrix has shape {A.shape}; give a number, ({self.dim},) or "
                f"(p, {self.dim})"
            )
        shift = frozen_array("offset", offset)
        if shift.shape not in ((), (size,)):
            raise ParameterError(
                f"offset has shape {shift.shape}; give a number or ({size},)"
            )
        B = _noise("noise_covariance", noise_covariance, size, strict=False)
        rank = max(covariances.ndim - 1, B.ndim)
        total = promote(covariances, rank, size) + promote(B[None], rank, size)
        return GaussianMixture(self.log_weights, means + shift, _clean(total))

    def posterior(
        self, y: ArrayLike, matrix: ArrayLike = 1.0, noise_covariance: ArrayLike = 1.0
    ) -> Posterior:
        """Return the law of X given y = A X + N(0, B), batched over y.

        Parameters
        ----------
        y : shape (..., p).
        matrix : A, a number, (d,) (a diagonal) or (p, d).
        noise_covariance : B, a number, (p,) or (p, p), positive definite.
        """
        A = np.asarray(frozen_array("matrix", matrix))
        size = A.shape[0] if A.ndim == 2 else self.dim
        B = _noise("noise_covariance", noise_covariance, size, strict=True)
        observed = self.push_forward(A, 0.0, B)
        points = np.asarray(y, dtype=float)
        logs = observed.log_component_densities(points)
        evidence = logsumexp(logs, axis=-1)
        if observed._rank < 2:
            rank = observed._rank
            C = promote(self.covariances, rank, self.dim)
            Q = observed.covariances
            gain, keep = A * C / Q, B / Q
            spread = C * keep  # = C - A^2 C^2 / Q without the cancellation
            if rank == 0:
                gain, keep = gain[:, None], keep[:, None]
            means = keep * self.means + gain * points[..., None, :]
        else:
            C = promote(self.covariances, 2, self.dim)
            A = promote(A[None], 2, self.dim)[0] if A.ndim < 2 else A
            B = promote(B[None], 2, size)[0]
            gain = np.swapaxes(np.linalg.solve(observed.covariances, A @ C), 1, 2)
            away = points[..., None, :] - observed.means
            means = self.means + (gain @ away[..., None])[..., 0]
            # Joseph's form: a sum of two positive matrices, for any noise level.
            keep = np.eye(self.dim) - gain @ A
            spread = keep @ C @ np.swapaxes(keep, 1, 2)
            spread = _clean(spread + gain @ B @ np.swapaxes(gain, 1, 2))
        return Posterior(logs - evidence[..., None], means, spread, evidence)

    def condition(
        self, matrix: ArrayLike, noise_covariance: ArrayLike, y: ArrayLike
    ) -> GaussianMixture:
        """Return the law of X given one observation y = A X + N(0, B), shape (p,)."""
        return self.posterior(y, matrix, noise_covariance).at(())

    # ---- tilting ------------------------------------------------------------------

    def tilt(self, quadratic: Quadratic) -> GaussianMixture:
        """Return the measure p(x) exp(q(x)); its mass is the integral.

        Raises
        ------
        ParameterError
            C_k^-1 + K is not positive definite: the integral is infinite.  The
            message names the component and the eigenvalue.
        """
        self._require_same_dim(quadratic)
        K = quadratic.quadratic
        rank = max(self._rank, K.ndim)
        C = promote(self.covariances, rank, self.dim)
        if rank == 2:
            root = self._cholesky
            K = promote(K[None], 2, self.dim)[0]
            # C^-1 + K = L^-T (I + L^T K L) L^-1 has the signs of I + L^T K L.
            shift, vectors = np.linalg.eigh(_clean(np.swapaxes(root, 1, 2) @ K @ root))
            size = np.max(np.abs(shift), axis=1, keepdims=True)
        else:
            shift = C * K
            size = np.abs(shift)
        factor = 1 + shift
        # Rounding leaves no digit of a factor this small, not even its sign.
        bad = factor <= _ROUNDING * np.maximum(1.0, size)
        if bad.any():
            self._refuse_tilt(bad.reshape(self.n_components, -1), K)
        log_det = np.sum(
            np.broadcast_to(
                np.log1p(shift if rank else shift[:, None]), self.means.shape
            ),
            axis=1,
        )
        if rank == 2:
            half = (root @ vectors) / np.sqrt(factor)[:, None, :]
            covariances = _clean(half @ np.swapaxes(half, 1, 2))
        else:
            covariances = C / factor
        slope = quadratic.gradient(self.means)
        step = multiply(covariances, slope)
        log_weights = (
            self.log_weights
            + quadratic(self.means)
            + 0.5 * np.sum(slope * step, axis=1)
            - 0.5 * log_det
        )
        return GaussianMixture(log_weights, self.means + step, covariances)

    def _require_same_dim(self, quadratic: Quadratic) -> None:
        if quadratic.dim != self.dim:
            raise ParameterError(
                f"quadratic of dimension {quadratic.dim} on a mixture of dimension "
                f"{self.dim}"
            )

    def _refuse_tilt(self, bad: Array, K: Array) -> None:
        component = int(np.argmax(bad.any(axis=1)))
        precision = promote(self._precision, 2, self.dim)[component]
        total = precision + promote(K[None], 2, self.dim)[0]
        raise ParameterError(
            f"tilt of component {component} is not integrable: covariance^-1 + K has "
            f"the eigenvalue {np.linalg.eigvalsh(total)[0]:.6g}; all must be above 0"
        )

    def tilt_mixture(
        self,
        quadratics: Sequence[Quadratic],
        log_coefficients: ArrayLike | None = None,
    ) -> GaussianMixture:
        """Return p(x) sum_j exp(l_j + q_j(x)); component j K + k is (q_j, k).

        Parameters
        ----------
        quadratics : q_j.
        log_coefficients : l_j, shape (J,); zeros by default.
        """
        logs = frozen_array(
            "log_coefficients",
            np.zeros(len(quadratics)) if log_coefficients is None else log_coefficients,
        )
        if logs.shape != (len(quadratics),):
            raise ParameterError(
                f"log_coefficients has shape {logs.shape}; give "
                f"({len(quadratics)},), one for each quadratic"
            )
        return GaussianMixture.superposition(
            [
                self.tilt(q).scaled(float(log))
                for q, log in zip(quadratics, logs, strict=True)
            ]
        )

    def times(self, other: GaussianMixture) -> GaussianMixture:
        """Return the product of the two densities."""
        return self.tilt_mixture(other.log_components())

    def divided_by(self, gaussian: GaussianMixture) -> GaussianMixture:
        """Return the ratio of densities p / gaussian, for a single Gaussian.

        Raises
        ------
        ParameterError
            ``gaussian`` has several components, or the ratio is not integrable.
        """
        if gaussian.n_components != 1:
            raise ParameterError(
                f"divisor has {gaussian.n_components} components; only a ratio to one "
                "Gaussian is a mixture"
            )
        return self.tilt(-gaussian.log_components()[0])

    def tilt_derivative(self, quadratic: Quadratic) -> tuple[Array, Array, Array]:
        """Return d/de at e = 0 of the three fields of ``tilt(e * quadratic)``.

        Returns
        -------
        log_weights (K,), means (K, d), covariances (in this mixture's form, or that
        of the quadratic where it is larger): E_k[q], C_k (b - K m_k), -C_k K C_k.
        """
        self._require_same_dim(quadratic)
        K = quadratic.quadratic
        rank = max(self._rank, K.ndim)
        C = promote(self.covariances, rank, self.dim)
        slope = quadratic.gradient(self.means)
        trace = trace_product(K, self.covariances, self.dim)
        full = rank == 2
        change = C @ promote(K[None], 2, self.dim) @ C if full else C * K * C
        return quadratic(self.means) - 0.5 * trace, multiply(C, slope), -change

    # ---- moments of the normalized law --------------------------------------------

    @cached_property
    def _law(self) -> Posterior:
        mass = self.log_mass()
        return Posterior(
            self.log_weights - mass, self.means, self.covariances, np.array(mass)
        )

    def mean(self) -> Array:
        """Return E[X], shape (d,)."""
        return self._law.mean()

    def covariance(self) -> Array:
        """Return Cov(X), shape (d, d)."""
        return self._law.covariance()

    def expectation_quadratic(self, quadratic: Quadratic) -> float:
        """Return E[q(X)]."""
        return float(self._law.expectation_quadratic(quadratic))

    def covariance_of_quadratics(self, first: Quadratic, second: Quadratic) -> float:
        """Return Cov(q1(X), q2(X)), exact to moments of order four."""
        return float(self._law.covariance_of_quadratics(first, second))

    def raw_moment(self, order: int) -> Array:
        """Return E[X (x) ... (x) X], shape (d,) * order, for order 0 to 4.

        Raises
        ------
        ParameterError
            Another order, or a tensor of more than ten million entries.
        """
        if order not in range(5):
            raise ParameterError(f"moment of order {order}; give 0 to 4")
        if self.dim**order > _LARGEST_TENSOR:
            raise ParameterError(
                f"moment of order {order} in dimension {self.dim} has more than "
                f"{_LARGEST_TENSOR} entries; use covariance_of_quadratics"
            )
        w, m = self.weights, self.means
        if order == 0:
            return np.ones(())
        axes = "abcd"[:order]
        product = ",".join(f"k{axis}" for axis in axes)
        total = np.einsum(f"k,{product}->{axes}", w, *[m] * order, optimize=order > 2)
        if order == 1:
            return total
        C = promote(self.covariances, 2, self.dim)
        # Isserlis: one term for every pair of indices that meets in a covariance.
        for pair in itertools.combinations(axes, 2):
            rest = [axis for axis in axes if axis not in pair]
            spec = "".join(f",k{axis}" for axis in rest)
            total = total + np.einsum(
                f"k,k{''.join(pair)}{spec}->{axes}",
                w,
                C,
                *[m] * len(rest),
                optimize=True,
            )
        if order == 4:
            for spec in ("kab,kcd", "kac,kbd", "kad,kbc"):
                total = total + np.einsum(f"k,{spec}->abcd", w, C, C, optimize=True)
        return total

    def sample(self, rng: np.random.Generator, n: int) -> Array:
        """Return n independent draws of the normalized law, shape (n, d)."""
        edges = np.cumsum(self.weights)
        index = np.searchsorted(edges / edges[-1], rng.random(n), side="right")
        z = rng.standard_normal((n, self.dim))
        if self._rank == 2:
            # Draws of one component side by side turn n small products into K.
            order = np.argsort(index, kind="stable")
            parts = np.split(order, np.searchsorted(index[order], range(1, len(edges))))
            for root, part in zip(self._cholesky, parts, strict=True):
                z[part] = z[part] @ root.T
            return self.means[index] + z
        return self.means[index] + z * np.sqrt(self._spread)[index]


@dataclass(frozen=True, eq=False)
class Posterior:
    """Normalized mixtures that share their covariances, one for each observation.

    Attributes
    ----------
    log_weights : shape (..., K), normalized: log P(component | y).
    means : shape (..., K, d).
    covariances : (K,), (K, d) or (K, d, d), the same for every observation.
    log_evidence : shape (...), the log density of the observations.
    """

    log_weights: Array
    means: Array
    covariances: Array
    log_evidence: Array

    def at(self, index: int | tuple[int, ...]) -> GaussianMixture:
        """Return the normalized mixture of one observation."""
        return GaussianMixture(
            self.log_weights[index], self.means[index], self.covariances
        )

    def mean(self) -> Array:
        """Return E[X | y], shape (..., d)."""
        return np.einsum("...k,...kd->...d", np.exp(self.log_weights), self.means)

    def covariance(self) -> Array:
        """Return Cov(X | y), shape (..., d, d)."""
        w = np.exp(self.log_weights)
        away = self.means - self.mean()[..., None, :]
        between = np.swapaxes(w[..., None] * away, -1, -2) @ away
        within = np.tensordot(w, self.covariances, 1)
        dim = self.means.shape[-1]
        if self.covariances.ndim < 3:
            diagonal = within[..., None] if self.covariances.ndim == 1 else within
            within = diagonal[..., None] * np.eye(dim)
        return np.asarray(between + within)

    def expectation_quadratic(self, quadratic: Quadratic) -> Array:
        """Return E[q(X) | y], shape (...)."""
        trace = trace_product(quadratic.quadratic, self.covariances, quadratic.dim)
        values = quadratic(self.means) - 0.5 * trace
        return np.sum(np.exp(self.log_weights) * values, axis=-1)

    def covariance_of_quadratics(self, first: Quadratic, second: Quadratic) -> Array:
        """Return Cov(q1(X), q2(X) | y), shape (...)."""
        w = np.exp(self.log_weights)
        center = self.mean()[..., None, :]
        away = self.means - center
        dim = self.means.shape[-1]
        slopes, values = [], []
        for q in (first, second):
            slopes.append(q.gradient(self.means))
            # q around the mean, constant left out: only differences of components.
            middle = 0.5 * (q.gradient(center) + slopes[-1])
            value = np.sum(middle * away, axis=-1)
            value = value - 0.5 * trace_product(q.quadratic, self.covariances, dim)
            values.append(value - np.sum(w * value, axis=-1, keepdims=True))
        within = np.sum(slopes[0] * multiply(self.covariances, slopes[1]), axis=-1)
        within = within + 0.5 * trace_product_pair(
            first.quadratic, second.quadratic, self.covariances, dim
        )
        return np.sum(w * (within + values[0] * values[1]), axis=-1)


def gauss_hermite_nodes(mixture: GaussianMixture, order: int) -> tuple[Array, Array]:
    """Return weights (M,) and nodes (M, d) of E under the normalized mixture.

    Tensor Gauss-Hermite rules of ``order`` points an axis in every component's own
    coordinates, so M = K order^d: exact for polynomials of degree 2 order - 1; the
    change under ``2 * order`` estimates the error of other integrands.

    Raises
    ------
    ParameterError
        Dimension above 3, or an order below 1.
    """
    if mixture.dim > 3:
        raise ParameterError(
            f"tensor quadrature in dimension {mixture.dim}; give at most 3"
        )
    if order < 1:
        raise ParameterError(f"quadrature order {order}; give at least 1")
    nodes, weights = _hermite_rule(order)
    dim = mixture.dim
    grid = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), axis=-1)
    z = grid.reshape(-1, dim)
    tensor = _products([weights] * dim)
    roots = np.swapaxes(mixture._cholesky, 1, 2)
    points = mixture.means[:, None] + z @ roots
    return np.outer(mixture.weights, tensor).ravel(), points.reshape(-1, dim)


@lru_cache(maxsize=32)
def _hermite_rule(order: int) -> tuple[Array, Array]:
    nodes, weights = roots_hermitenorm(order)
    return nodes, weights / np.sum(weights)


def _products(factors: Iterable[Array]) -> Array:
    total = np.ones(1)
    for factor in factors:
        total = np.outer(total, factor).ravel()
    return total


def _softmax(logs: Array) -> Array:
    """Return exp(logs) normalized over the first axis."""
    share = np.exp(logs - np.max(logs, axis=0))
    share /= np.sum(share, axis=0)
    return share


def _clean(matrices: Array) -> Array:
    """Remove the rounding that makes a symmetric product unsymmetric."""
    if matrices.ndim < 3:
        return matrices
    return np.asarray(0.5 * (matrices + np.swapaxes(matrices, -1, -2)))


def _noise(name: str, covariance: ArrayLike, dim: int, *, strict: bool) -> Array:
    """Return a noise covariance, positive definite or at least semidefinite."""
    B = operator(name, covariance, dim)
    if B.ndim == 2:
        B = symmetric(name, B)
        values = np.linalg.eigvalsh(B)
        floor = 0.0 if strict else -_ROUNDING * dim * np.max(np.abs(values))
    else:
        values, floor = np.atleast_1d(B), 0.0
    smallest = float(np.min(values))
    if smallest < floor or (strict and smallest <= 0):
        raise ParameterError(
            f"{name} has the eigenvalue {smallest:.6g}; give "
            f"{'positive' if strict else 'nonnegative'} eigenvalues"
        )
    return B
