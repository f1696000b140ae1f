"""Statements from the literature as experiments, one file per claim.

A claim's file holds its statement in our words, the source, the mathematics, the
experiment and the rule that decides it.  The file's stem is the claim's name; adding a
file is all it takes.  Files that start with an underscore are the frame.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from sdebench.errors import unknown
from sdebench.registry import only_subclass

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
    built: Claim = only_subclass(module, Claim)()
    return built
