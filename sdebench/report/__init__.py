"""Tables, figures and pages of measured cells; nothing here measures.

The functions are loaded at first use: importing this package imports neither pandas
nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "headline": "selection",
    "summary": "summarize",
    "render": "table",
    "figures": "plot",
    "bias_figure": "plot",
    "variance_figure": "plot",
    "work_precision_figure": "plot",
    "order_figure": "plot",
    "write_site": "site",
}
__all__ = [  # noqa: RUF022 (in the order of use)
    "headline",
    "summary",
    "render",
    "figures",
    "bias_figure",
    "variance_figure",
    "work_precision_figure",
    "order_figure",
    "write_site",
]


def __getattr__(name: str) -> Any:
    """Load a public function from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
