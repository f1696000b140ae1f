"""A user's own problem or estimator file: ``path/file.py[:Class][:option=1]``."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from sdebench.errors import SDEBenchError, unknown

_SPEC = re.compile(r"(?P<path>.+?\.py)(?::(?P<cls>[A-Za-z_]\w*))?(?::(?P<rest>.+))?")


_NAME_WITH_OPTIONS = re.compile(r"[\w-]+:[\w-]+=")
"""Not a file, although the option's value may be one."""


class FileSpec(NamedTuple):
    """A specification taken apart; ``class_name`` and ``parameters`` may be empty."""

    path: Path
    class_name: str
    parameters: str


def file_spec(spec: str) -> FileSpec | None:
    """Return the parts of a specification that names a file, or None for a name."""
    found = _SPEC.fullmatch(spec.strip())
    if not found or _NAME_WITH_OPTIONS.match(spec.strip()):
        return None
    name, rest = found["cls"] or "", found["rest"] or ""
    if name and not rest and "=" in spec.partition(".py:")[2]:
        name, rest = "", spec.partition(".py:")[2]
    return FileSpec(Path(found["path"]).expanduser(), name, rest)


def _bases() -> dict[str, type]:
    from sdebench.estimator import Estimator
    from sdebench.problem import Problem

    return {"estimator": Estimator, "problem": Problem}


def _import(path: Path) -> Any:
    """Import a file under its stem; its folder may change between calls."""
    if not path.is_file():
        raise SDEBenchError(
            f"there is no file {path}; `sdebench new estimator NAME` writes one to "
            "start from"
        )
    if not path.stem.isidentifier():
        raise SDEBenchError(
            f"{path.name} cannot be imported: {path.stem!r} is not a Python name; "
            "rename the file with letters, digits and underscores"
        )
    content = path.read_bytes()
    place = hashlib.sha1(
        str(path.resolve()).encode() + content, usedforsecurity=False
    ).hexdigest()[:12]
    name = f"sdebench_file_{place}.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # helpers beside the file
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _line_of(error, path)
        raise SDEBenchError(
            f"{path} does not import: {type(error).__name__}: {error}{line}; mend it "
            "and run the command again (--debug shows the traceback)"
        ) from error
    finally:
        sys.path.remove(folder)
        # For imports inside functions; last, to hide nothing.
        if folder not in sys.path:
            sys.path.append(folder)
    return module


def _line_of(error: BaseException, path: Path) -> str:
    """Return where in the file an error arose."""
    if isinstance(error, SyntaxError):
        return ""  # its own message says so
    place, line = error.__traceback__, None
    while place is not None:
        if Path(place.tb_frame.f_code.co_filename) == path.resolve():
            line = place.tb_lineno
        place = place.tb_next
    return "" if line is None else f" (line {line})"


def load_class(path: Path, class_name: str = "", kind: str | None = None) -> type:
    """Import a file and return its problem or estimator class.

    Parameters
    ----------
    path : the file.
    class_name : which class; may be left out if there is only one.
    kind : "problem" or "estimator"; None for either.

    Raises
    ------
    SDEBenchError
        If the file does not exist or does not import, or has no such class or several.
    """
    module = _import(path)
    bases = tuple(b for k, b in _bases().items() if kind in (None, k))
    wanted = " or ".join(base.__name__ for base in bases)
    every = {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, bases)
        and cls.__module__ == module.__name__
    }
    if class_name:
        if class_name not in every:
            if not every:
                raise _nothing(path, wanted, kind)
            raise unknown(f"class of {path}", class_name, every)
        found = [every[class_name]]
    else:
        found = [
            cls
            for name, cls in every.items()
            if not name.startswith("_") and not inspect.isabstract(cls)
        ]
    if not found:
        abstract = [c for n, c in every.items() if not n.startswith("_")]
        if abstract:
            raise _incomplete(abstract[0], path)
        raise _nothing(path, wanted, kind)
    if len(found) > 1:
        names = ", ".join(sorted(cls.__name__ for cls in found))
        raise SDEBenchError(
            f"{path} has {len(found)} classes ({names}); say which: "
            f"{path}:{sorted(cls.__name__ for cls in found)[0]}"
        )
    cls = found[0]
    if inspect.isabstract(cls):
        raise _incomplete(cls, path)
    return cls


def _nothing(path: Path, wanted: str, kind: str | None) -> SDEBenchError:
    return SDEBenchError(
        f"{path} has no subclass of {wanted}; `sdebench new "
        f"{kind or 'estimator'} NAME` writes a file to start from"
    )


def _incomplete(cls: type, path: Path) -> SDEBenchError:
    missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
    return SDEBenchError(
        f"{cls.__name__} in {path} lacks {missing}; write it, `sdebench new` shows how"
    )
