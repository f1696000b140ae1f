"""Validation: a user's own estimator or problem against the exact answers."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "check_estimator": "estimator",
    "check_problem": "problem",
    "parametrize_with_checks": "pytest_helper",
    "write_new": "new",
}
__all__ = ["check_estimator", "check_problem", "parametrize_with_checks", "write_new"]


def __getattr__(name: str) -> Any:
    """Load a public function from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
