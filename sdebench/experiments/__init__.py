"""What claims and studies share: experiment, files and page, measuring, drawing.

Adding a claim or a study is adding one file; nothing here lists them.
"""

from __future__ import annotations

import importlib
from typing import Any

from sdebench.errors import unknown
from sdebench.registry import names_in, only_subclass


def build(package: str, kind: str, name: str, base: type) -> Any:
    """Return an instance of the one subclass of ``base`` in the file of this name.

    Hyphens may stand for underscores.

    Raises
    ------
    UnknownNameError
        For an unknown name; names the nearest ones.
    """
    stem, names = name.replace("-", "_"), names_in(package)
    if stem not in names:
        raise unknown(kind, name, names)
    return only_subclass(importlib.import_module(f"{package}.{stem}"), base)()
