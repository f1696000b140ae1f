"""Published and derived numbers side by side with ours, one file per study.

A study has no verdict: it is a table, and a figure where there is something to see.
Its file holds the source's numbers, the mathematics and the experiment.  The file's
stem is the study's name; adding a file is all it takes.  Files that start with an
underscore are the frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdebench.studies._study import Study


def study_names() -> list[str]:
    """Return the names of all studies, sorted, without importing them."""
    from sdebench.registry import names_in

    return names_in(__name__)


def study(name: str) -> Study:
    """Return the study called ``name``; hyphens may stand for underscores.

    Raises
    ------
    UnknownNameError
        For an unknown study; names the nearest ones.
    """
    from sdebench.experiments import build
    from sdebench.studies._study import Study

    built: Study = build(__name__, "study", name, Study)
    return built
