"""Statements from the literature as experiments, one file per claim.

A claim's file holds its statement in our words, the source, the mathematics, the
experiment and the rule that decides it.  The file's stem is the claim's name; adding a
file is all it takes.  Files that start with an underscore are the frame.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

from sdebench.errors import SDEBenchError, unknown

if TYPE_CHECKING:
    from sdebench.claims._claim import Claim


def claim_names() -> list[str]:
    """Return the names of all claims, sorted, without importing them."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def claim(name: str) -> Claim:
    """Return the claim called ``name``; hyphens may stand for underscores.

    Raises
    ------
    UnknownNameError
        For an unknown claim; names the nearest ones.
    """
    from sdebench.claims._claim import Claim

    stem, names = name.replace("-", "_"), claim_names()
    if stem not in names:
        raise unknown("claim", name, names)
    module = importlib.import_module(f"{__name__}.{stem}")
    found = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Claim) and cls.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise SDEBenchError(
            f"claims/{stem}.py holds {len(found)} subclasses of Claim; expected one: "
            "keep one claim per file"
        )
    built: Claim = found[0]()
    return built
