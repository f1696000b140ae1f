"""One-pass moments of per-path values, in memory that does not grow with the paths.

Each lane keeps power sums S1..S4 of the samples minus a common shift, the mean of the
first block.  With this shift the sums lose no digits (errors near 1e-15 of the
standardised moments even where the mean is 1e6 standard deviations), lanes add without
conversion, and central moments are formed once, at the end.  The shift of two
different runs differs: ``merge`` moves both to the common mean.

Lanes are fixed: block number modulo ``n_lanes``, blocks of a lane in increasing order,
lanes added in lane order.  The result then has the same bits for any number of threads.
The product sum for the covariance is a kernel of our own for the same reason (a BLAS
may split the work by its thread count); on padded blocks it is also the faster one up
to a few hundred components.

Sources: Chan, Golub and LeVeque (1983) for the shift; Pebay (2008), SAND2008-6212, for
the merge of third and fourth moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdebench.errors import ParameterError
from sdebench.simulate.jit import kernel

Array = NDArray[np.float64]
REDUCTION = {"contract", "reassoc", "nsz"}
"""Sums may be reordered into vector lanes; NaN and infinity keep their meaning."""
LARGEST = float(np.finfo(np.float64).max)
PADDING = 16


@kernel(fastmath=REDUCTION)
def _power_sums(block: Any, count: int, shift: Any, sums: Any) -> int:
    """Add the powers of ``block - shift`` to sums (4, C); return bad rows."""
    bad = 0
    for k in range(block.shape[0]):
        row = block[k]
        s = shift[k]
        a = 0.0
        b = 0.0
        c = 0.0
        d = 0.0
        for p in range(count):
            x = np.float64(row[p]) - s
            y = x * x
            a += x
            b += y
            c += y * x
            d += y * y
        sums[0, k] += a
        sums[1, k] += b
        sums[2, k] += c
        sums[3, k] += d
        # reordering folds a - a to 0, so isfinite would always hold here
        if not abs(a) <= LARGEST:
            bad += 1
    return bad


@kernel(fastmath=REDUCTION)
def _center(block: Any, count: int, shift: Any, rows: Any, norm: Any) -> None:
    """Write block - shift to rows and its squared column norms to ``norm``."""
    for p in range(count):
        norm[p] = 0.0
    for k in range(block.shape[0]):
        s = shift[k]
        for p in range(count):
            x = np.float64(block[k, p]) - s
            rows[k, p] = x
            norm[p] += x * x


@kernel(fastmath=REDUCTION)
def _norm_sums(rows: Any, norm: Any, count: int, sums: Any) -> float:
    """Add sum_p norm * rows to sums (C,); return the sum of norm^2."""
    for k in range(rows.shape[0]):
        a = 0.0
        for p in range(count):
            a += norm[p] * rows[k, p]
        sums[k] += a
    d = 0.0
    for p in range(count):
        d += norm[p] * norm[p]
    return d


@kernel(fastmath=REDUCTION)
def _products(rows: Any, count: int, out: Any) -> None:
    """Add the lower triangle of rows @ rows.T to ``out`` (C, C).

    Two rows by four in registers; at the edge a row is repeated and not stored.
    """
    n = rows.shape[0]
    i = 0
    while i < n:
        i1 = min(i + 1, n - 1)
        a0 = rows[i]
        a1 = rows[i1]
        j = 0
        while j <= i1:
            j1 = min(j + 1, n - 1)
            j2 = min(j + 2, n - 1)
            j3 = min(j + 3, n - 1)
            b0 = rows[j]
            b1 = rows[j1]
            b2 = rows[j2]
            b3 = rows[j3]
            s00 = 0.0
            s01 = 0.0
            s02 = 0.0
            s03 = 0.0
            s10 = 0.0
            s11 = 0.0
            s12 = 0.0
            s13 = 0.0
            for p in range(count):
                u = a0[p]
                v = a1[p]
                s00 += u * b0[p]
                s01 += u * b1[p]
                s02 += u * b2[p]
                s03 += u * b3[p]
                s10 += v * b0[p]
                s11 += v * b1[p]
                s12 += v * b2[p]
                s13 += v * b3[p]
            out[i, j] += s00
            if j1 > j:
                out[i, j1] += s01
            if j2 > j1:
                out[i, j2] += s02
            if j3 > j2:
                out[i, j3] += s03
            if i1 > i:
                out[i1, j] += s10
                if j1 > j:
                    out[i1, j1] += s11
                if j2 > j1:
                    out[i1, j2] += s12
                if j3 > j2:
                    out[i1, j3] += s13
            j += 4
        i += 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Moments of n samples of a vector with C components.

    ``variance`` and ``covariance`` have the divisor n - 1 (nan for n = 1); the central
    moments ``third`` and ``fourth`` have n.  ``norm_third`` = E[|y|^2 y] and
    ``norm_fourth`` = E[|y|^4], y = sample - mean, come with the covariance: the error
    of its trace needs them.

    Attributes
    ----------
    n : number of samples.
    mean, variance, third, fourth : float64, shape (C,).
    covariance : shape (C, C), or None.
    norm_third, norm_fourth : shape (C,) and a number, or None.
    n_nonfinite : samples with a NaN or an infinity; they spoil every sum they are in.
    """

    n: int
    mean: Array
    variance: Array
    third: Array
    fourth: Array
    covariance: Array | None = None
    norm_third: Array | None = None
    norm_fourth: float | None = None
    n_nonfinite: int = 0

    @property
    def std_error(self) -> Array:
        """Standard error of the mean, shape (C,)."""
        return np.sqrt(self.variance / self.n)

    @property
    def trace(self) -> float:
        """Trace of the covariance: the total variance of one sample."""
        return float(self.variance.sum())

    @property
    def kurtosis(self) -> Array:
        """Fourth standardised moment (3 for a Gaussian), nan where it is 0/0."""
        second = self.variance * (1.0 - 1.0 / self.n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.fourth / second**2


def sample_moments(values: Array) -> Moments:
    """Moments, with covariance, of the rows of values (n, C): one row, one sample."""
    columns = np.ascontiguousarray(np.asarray(values, dtype=np.float64).T)
    stream = StreamingMoments(columns.shape[0], n_lanes=1)
    stream.set_shift(columns)
    stream.update(0, columns)
    return stream.finalize()


class StreamingMoments:
    """Accumulate moments of a stream of blocks.

    Threads may update different lanes at once; one lane belongs to one thread at a
    time.  Call ``set_shift`` with the first block before the first ``update``.

    Parameters
    ----------
    dim : number of components C.
    n_lanes : number of independent accumulators, whatever the number of threads.
    with_covariance : also accumulate covariance and norm moments: O(C^2) per sample.
    """

    def __init__(
        self, dim: int, n_lanes: int = 8, with_covariance: bool = True
    ) -> None:
        if dim < 1 or n_lanes < 1:
            raise ParameterError(f"dim and n_lanes are {dim}, {n_lanes}; need >= 1")
        self.dim = dim
        self.n_lanes = n_lanes
        self.with_covariance = with_covariance
        self.shift: Array | None = None
        self._counts = np.zeros(n_lanes, dtype=np.int64)
        self._nonfinite = np.zeros(n_lanes, dtype=np.int64)
        self._sums = np.zeros((n_lanes, 4, dim))
        if with_covariance:
            self._products = np.zeros((n_lanes, dim, dim))
            self._norm_third = np.zeros((n_lanes, dim))
            self._norm_fourth = np.zeros(n_lanes)
            self._rows: list[Array] = [np.zeros((dim, 0))] * n_lanes

    @property
    def n_nonfinite(self) -> int:
        """Number of samples so far with a NaN or infinite component."""
        return int(self._nonfinite.sum())

    def set_shift(self, block: NDArray[Any], count: int | None = None) -> None:
        """Take the mean of this block's first ``count`` columns as the shift."""
        block, count = self._checked(block, count)
        if self._counts.any():
            raise ParameterError("the shift was set after the first update")
        sums = np.zeros((4, self.dim))
        _power_sums(block, count, np.zeros(self.dim), sums)
        mean = sums[0] / max(count, 1)
        self.shift = np.where(np.isfinite(mean), mean, 0.0)

    def update(self, lane: int, block: NDArray[Any], count: int | None = None) -> None:
        """Add the first ``count`` columns (default: all) of a block (C, >= count).

        Rows may be longer than ``count`` (padding).  float32 is accumulated in
        float64.  A block that is not C-contiguous is copied.
        """
        if self.shift is None:
            raise ParameterError("call set_shift with the first block before update")
        block, count = self._checked(block, count)
        if _power_sums(block, count, self.shift, self._sums[lane]):
            finite = np.isfinite(block[:, :count]).all(axis=0)
            self._nonfinite[lane] += count - int(np.count_nonzero(finite))
        self._counts[lane] += count
        if self.with_covariance:
            if self._rows[lane].shape[1] < count + PADDING:
                # the last row holds the squared norms
                self._rows[lane] = np.zeros((self.dim + 1, count + PADDING))
            rows, norm = self._rows[lane][:-1], self._rows[lane][-1]
            _center(block, count, self.shift, rows, norm)
            _products(rows, count, self._products[lane])
            self._norm_fourth[lane] += _norm_sums(
                rows, norm, count, self._norm_third[lane]
            )

    def finalize(self) -> Moments:
        """Return the moments of everything added so far."""
        n = int(self._counts.sum())
        if n == 0 or self.shift is None:
            raise ParameterError("no samples: moments need at least one")
        total = np.zeros((4, self.dim))
        for lane in range(self.n_lanes):
            total += self._sums[lane]
        with np.errstate(invalid="ignore", over="ignore"):
            return self._central(n, total / n, n / (n - 1) if n > 1 else nan)

    def _central(self, n: int, raw: Array, unbias: float) -> Moments:
        """Turn moments about the shift into central ones."""
        a, b, c, d = raw
        assert self.shift is not None
        covariance: Array | None = None
        norm_third: Array | None = None
        norm_fourth: float | None = None
        # rounding may leave a tiny negative variance for constant samples
        second = np.maximum(b - a * a, np.where(np.isnan(b), nan, 0.0))
        if self.with_covariance:
            products = np.zeros((self.dim, self.dim))
            cubes = np.zeros(self.dim)
            quartic = 0.0
            for lane in range(self.n_lanes):
                products += self._products[lane]
                cubes += self._norm_third[lane]
                quartic += float(self._norm_fourth[lane])
            lower = np.tril(products / n, -1)
            about = lower + lower.T + np.diag(b)
            covariance = (about - np.outer(a, a)) * unbias
            np.fill_diagonal(covariance, second * unbias)
            norm_third, norm_fourth = _moved(
                -a, a, about, float(b.sum()), cubes / n, quartic / n
            )
        return Moments(
            n=n,
            mean=self.shift + a,
            variance=second * unbias,
            third=c - 3.0 * a * b + 2.0 * a**3,
            fourth=d - 4.0 * a * c + 6.0 * a * a * b - 3.0 * a**4,
            covariance=covariance,
            norm_third=norm_third,
            norm_fourth=norm_fourth,
            n_nonfinite=self.n_nonfinite,
        )

    def _checked(
        self, block: NDArray[Any], count: int | None
    ) -> tuple[NDArray[Any], int]:
        count = block.shape[1] if count is None else count
        if block.shape[0] != self.dim or not 0 <= count <= block.shape[1]:
            raise ParameterError(
                f"block has shape {block.shape} for {count} samples of"
                f" {self.dim} components"
            )
        if block.dtype not in (np.float64, np.float32):
            block = block.astype(np.float64)
        return np.ascontiguousarray(block), count


def _moved(
    move: Array, first: Array, second: Array, trace: float, third: Array, fourth: float
) -> tuple[Array, float]:
    """Norm moments of y + move from E[y], E[y y'], E|y|^2, E[|y|^2 y] and E|y|^4."""
    length = float(move @ move)
    along = float(move @ first)
    new_third = (
        third
        + 2.0 * (second @ move)
        + length * first
        + (trace + 2.0 * along + length) * move
    )
    new_fourth = (
        fourth
        + 4.0 * float(move @ third)
        + 4.0 * float(move @ second @ move)
        + 2.0 * length * trace
        + 4.0 * length * along
        + length**2
    )
    return new_third, new_fourth


def merge(one: Moments, two: Moments) -> Moments:
    """Combine the moments of two disjoint sets of samples.

    The covariance and the norm moments are kept if both have them.
    """
    n = one.n + two.n
    mean = one.mean + (two.mean - one.mean) * (two.n / n)
    second = np.zeros_like(mean)
    third, fourth = second.copy(), second.copy()
    full = one.covariance is not None and two.covariance is not None
    covariance = np.zeros((mean.size, mean.size)) if full else None
    norm_third = np.zeros_like(mean) if full else None
    norm_fourth = 0.0
    for part in (one, two):
        weight, move = part.n / n, part.mean - mean
        biased = 1.0 - 1.0 / part.n
        about = part.variance * biased if part.n > 1 else np.zeros_like(mean)
        second += weight * (about + move**2)
        third += weight * (part.third + 3.0 * move * about + move**3)
        fourth += weight * (
            part.fourth + 4.0 * move * part.third + 6.0 * move**2 * about + move**4
        )
        if covariance is not None and norm_third is not None:
            matrix = (
                part.covariance * biased
                if part.covariance is not None and part.n > 1
                else np.zeros_like(covariance)
            )
            covariance += weight * (matrix + np.outer(move, move))
            assert part.norm_third is not None
            assert part.norm_fourth is not None
            cube, quartic = _moved(
                move,
                np.zeros_like(mean),
                matrix,
                float(about.sum()),
                part.norm_third,
                part.norm_fourth,
            )
            norm_third += weight * cube
            norm_fourth += weight * quartic
    unbias = n / (n - 1)
    return Moments(
        n=n,
        mean=mean,
        variance=second * unbias,
        third=third,
        fourth=fourth,
        covariance=covariance * unbias if covariance is not None else None,
        norm_third=norm_third,
        norm_fourth=norm_fourth if full else None,
        n_nonfinite=one.n_nonfinite + two.n_nonfinite,
    )


@kernel
def _add_weights(values: Any, count: int, state: Any) -> int:
    """Add exp(values) to state (maximum, sum, sum of squares); return bad values."""
    top = state[0]
    bad = 0
    for p in range(count):
        v = np.float64(values[p])
        if v > top:
            top = v
        # minus infinity is a weight of zero; plus infinity and NaN are errors
        if np.isnan(v) or v == np.inf:
            bad += 1
    if bad > 0 or top == -np.inf:
        return bad
    if top > state[0]:
        scale = np.exp(state[0] - top)
        state[0] = top
        state[1] *= scale
        state[2] *= scale * scale
    for p in range(count):
        w = np.exp(np.float64(values[p]) - top)
        state[1] += w
        state[2] += w * w
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMoments:
    """Log of the mean weight, its delta-method error, and the effective sample size.

    ``effective`` is Kish's (sum w)^2 / sum w^2, between 1 and n.
    """

    n: int
    log_mean: float
    std_error: float
    effective: float
    log_max: float
    n_nonfinite: int = 0


class LogMeanExp:
    """Accumulate log mean exp of log-weights without overflow, in fixed lanes.

    A block with NaN or plus infinity is counted, and not added.
    """

    def __init__(self, n_lanes: int = 8) -> None:
        self.n_lanes = n_lanes
        self._state = np.zeros((n_lanes, 3))
        self._state[:, 0] = -inf
        self._counts = np.zeros(n_lanes, dtype=np.int64)
        self._nonfinite = np.zeros(n_lanes, dtype=np.int64)

    @property
    def n_nonfinite(self) -> int:
        """Number of log-weights so far that are NaN or plus infinity."""
        return int(self._nonfinite.sum())

    def update(
        self, lane: int, log_weights: NDArray[Any], count: int | None = None
    ) -> None:
        """Add the first ``count`` entries (default: all) of log-weights (B,)."""
        count = log_weights.shape[0] if count is None else count
        values = np.ascontiguousarray(log_weights)
        self._nonfinite[lane] += _add_weights(values, count, self._state[lane])
        self._counts[lane] += count

    def finalize(self) -> WeightMoments:
        """Return the result for everything added so far."""
        n = int(self._counts.sum())
        if n == 0:
            raise ParameterError("no log-weights: the mean needs at least one")
        top = float(self._state[:, 0].max())
        first = second = 0.0
        if top > -inf:
            for peak, one, two in self._state:
                scale = float(np.exp(peak - top))
                first += one * scale
                second += two * scale * scale
        if self.n_nonfinite:
            return WeightMoments(
                n=n,
                log_mean=nan,
                std_error=nan,
                effective=nan,
                log_max=top,
                n_nonfinite=self.n_nonfinite,
            )
        if first == 0.0:
            return WeightMoments(
                n=n, log_mean=-inf, std_error=nan, effective=0.0, log_max=top
            )
        effective = first * first / second
        spread = max(n / effective - 1.0, 0.0)
        return WeightMoments(
            n=n,
            log_mean=top + log(first / n),
            std_error=sqrt(spread / max(n - 1, 1)),
            effective=effective,
            log_max=top,
        )
