"""What claims and studies share: experiment, files and page, measuring, drawing.

Adding a claim or a study is adding one file; nothing here lists them.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from sdebench.errors import unknown
from sdebench.registry import only_subclass


def names_in(package: str) -> list[str]:
    """Return the names of the files in a package, sorted, without importing them.

    Files that start with an underscore are the package's own.
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in found if not m.name.startswith("_"))


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
