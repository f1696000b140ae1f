"""Wrappers: variance reduction around another estimator.

A wrapper chooses the noise of the paths that the wrapped estimator sees, or what is
subtracted from its rows.  Its estimand, expectation and declared bias are those of the
wrapped estimator, whose rows must be i.i.d. contributions to a plain mean: a baseline
that compares paths, or the logarithm of a mean, is not linear in the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sdebench import registry
from sdebench.composite import CompositeEstimator
from sdebench.errors import ParameterError
from sdebench.estimator import Array, Estimator

if TYPE_CHECKING:
    from sdebench.closed_form.affine_chain import PolicyChain

WRAPPED: tuple[Mapping[str, Any], ...] = (
    {},
    {"estimator": "reinforce:baseline=none"},
)
"""The estimators that the suites wrap: pathwise and a likelihood ratio."""


def no_plain_mean(estimator: Estimator) -> str | None:
    """Return why an estimator's rows are no plain mean over given paths, or None."""
    if isinstance(estimator, CompositeEstimator):
        return "runs simulations of its own, whose noise cannot be chosen for it"
    if estimator.reduction != "mean":
        return "is the logarithm of a mean, not a mean"
    mean = np.arange(1.0, 1.0 + estimator.n_statistics(1))
    if not np.array_equal(estimator.combine(mean, 8), mean):
        return "compares the paths of a replicate, which must then be independent"
    if estimator.group_size(1024) != 1:
        return "works on groups of paths, which must then be independent"
    return None


@dataclass(frozen=True, kw_only=True)
class Wrapper(CompositeEstimator):
    """An estimator around another one; ``estimator`` is a specification."""

    unbiased: ClassVar[str] = "what the wrapped estimator is unbiased for"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = WRAPPED

    estimator: str = "pathwise"

    def __post_init__(self) -> None:
        if reason := no_plain_mean(self.inner):
            raise ParameterError(
                f"{self.name} cannot wrap {self.estimator}: it {reason}; wrap one "
                "whose rows are a plain mean, e.g. pathwise or "
                "[reinforce:baseline=none]"
            )

    @cached_property
    def inner(self) -> Estimator:
        """The wrapped estimator."""
        return registry.estimator(self.estimator)

    @property
    def estimand(self) -> str:  # type: ignore[override]
        return self.inner.estimand

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    @property
    def declared_bias(self) -> str:
        return self.inner.declared_bias

    @property
    def has_target(self) -> bool:
        return self.inner.has_target

    @property
    def handles_state_dependent_noise(self) -> bool:
        return self.inner.handles_state_dependent_noise

    @property
    def backends(self) -> tuple[str, ...]:
        return self.inner.backends

    def target(self, policy: PolicyChain) -> Array | None:
        return self.inner.target(policy)

    def noisy_steps(self, n_steps: int) -> Array | None:
        return self.inner.noisy_steps(n_steps)

    def not_applicable(self, n_paths: int) -> str | None:
        return self.inner.not_applicable(n_paths)

    def n_statistics(self, n_params: int) -> int:
        return self.inner.n_statistics(n_params)
