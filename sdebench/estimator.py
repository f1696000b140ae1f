"""What an estimator is: one file, one class, a torch function and a numba kernel.

An estimator sees a `sdebench.view.View` (torch) or the prepared coefficient tables and
one block of paths (numba), never the truth.  It returns rows of *statistics per path*;
the harness averages them over the paths of a replicate and `Estimator.combine` turns
the averages into the estimate.  Most estimators are plain means of per-path
contributions and inherit `combine` as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdebench.callable_module import make_callable
from sdebench.errors import unknown
from sdebench.registry import estimator as estimator_by_name
from sdebench.registry import label

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.closed_form.affine_chain import PolicyChain
    from sdebench.simulate.tables import Tables
    from sdebench.view import View

Array = NDArray[np.float64]
Control = str | float | tuple[float, ...]
"""A name, a factor of theta, or parameters: see `Estimator.control`."""

OBJECTIVES = {"control": "gradient", "reward": "reward_only_gradient"}
"""Estimand of a gradient estimator's ``objective`` option: J or -E r(X_T)."""


def estimand_of(objective: str) -> str:
    """Return the estimand of an ``objective`` option, or raise for an unknown one."""
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


class Sizes(NamedTuple):
    """The sizes of a simulated problem."""

    n_paths: int
    n_steps: int
    dim: int
    n_params: int


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """An estimator; subclasses are frozen dataclasses of options.

    Class attributes
    ----------------
    estimand : what is estimated, a key of `sdebench.problem.ESTIMANDS`.
    source : paper and equation.
    formula : the estimator in LaTeX, without dollar signs.
    unbiased : one sentence, what its expectation is exactly.
    needs : what it calls, of `sdebench.view.NEEDS`.
    variants : option dictionaries that the suites run.
    reduction : "mean" of the statistics, or "log_mean_exp" of one row of log-weights.
    block_kernel : the numba kernel
        ``(prepared, work, X, Z, W, totals, B, *kernel_options, OUT)``, or None.  With
        an `other_control`, its ``prepared, work`` come before ``kernel_options``; so
        do its `own_normals`.
    """

    estimand: ClassVar[str]
    source: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    unbiased: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    reduction: ClassVar[str] = "mean"
    block_kernel: ClassVar[Callable[..., None] | None] = None

    # ---- identity ---------------------------------------------------------------
    @property
    def name(self) -> str:
        """The file's stem, its name everywhere; of a class typed in, the class's."""
        stem = type(self).__module__.rpartition(".")[2]
        return type(self).__name__ if stem == "__main__" else stem

    @property
    def options(self) -> dict[str, Any]:
        """All options with their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def label(self) -> str:
        """The name with the options that differ from their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return label(self.name, self.options, defaults)

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return (inspect.getdoc(type(self)) or "").partition("\n")[0]

    # ---- what a subclass writes ---------------------------------------------------
    @abstractmethod
    def statistics(self, view: View) -> Tensor:
        """Return the statistics of every path, (n_paths, n_statistics).

        Called with the paths of one block; must not know how many blocks there are,
        and a row must not depend on paths outside its group (see `group_size`).
        """

    def n_statistics(self, n_params: int) -> int:
        """Return the number of statistics per path (default: one per parameter)."""
        return n_params

    def combine(self, mean: Array, n_paths: int) -> Array:
        """Return the estimate from the statistics' mean over a replicate's paths."""
        return mean

    @property
    def kernel_options(self) -> tuple[int | float, ...]:
        """Numbers handed to the numba kernel before OUT."""
        return ()

    @property
    def declared_bias(self) -> str:
        """Which bias against the N-step answer the estimator owns up to.

        "none" (default); "1/n_paths", one that many paths per replicate remove in
        proportion; "any", whose size is measured but never held against it.
        """
        return "none"

    def target(self, policy: PolicyChain) -> Array | None:
        """Return what the estimate is unbiased for on an N-step chain, exactly, (P,).

        None (default): the N-step answer to the estimand.  Estimators of a part of the
        gradient, or of a surrogate, compute it here from the chain's closed form; the
        harness measures them against this and against the gradient.
        """
        return None

    @property
    def control(self) -> Control:
        """The control to simulate: "theta", "none", "optimal", or a factor of theta.

        A tuple holds the parameters themselves, such as a composite estimator adapts.
        """
        return "theta"

    @property
    def other_control(self) -> Control | None:
        """A second control to evaluate along the paths, or None.

        Its torch view is ``view.other``; the values are those of `control`.
        """
        return None

    def noisy_steps(self, n_steps: int) -> Array | None:
        """Return 1 for steps of the SDE and 0 for the probability flow, (n_steps,).

        None (default): the SDE everywhere.
        """
        return None

    def group_size(self, n_paths: int) -> int:
        """Return the number of consecutive paths whose rows may depend on each other.

        Rows of different groups are independent and all groups have the same law.
        Default 1; ``n_paths`` couples the whole replicate.
        """
        return 1

    def own_normals(self, n_steps: int) -> int:
        """Return the number of normal vectors per path that it draws for itself.

        In torch ``view.noise(n_steps + k)``; a kernel gets the same numbers, (count,
        dim, >= B), right before ``kernel_options`` and may write into them.
        """
        return 0

    @property
    def discretization_free(self) -> bool:
        """Whether any number of steps is unbiased for the answer of continuous time.

        Its N-step answer is then that of continuous time.
        """
        return False

    @property
    def handles_initial_law(self) -> bool:
        """Whether it has the terms of parameters that move the law of X_0."""
        return False

    @property
    def handles_state_dependent_noise(self) -> bool:
        """Whether it is right where the noise G_n(x) depends on the state.

        It is for estimators that use no derivative of a step and G_n nowhere; others
        need the state in `View.noise_transpose` and w + z in `View.base_vjp`, or the
        primitives `noise_transpose_at` and `noise_vjp`.
        """
        return False

    @property
    def needs_denoiser(self) -> bool:
        """Whether it needs the tables' ``denoiser``."""
        return False

    @property
    def needs_invertible_noise(self) -> bool:
        """Whether it divides by the noise matrix of a step."""
        return False

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that it runs on."""
        return ("torch",) if self.block_kernel is None else ("numba", "torch")

    def not_applicable(self, n_paths: int) -> str | None:
        """Return why the estimator cannot run with these settings, or None."""
        return None

    def not_applicable_to(self, sizes: Sizes) -> str | None:
        """Return why the estimator cannot run on a problem of this size, or None."""
        return None

    def not_applicable_on(self, tables: Tables, times: Array) -> str | None:
        """Return why the estimator cannot run on the process of the tables, or None."""
        return None

    # ---- derived ------------------------------------------------------------------
    @property
    def has_target(self) -> bool:
        """Whether it is unbiased for something else than the estimand's answer."""
        return type(self).target is not Estimator.target

    def refusal(self, n_paths: int, backend: str) -> str | None:
        """Return why it cannot run with these settings, or None."""
        if reason := self.not_applicable(n_paths):
            return reason
        if n_paths % self.group_size(n_paths):
            return (
                f"it works on groups of {self.group_size(n_paths)} paths; n_paths = "
                f"{n_paths} is no multiple"
            )
        if backend not in self.backends:
            return f"it has no {backend} kernel; use backend {self.backends[0]}"
        return None

    @property
    def independent(self) -> bool:
        """Whether the groups' statistics are i.i.d. contributions to a plain mean."""
        return type(self).combine is Estimator.combine and self.reduction == "mean"


make_callable(__name__, estimator_by_name)
