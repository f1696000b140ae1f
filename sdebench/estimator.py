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
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sdebench.callable_module import make_callable
from sdebench.registry import estimator as estimator_by_name
from sdebench.registry import label

if TYPE_CHECKING:
    from torch import Tensor

    from sdebench.view import View

Array = NDArray[np.float64]


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
        ``(prepared, work, X, Z, W, totals, B, *kernel_options, OUT)``, or None.
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
        and a row must not depend on the other paths.
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

    @property
    def control(self) -> str:
        """The control to simulate: "theta", "none" or "optimal"."""
        return "theta"

    def not_applicable(self, n_paths: int) -> str | None:
        """Return why the estimator cannot run with these settings, or None."""
        return None

    # ---- derived ------------------------------------------------------------------
    @property
    def independent(self) -> bool:
        """Whether the statistics are i.i.d. contributions to a plain mean."""
        return type(self).combine is Estimator.combine and self.reduction == "mean"


make_callable(__name__, estimator_by_name)
