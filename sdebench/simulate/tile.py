"""Explicit vectors for numba: 64 bytes of adjacent paths as one value.

A kernel loops over the paths of a block in steps of ``lanes(X)`` and writes ordinary
arithmetic on ``load(X, i, p)``.  LLVM legalises the 64-byte vector to the machine (two
AVX registers, one AVX-512 register, four NEON registers).  Unlike automatic
vectorisation this does not depend on alias checks, so one loop may touch any number of
arrays, and it compiles faster.  Products and sums may be fused (contracted): results
differ by about one rounding error between processors with and without fused
multiply-add.

Arrays are C-contiguous, two-dimensional (rows, B + PADDING) with the paths of a block
in the columns.  The padding keeps the rows from competing for the same cache sets:
without it a product of 20 x 20 matrices runs at half the speed.  No index is checked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.options import DefaultOptions
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    overload,
    register_model,
)

from sdebench.simulate.elementary import (
    ROUND32,
    ROUND64,
    exp_formula32,
    exp_formula64,
    sincos32,
    sincos64,
)
from sdebench.simulate.jit import OPTIONS, inline, inner, kernel

PADDING = 16
"""Extra columns of every buffer, in elements."""
LANES = 16
"""The block size must be a multiple of this (the lanes of float32)."""
FLAGS = ("contract", "nsz")
INDEX = ir.IntType(32)
PER_TURN = 0.15915494309189535  # 1 / (2 pi)


def instruction(function: Callable[..., Any]) -> Any:
    """Register a numba intrinsic; its Python signature lacks the typing context."""
    return intrinsic(function)


class Vector(types.Type):
    """Numba type of 64 bytes of float64 or float32."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.lanes = 512 // dtype.bitwidth
        super().__init__(name=f"vector({dtype}, {self.lanes})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """A vector is a plain LLVM vector value."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, vector_ir(kind))


def vector_ir(kind: Vector) -> Any:
    """Return the LLVM type of a vector."""
    element = ir.DoubleType() if kind.dtype == types.float64 else ir.FloatType()
    return ir.VectorType(element, kind.lanes)


def integer_ir(kind: Vector) -> Any:
    """Return the LLVM type of the vector's bits as integers."""
    return ir.VectorType(ir.IntType(kind.dtype.bitwidth), kind.lanes)


def splat(builder: Any, value: Any, kind: Vector) -> Any:
    """Copy one scalar to every lane."""
    llvm = vector_ir(kind)
    empty = ir.Constant(llvm, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(INDEX, kind.lanes), [0] * kind.lanes)
    one = builder.insert_element(empty, value, ir.Constant(INDEX, 0))
    return builder.shuffle_vector(one, empty, zeros)


def address(context: Any, builder: Any, kind: Any, value: Any, i: Any, p: Any) -> Any:
    """Return the address of element (i, p) as a pointer to a vector."""
    array = context.make_array(kind)(context, builder, value)
    stride = cgutils.unpack_tuple(builder, array.shape)[1]
    offset = builder.add(builder.mul(i, stride), p)
    pointer = builder.gep(array.data, [offset])
    return builder.bitcast(pointer, vector_ir(Vector(kind.dtype)).as_pointer())


@instruction
def load(typingctx: Any, X: Any, i: Any, p: Any) -> Any:
    """Return elements ``X[i, p : p + lanes]``."""
    kind = Vector(X.dtype)

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = address(context, builder, signature.args[0], *values)
        value = builder.load(pointer)
        value.align = kind.dtype.bitwidth // 8
        return value

    return kind(X, types.intp, types.intp), build


@instruction
def store(typingctx: Any, X: Any, i: Any, p: Any, v: Any) -> Any:
    """Set elements ``X[i, p : p + lanes]``; a scalar goes to every lane."""
    kind = Vector(X.dtype)
    given = v if isinstance(v, Vector) else kind.dtype

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = address(context, builder, signature.args[0], *values[:3])
        value = values[3]
        if not isinstance(given, Vector):
            value = splat(builder, value, kind)
        builder.store(value, pointer).align = kind.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(X, types.intp, types.intp, given), build


@instruction
def fill(typingctx: Any, X: Any, x: Any) -> Any:
    """Return a vector of the type of ``X`` with ``x`` in every lane."""
    kind = Vector(X.dtype)

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return splat(builder, values[1], kind)

    return kind(X, kind.dtype), build


@instruction
def lanes(typingctx: Any, X: Any) -> Any:
    """Return the number of paths in one vector: 8 in float64, 16 in float32."""
    count = Vector(X.dtype).lanes

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return ir.Constant(ir.IntType(64), count)

    return types.int64(X), build


def _operator(symbol: Any, instruction: str) -> None:
    """Give vectors one arithmetic operator; a scalar operand goes to every lane."""

    @infer_global(symbol)
    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            kind = next((a for a in args if isinstance(a, Vector)), None)
            if kind is None or len(args) != 2:
                return None
            return signature(
                kind, *(a if isinstance(a, Vector) else kind.dtype for a in args)
            )

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, y = (
            v if isinstance(a, Vector) else splat(builder, v, signature.return_type)
            for a, v in zip(signature.args, values, strict=True)
        )
        return getattr(builder, instruction)(x, y, flags=FLAGS)

    for pair in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(symbol, *pair)(lower)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _instruction)


@instruction
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """Return the larger of a vector and a vector or scalar, lane by lane."""
    given = b if isinstance(b, Vector) else a.dtype

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, y = values
        if not isinstance(given, Vector):
            y = splat(builder, y, a)
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    return a(a, given), build


@instruction
def inside(typingctx: Any, x: Any, reach: Any, a: Any, b: Any) -> Any:
    """Return vector ``a`` where |x| < reach, a scalar, and ``b`` elsewhere."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        v, limit, one, other = values
        high = splat(builder, limit, x)
        above = builder.fcmp_ordered(">", v, builder.fneg(high))
        below = builder.fcmp_ordered("<", v, high)
        return builder.select(builder.and_(above, below), one, other)

    return x(x, x.dtype, x, x), build


@instruction
def root(typingctx: Any, x: Any) -> Any:
    """Return the square root of a vector, lane by lane."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = vector_ir(x)
        bits = "f64" if x.dtype == types.float64 else "f32"
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(kind, [kind]),
            f"llvm.sqrt.v{x.lanes}{bits}",
        )
        return builder.call(function, values)

    return x(x), build


@instruction
def times_power_of_two(typingctx: Any, y: Any, t: Any) -> Any:
    """Return ``y * 2**n``, where the low bits of the float ``t`` hold the integer n."""
    mantissa = 52 if y.dtype == types.float64 else 23

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = integer_ir(y)
        a, n = (builder.bitcast(value, bits) for value in values)
        shift = ir.Constant(bits, [mantissa] * y.lanes)
        return builder.bitcast(builder.add(a, builder.shl(n, shift)), vector_ir(y))

    return y(y, y), build


_formula64 = inline(exp_formula64)
_formula32 = inline(exp_formula32)


@inline
def _exp64(x):  # type: ignore[no-untyped-def]
    y, t = _formula64(larger(x, -708.0))
    return times_power_of_two(y, t)


@inline
def _exp32(x):  # type: ignore[no-untyped-def]
    y, t = _formula32(larger(x, -87.0))
    return times_power_of_two(y, t)


VECTOR_OPTIONS: Any = {**OPTIONS, "forceinline": True}


def exp(x: Any) -> Any:
    """Exponential of a vector whose lanes are at most about zero (a shifted log)."""
    raise NotImplementedError


@overload(exp, jit_options=VECTOR_OPTIONS)
def _exp_by_precision(x):  # type: ignore[no-untyped-def]
    if x.dtype == types.float64:
        return lambda x: _exp64(x)
    return lambda x: _exp32(x)


_quarter64 = inline(sincos64)
_quarter32 = inline(sincos32)


@inline
def _doubled_twice(s, c):  # type: ignore[no-untyped-def]
    """Return sin and cos of four times an angle."""
    s, c = 2.0 * s * c, 1.0 - 2.0 * s * s
    return 2.0 * s * c, 1.0 - 2.0 * s * s


@inline
def _sincos64(x):  # type: ignore[no-untyped-def]
    turns = x * PER_TURN
    s, c = _quarter64(2.0 * (turns - ((turns + ROUND64) - ROUND64)))
    return _doubled_twice(s, c)


@inline
def _sincos32(x):  # type: ignore[no-untyped-def]
    turns = x * PER_TURN
    s, c = _quarter32(2.0 * (turns - ((turns + ROUND32) - ROUND32)))
    return _doubled_twice(s, c)


def sincos(x: Any) -> Any:
    """Sine and cosine of a vector of angles, to a few rounding errors of 1 + |x|."""
    raise NotImplementedError


@overload(sincos, jit_options=VECTOR_OPTIONS)
def _sincos_by_precision(x):  # type: ignore[no-untyped-def]
    if x.dtype == types.float64:
        return lambda x: _sincos64(x)
    return lambda x: _sincos32(x)


BORROW: dict[str, Any] = {"_nrt": False} if hasattr(DefaultOptions, "_nrt") else {}
"""Options of kernels that allocate nothing: count no references to the arguments.

Counting costs more than a step of a small process: every view of a row, and every use
of a tuple of arrays, would change atomic counters.
"""


INTERNAL: dict[str, Any] = {
    **BORROW,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""Options of functions that only kernels call: no entry points for Python and C."""


def path_kernel(function: Callable[..., Any]) -> Any:
    """Compile an estimator's kernel: `kernel` without reference counts."""
    return kernel(function, **BORROW)


def block_loop(function: Callable[..., Any]) -> Any:
    """Compile a loop over a whole block, as a function of its own.

    (numba would inherit ``forceinline`` from a caller: copies in every caller would
    cost seconds of compile time.)
    """
    return inner(function, forceinline=False, **INTERNAL)


def glue(function: Callable[..., Any]) -> Any:
    """Compile a primitive that only calls block loops into its callers.

    Passing the hundreds of words of a tuple of arrays would cost more than a step.
    """
    return inline(function, **INTERNAL)


@block_loop
def affine(A, D, b, X, Y, B):  # type: ignore[no-untyped-def]
    """Y = A X + b for every path.

    A (R, >= D): its first D columns; b (>= R,); X (>= D, .); Y (>= R, .), not X.
    """
    rows = A.shape[0]
    whole = rows - rows % 4
    for p in range(0, B, lanes(X)):
        for i in range(0, whole, 4):
            y0 = fill(X, b[i])
            y1 = fill(X, b[i + 1])
            y2 = fill(X, b[i + 2])
            y3 = fill(X, b[i + 3])
            for j in range(D):
                x = load(X, j, p)
                y0 = y0 + A[i, j] * x
                y1 = y1 + A[i + 1, j] * x
                y2 = y2 + A[i + 2, j] * x
                y3 = y3 + A[i + 3, j] * x
            store(Y, i, p, y0)
            store(Y, i + 1, p, y1)
            store(Y, i + 2, p, y2)
            store(Y, i + 3, p, y3)
        if rows - whole > 1:
            y0 = fill(X, b[whole])
            y1 = fill(X, b[whole + 1])
            for j in range(D):
                x = load(X, j, p)
                y0 = y0 + A[whole, j] * x
                y1 = y1 + A[whole + 1, j] * x
            store(Y, whole, p, y0)
            store(Y, whole + 1, p, y1)
        if rows % 2 == 1:
            i = rows - 1
            y0 = fill(X, b[i])
            for j in range(D):
                y0 = y0 + A[i, j] * load(X, j, p)
            store(Y, i, p, y0)


@block_loop
def add_product(A, X, Y, first, B):  # type: ignore[no-untyped-def]
    """Rows first, first + 1, ... of Y += A X for every path: A (R, D), X (>= D, .)."""
    rows, D = A.shape
    whole = rows - rows % 4
    for p in range(0, B, lanes(X)):
        for i in range(0, whole, 4):
            r = first + i
            y0 = load(Y, r, p)
            y1 = load(Y, r + 1, p)
            y2 = load(Y, r + 2, p)
            y3 = load(Y, r + 3, p)
            for j in range(D):
                x = load(X, j, p)
                y0 = y0 + A[i, j] * x
                y1 = y1 + A[i + 1, j] * x
                y2 = y2 + A[i + 2, j] * x
                y3 = y3 + A[i + 3, j] * x
            store(Y, r, p, y0)
            store(Y, r + 1, p, y1)
            store(Y, r + 2, p, y2)
            store(Y, r + 3, p, y3)
        if rows - whole > 1:
            r = first + whole
            y0 = load(Y, r, p)
            y1 = load(Y, r + 1, p)
            for j in range(D):
                x = load(X, j, p)
                y0 = y0 + A[whole, j] * x
                y1 = y1 + A[whole + 1, j] * x
            store(Y, r, p, y0)
            store(Y, r + 1, p, y1)
        if rows % 2 == 1:
            i = rows - 1
            y0 = load(Y, first + i, p)
            for j in range(D):
                y0 = y0 + A[i, j] * load(X, j, p)
            store(Y, first + i, p, y0)


@block_loop
def combine(a, X, b, Y, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = a X + b Y, row by row (OUT may be X or Y)."""
    for i in range(OUT.shape[0]):
        for p in range(0, B, lanes(X)):
            store(OUT, i, p, a * load(X, i, p) + b * load(Y, i, p))


@block_loop
def clear(X, B):  # type: ignore[no-untyped-def]
    """X = 0, row by row."""
    for i in range(X.shape[0]):
        for p in range(0, B, lanes(X)):
            store(X, i, p, 0.0)
