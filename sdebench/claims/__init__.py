"""Statements from the literature as experiments, one file per claim.

A claim's file holds its statement in our words, the source, the mathematics, the
experiment and the rule that decides it.  The file's stem is the claim's name; adding a
file is all it takes.  Files that start with an underscore are the frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdebench.claims._claim import Claim


def claim_names() -> list[str]:
    """Return the names of all claims, sorted, without importing them."""
    from sdebench.registry import names_in

    return names_in(__name__)


def claim(name: str) -> Claim:
    """Return the claim called ``name``; hyphens may stand for underscores.

    Raises
    ------
    UnknownNameError
        For an unknown claim; names the nearest ones.
    """
    from sdebench.claims._claim import Claim
    from sdebench.experiments import build

    built: Claim = build(__name__, "claim", name, Claim)
    return built
