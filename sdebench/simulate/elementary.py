"""Branch-free log, sin, cos and exp: one source for numba, numpy and torch.

The formulas use only IEEE ``+ - * /`` in a fixed order, so that numba (compiled without
contraction), numpy arrays and torch tensors give the same bits.  They have no branch
and no table, so that LLVM vectorises them: faster than libm, and than SVML, which numba
no longer ships.

Only the access to the bits of a number differs between the three: `split64` (numba),
`split_numpy`, `split_torch` and the like.

Bounds of the error, in units in the last place (tested against mpmath; largest seen
among 12 million points: 0.83, 1.81, 1.14 and 0.83, 1.98, 0.98):

======== ======= =======
function float64 float32
======== ======= =======
log      0.85    0.85
sin, cos 1.85    2.0
exp      1.15    1.0
======== ======= =======

Domains: ``log`` of positive normal numbers; ``sincos(v)`` = sin and cos of (pi/4) v for
|v| <= 1; ``exp`` clamps its argument to [-708, 709] (float32: [-87, 88]).

Sources: fdlibm ``e_log.c``, ``k_sin.c``, ``k_cos.c``; Cephes ``logf``, ``expf``;
the float64 exp is a Chebyshev polynomial of degree 11 on [-ln 2 / 2, ln 2 / 2].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from sdebench.simulate.jit import CONTRACT, inline

if TYPE_CHECKING:
    import torch

Real = NDArray[Any]

F32 = np.float32
U32 = np.uint32
U64 = np.uint64


# Bit casts -------------------------------------------------------------------------


def _bit_cast(source: Any, target: Any, llvm: Any) -> Any:
    """Return the intrinsic that reads the bits of ``source`` as ``target``."""

    @intrinsic
    def cast(typing_context: Any, x: Any) -> Any:
        if x != source:
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], llvm)

        return target(source), generate

    return cast


bits64 = _bit_cast(types.float64, types.uint64, ir.IntType(64))
real64 = _bit_cast(types.uint64, types.float64, ir.DoubleType())
bits32 = _bit_cast(types.float32, types.uint32, ir.IntType(32))
real32 = _bit_cast(types.uint32, types.float32, ir.FloatType())


# Formulas, float64 -----------------------------------------------------------------

LN2_HIGH = 6.93147180369123816490e-01
LN2_LOW = 1.90821492927058770002e-10
QUARTER_PI = 0.78539816339744830962
LOG2_E = 1.4426950408889634074
ROUND64 = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to the nearest integer
ROOT_HALF64 = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)


def log_formula64(f: Any, k: Any) -> Any:
    """Return log((1 + f) 2^k) for 1 + f in [sqrt(1/2), sqrt(2))."""
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    a = (6.666666666666735130e-01 + z * 3.999999999940941908e-01) + w * (
        2.857142874366239149e-01 + z * 2.222219843214978396e-01
    )
    b = (
        1.818357216161805012e-01 + z * 1.531383769920937332e-01
    ) + w * 1.479819860511658591e-01
    r = z * (a + (w * w) * b)
    h = 0.5 * f * f
    return k * LN2_HIGH - ((h - (s * (h + r) + k * LN2_LOW)) - f)


def sincos64(v: Any) -> Any:
    """Return sin and cos of (pi/4) v for v in [-1, 1]."""
    x = v * QUARTER_PI
    z = x * x
    w = z * z
    w2 = w * w
    a = (-1.66666666666666324348e-01 + z * 8.33333333332248946124e-03) + w * (
        -1.98412698298579493134e-04 + z * 2.75573137070700676789e-06
    )
    b = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10
    c = (4.16666666666666019037e-02 + z * -1.38888888888741095749e-03) + w * (
        2.48015872894767294178e-05 + z * -2.75573143513906633035e-07
    )
    d = 2.08757232129817482790e-09 + z * -1.13596475577881948265e-11
    return x + (x * z) * (a + w2 * b), (1.0 - 0.5 * z) + w * (c + w2 * d)


def exp_formula64(x: Any) -> Any:
    """Return (p, t): exp(x) = p 2^n, n in the low mantissa bits of t."""
    t = x * LOG2_E + ROUND64
    n = t - ROUND64
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    r2 = r * r
    r4 = r2 * r2
    a = (0.5 + r * 0.16666666666666669) + r2 * (
        0.04166666666662413 + r * 0.008333333333330062
    )
    b = (0.0013888888917213717 + r * 0.00019841269863053618) + r2 * (
        2.4801521295954376e-05 + r * 2.7557268459997064e-06
    )
    c = 2.7620088445409746e-07 + r * 2.510038549551032e-08
    return 1.0 + (r + r2 * (a + r4 * (b + r4 * c))), t


# Formulas, float32 -----------------------------------------------------------------

QUARTER_PI32 = F32(QUARTER_PI)
ROUND32 = F32(12582912.0)  # 1.5 * 2^23
LN2_HIGH32 = F32(0.693359375)
LN2_LOW32 = F32(-2.12194440e-4)
LOG2_E32 = F32(LOG2_E)
ONE32 = F32(1.0)
HALF32 = F32(0.5)
ROOT_HALF32 = 0x3F3504F3
# The constants of a formula are named: a numba literal would be a float64.
LG9, LG8, LG7 = F32(7.0376836292e-2), F32(-1.1514610310e-1), F32(1.1676998740e-1)
LG6, LG5, LG4 = F32(-1.2420140846e-1), F32(1.4249322787e-1), F32(-1.6668057665e-1)
LG3, LG2, LG1 = F32(2.0000714765e-1), F32(-2.4999993993e-1), F32(3.3333331174e-1)
SN1, SN2, SN3 = F32(-1.6666654611e-1), F32(8.3321608736e-3), F32(-1.9515295891e-4)
CS1, CS2, CS3 = F32(4.1666645683e-2), F32(-1.3887316255e-3), F32(2.4433157118e-5)
EX6, EX5, EX4 = F32(1.9875691500e-4), F32(1.3981999507e-3), F32(8.3334519073e-3)
EX3, EX2, EX1 = F32(4.1665795894e-2), F32(1.6666665459e-1), F32(5.0000001201e-1)


def log_formula32(f: Any, k: Any) -> Any:
    """Return log((1 + f) 2^k) for 1 + f in [sqrt(1/2), sqrt(2))."""
    z = f * f
    a = (((f * LG9 + LG8) * f + LG7) * f + LG6) * f + LG5
    p = (((a * f + LG4) * f + LG3) * f + LG2) * f + LG1
    y = (f * z * p + k * LN2_LOW32) - z * HALF32
    return (f + y) + k * LN2_HIGH32


def sincos32(v: Any) -> Any:
    """Return sin and cos of (pi/4) v for v in [-1, 1]."""
    x = v * QUARTER_PI32
    z = x * x
    s = x + x * z * (z * (z * SN3 + SN2) + SN1)
    c = (ONE32 - z * HALF32) + z * z * (z * (z * CS3 + CS2) + CS1)
    return s, c


def exp_formula32(x: Any) -> Any:
    """Return (p, t): exp(x) = p 2^n, n in the low mantissa bits of t."""
    t = x * LOG2_E32 + ROUND32
    n = t - ROUND32
    r = (x - n * LN2_HIGH32) - n * LN2_LOW32
    a = ((r * EX6 + EX5) * r + EX4) * r + EX3
    return ((a * r + EX2) * r + EX1) * (r * r) + r + ONE32, t


# numba -----------------------------------------------------------------------------

log_polynomial64 = inline(log_formula64)
log_polynomial32 = inline(log_formula32)
sincos_strict64 = inline(sincos64)
sincos_strict32 = inline(sincos32)
_exp_strict64 = inline(exp_formula64)
_exp_strict32 = inline(exp_formula32)
_exp_contract64 = inline(exp_formula64, fastmath=CONTRACT)
_exp_contract32 = inline(exp_formula32, fastmath=CONTRACT)


@inline
def split64(x):  # type: ignore[no-untyped-def]
    """Return (f, k) with x = (1 + f) 2^k and 1 + f in [sqrt(1/2), sqrt(2))."""
    b = bits64(x)
    e = (b - U64(ROOT_HALF64)) >> U64(52)
    f = real64(b - (e << U64(52))) - 1.0
    # e as a signed 12-bit number, through the mantissa: AVX2 has no int64 to float64
    biased = ((e + U64(0x800)) & U64(0xFFF)) | U64(0x4330000000000000)
    return f, real64(biased) - 4503599627372544.0  # 2^52 + 2^11


@inline
def split32(x):  # type: ignore[no-untyped-def]
    """Return (f, k) with x = (1 + f) 2^k and 1 + f in [sqrt(1/2), sqrt(2))."""
    b = bits32(x)
    e = np.int32(b - U32(ROOT_HALF32)) >> np.int32(23)
    f = real32(U32(b - U32(U32(e) << U32(23)))) - ONE32
    return f, F32(np.int32(e))


@inline
def _log64(x):  # type: ignore[no-untyped-def]
    f, k = split64(x)
    return log_polynomial64(f, k)


@inline
def _log32(x):  # type: ignore[no-untyped-def]
    f, k = split32(x)
    return log_polynomial32(f, k)


@inline
def _exp64(x):  # type: ignore[no-untyped-def]
    p, t = _exp_strict64(min(max(x, -708.0), 709.0))
    return real64(bits64(p) + (bits64(t) << U64(52)))


@inline
def _exp32(x):  # type: ignore[no-untyped-def]
    p, t = _exp_strict32(min(max(x, F32(-87.0)), F32(88.0)))
    return real32(U32(bits32(p) + U32(bits32(t) << U32(23))))


@inline(fastmath=CONTRACT)
def _exp_contracted64(x):  # type: ignore[no-untyped-def]
    p, t = _exp_contract64(min(max(x, -708.0), 709.0))
    return real64(bits64(p) + (bits64(t) << U64(52)))


@inline(fastmath=CONTRACT)
def _exp_contracted32(x):  # type: ignore[no-untyped-def]
    p, t = _exp_contract32(min(max(x, F32(-87.0)), F32(88.0)))
    return real32(U32(bits32(p) + U32(bits32(t) << U32(23))))


def _by_precision(name: Callable[..., Any], double: Any, single: Any) -> None:
    """Let kernels call ``name`` with a float64 or a float32 number."""

    def choose(x):  # type: ignore[no-untyped-def]
        if x == types.float64:
            return lambda x: double(x)
        if x == types.float32:
            return lambda x: single(x)
        return None

    overload(name, jit_options={"forceinline": True, "error_model": "numpy"})(choose)


def log(x: Any) -> Any:
    """Natural logarithm of a positive normal number, strict; only inside kernels."""
    raise NotImplementedError("log is for numba kernels: use log_numpy or log_torch")


def exp(x: Any) -> Any:
    """Exponential, strict; only inside kernels."""
    raise NotImplementedError("exp is for numba kernels: use exp_numpy or exp_torch")


def exp_contracted(x: Any) -> Any:
    """Exponential with fused multiply-add (for drifts); only inside kernels.

    0.45 ns faster than `exp`; the last bit depends on the processor.
    """
    raise NotImplementedError("exp_contracted is for numba kernels")


def sincos(v: Any) -> Any:
    """Sine and cosine of (pi/4) v for |v| <= 1, strict; only inside kernels."""
    raise NotImplementedError("sincos is for numba kernels: use sincos64 or sincos32")


_by_precision(log, _log64, _log32)
_by_precision(exp, _exp64, _exp32)
_by_precision(exp_contracted, _exp_contracted64, _exp_contracted32)
_by_precision(sincos, sincos_strict64, sincos_strict32)


# numpy and torch: sincos64 and sincos32 serve as they are -----------------------------


def split_numpy(x: Real) -> tuple[Real, Real]:
    """Return (f, k) with x = (1 + f) 2^k: see `split64`; the dtype is x's."""
    if x.dtype == np.float32:
        b = x.view(np.int32)
        e = (b - np.int32(ROOT_HALF32)) >> 23
        return (b - (e << 23)).view(np.float32) - ONE32, e.astype(np.float32)
    bits = x.view(np.int64)
    exponent = (bits - ROOT_HALF64) >> 52
    f = (bits - (exponent << 52)).view(np.float64) - 1.0
    return f, exponent.astype(np.float64)


def log_numpy(x: Real) -> Real:
    """Natural logarithm with the bits of `log`."""
    f, k = split_numpy(x)
    return log_formula32(f, k) if x.dtype == np.float32 else log_formula64(f, k)


def exp_numpy(x: Real) -> Real:
    """Exponential with the bits of `exp`."""
    if x.dtype == np.float32:
        p, t = exp_formula32(np.clip(x, F32(-87.0), F32(88.0)))
        return (p.view(np.int32) + (t.view(np.int32) << 23)).view(np.float32)
    p, t = exp_formula64(np.clip(x, -708.0, 709.0))
    return (p.view(np.int64) + (t.view(np.int64) << 52)).view(np.float64)


def split_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (f, k) with x = (1 + f) 2^k: see `split64`; the dtype is x's."""
    import torch

    single = x.dtype == torch.float32
    shift = 23 if single else 52
    b = x.view(torch.int32 if single else torch.int64)
    e = (b - (ROOT_HALF32 if single else ROOT_HALF64)) >> shift
    return (b - (e << shift)).view(x.dtype) - 1.0, e.to(x.dtype)


def log_torch(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm with the bits of `log`."""
    import torch

    f, k = split_torch(x)
    return log_formula32(f, k) if x.dtype == torch.float32 else log_formula64(f, k)


def exp_torch(x: torch.Tensor) -> torch.Tensor:
    """Exponential with the bits of `exp`."""
    import torch

    if x.dtype == torch.float32:
        p, t = exp_formula32(torch.clamp(x, -87.0, 88.0))
        return (p.view(torch.int32) + (t.view(torch.int32) << 23)).view(x.dtype)
    p, t = exp_formula64(torch.clamp(x, -708.0, 709.0))
    return (p.view(torch.int64) + (t.view(torch.int64) << 52)).view(x.dtype)


def sqrt_torch(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded square root.

    torch.sqrt on a CPU is not: a few per cent of its results are off by one unit in
    the last place, so numpy does it there; on a CUDA device it is.
    """
    import torch

    if x.device.type == "cpu":
        return torch.from_numpy(np.sqrt(x.numpy()))
    return torch.sqrt(x)
