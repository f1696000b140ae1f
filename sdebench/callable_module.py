"""Modules that can be called: ``sdebench.measure(...)`` and ``sdebench.measure.tails``.

The public functions `problem`, `estimator`, `measure` and `run` share their names with
modules, and importing a submodule binds the module to that name.  Calling the module
calls the function, so both uses work whatever was imported before.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let calls of the module named ``module`` call ``function``."""

    class CallableModule(ModuleType):
        @functools.wraps(function)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options)

        # `help` would take the function's first parameter for the module itself.
        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(function)

    sys.modules[module].__class__ = CallableModule
