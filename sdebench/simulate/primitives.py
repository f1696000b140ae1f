"""What an estimator's kernel may ask of a process, whatever its family.

The functions below have no body: inside a numba kernel the type of ``prepared`` selects
the implementation of `linear`, `mixture`, `sine` or `separable` at compile time, so
that each estimator is written once.  ``prepared`` comes from `prepare`, ``work`` from
`workspace`.

A block is B paths, a multiple of 16; every buffer is (rows, B + PADDING), C-contiguous,
one column per path, of the dtype of ``prepared``.  The columns from B on are scratch.
``n`` is the step.  Outputs must not be inputs unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.extending import overload
from numpy.typing import DTypeLike

from sdebench.errors import NotApplicableError
from sdebench.simulate import (
    constant_noise,
    fixed_start,
    linear,
    mixture,
    separable,
    sine,
)
from sdebench.simulate.jit import OPTIONS
from sdebench.simulate.linear import LinearWork, PreparedLinear
from sdebench.simulate.mixture import MixtureWork, PreparedMixture
from sdebench.simulate.separable import PreparedSeparable, SeparableWork
from sdebench.simulate.sine import PreparedSine, SineWork
from sdebench.simulate.tables import (
    ONLY_TORCH,
    FunctionTables,
    LinearTables,
    MixtureTables,
    SineTables,
    Tables,
)
from sdebench.simulate.tile import INTERNAL

Prepared = PreparedLinear | PreparedMixture | PreparedSine | PreparedSeparable
Work = LinearWork | MixtureWork | SineWork | SeparableWork
ONCE_PER_BLOCK = (
    "start",
    "start_cost_gradient",
    "start_parameter_vjp",
    "start_score",
    "start_log_ratio_gradient",
    "reward",
    "reward_gradient",
)


def prepare(tables: Tables, dtype: DTypeLike) -> Prepared:
    """Return the tables as the kernels want them.

    Parameters
    ----------
    tables : of any kind but `FunctionTables`, which torch alone simulates
    dtype : float64 or float32
        Precision of the whole simulation.
    """
    if isinstance(tables, LinearTables):
        return linear.prepare_linear(tables, dtype)
    if isinstance(tables, MixtureTables):
        return mixture.prepare_mixture(tables, dtype)
    if isinstance(tables, SineTables):
        return sine.prepare_sine(tables, dtype)
    if isinstance(tables, FunctionTables):
        raise NotApplicableError(ONLY_TORCH)
    return separable.prepare_separable(tables, dtype)


def workspace(prepared: Prepared, block: int) -> Work:
    """Allocate the scratch of one thread for blocks of ``block`` paths."""
    if isinstance(prepared, PreparedLinear):
        return linear.work_linear(prepared, block)
    if isinstance(prepared, PreparedMixture):
        return mixture.work_mixture(prepared, block)
    if isinstance(prepared, PreparedSine):
        return sine.work_sine(prepared, block)
    return separable.work_separable(prepared, block)


def implementation(family: Any, name: str) -> Any:
    """Return a family's function, or that of what most families have in common.

    None if the family has none: a kernel that calls it cannot be compiled for it.
    """
    for place in (family, fixed_start, constant_noise):
        if hasattr(place, name):
            return getattr(place, name).py_func
    return None


def primitive(stub: Callable[..., Any]) -> Callable[..., Any]:
    """Register the families' functions of the same name for kernels."""
    families = {
        PreparedLinear: implementation(linear, stub.__name__),
        PreparedMixture: implementation(mixture, stub.__name__),
        PreparedSine: implementation(sine, stub.__name__),
        PreparedSeparable: implementation(separable, stub.__name__),
    }

    options: Any = {**OPTIONS, **INTERNAL}
    options["forceinline"] = stub.__name__ not in ONCE_PER_BLOCK

    # numba would compare argument names of this function with the implementation's
    @overload(stub, jit_options=options, strict=False)
    def choose(prepared, *args):  # type: ignore[no-untyped-def]
        return families.get(getattr(prepared, "instance_class", None))

    return stub


@primitive
def start(prepared, work, X, B, p0, k0, k1, replicate):  # type: ignore[no-untyped-def]
    """X = states at t0 of paths p0, p0 + 1, ..."""


@primitive
def has_start_parameters(prepared):  # type: ignore[no-untyped-def]
    """Return whether theta moves the law of X_0; the next four do nothing if not."""


@primitive
def start_cost_gradient(prepared, work, factor, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[p] += factor times the derivative of the start law's relative entropy."""


@primitive
def start_parameter_vjp(prepared, work, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT[p] += (dX_0/dtheta_p)^T V for all parameters p, X = X_0."""


@primitive
def start_score(prepared, work, X, C, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += C[0] d log p_theta(X)/dtheta_p for all parameters p, X = X_0."""


@primitive
def start_log_ratio_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += gradient in X = X_0 of log p_theta/p_0, p_0 the reference start law."""


@primitive
def evaluate(prepared, work, n, X, W, B):  # type: ignore[no-untyped-def]
    """W = control w_n(x); keeps in ``work`` what `step` and the products need."""


@primitive
def refresh(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Bring ``work`` to (n, X) without the control: before any product below."""


@primitive
def refresh_control(prepared, work, n, X, B):  # type: ignore[no-untyped-def]
    """Like `refresh`, but only for `control_parameter_vjp`."""


@primitive
def step(prepared, work, n, X, W, Z, Y, totals, B):  # type: ignore[no-untyped-def]
    """Y = base mean(x) + G_n(x) (w + z), after `evaluate`.

    Adds |w|^2 to row 0 and w . z to row 2 of ``totals``.
    """


@primitive
def base_mean(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = base mean(x); leaves ``work`` as no product below expects it.

    This and the next three are of mixture families only; densities and scores
    exist at all times n = 0, ..., N.
    """


@primitive
def base_log_density(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = log p_n(x), the density of the base process."""


@primitive
def base_score(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = grad log p_n(x)."""


@primitive
def tilted_sample(prepared, work, u, Z, X, B):  # type: ignore[no-untyped-def]
    """X = exact samples of the tilted law, from uniforms u (.,) and normals Z."""


@primitive
def noise_transpose(prepared, work, n, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = G_n^T V, of noise that does not depend on the state.

    An estimator's kernel that uses it must not claim `handles_state_dependent_noise`.
    """


@primitive
def noise_transpose_at(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = G_n(x)^T V."""


@primitive
def noise_vjp(prepared, work, n, X, W, Z, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (d (G_n(x) s) / dx)^T V at fixed s = W + Z.

    With `base_vjp` the derivative of a step at frozen noise; nothing where the noise
    does not depend on the state.
    """


@primitive
def base_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = (d base mean / dx)^T V."""


@primitive
def control_vjp(prepared, work, n, X, V, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += (dw/dx)^T V."""


@primitive
def control_parameter_vjp(prepared, work, n, X, V, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row + p] += (dw/dtheta_p)^T V for all parameters p."""


@primitive
def adjoint(prepared, work, n, X, A, V, NEXT, OUT, B):  # type: ignore[no-untyped-def]
    """NEXT = (d base mean / dx)^T A + (dw/dx)^T V; OUT[p] += (dw/dtheta_p)^T V.

    The three products at once: they share work.
    """


@primitive
def running_cost(prepared, work, n, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] += running cost of step n."""


@primitive
def running_cost_gradient(prepared, work, n, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT += gradient of the running cost of step n."""


@primitive
def reward(prepared, work, X, OUT, row, B):  # type: ignore[no-untyped-def]
    """OUT[row] = r(x)."""


@primitive
def reward_gradient(prepared, work, X, OUT, B):  # type: ignore[no-untyped-def]
    """OUT = gradient of r(x)."""
