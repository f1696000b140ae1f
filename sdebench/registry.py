"""Find problems and estimators by name: the file's stem is the name everywhere.

Listing names looks at file names only and imports nothing; a class is imported when it
is asked for.  Adding a file to ``problems/`` or ``estimators/`` is all it takes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdebench.errors import ParameterError, SDEBenchError, unknown
from sdebench.files import file_spec, load_class

if TYPE_CHECKING:
    from sdebench.estimator import Estimator
    from sdebench.problem import Problem

KINDS = {"problem": "sdebench.problems", "estimator": "sdebench.estimators"}


def names_in(package: str) -> list[str]:
    """Return the names of the files in a package, sorted, without importing them.

    Files that start with an underscore are the package's own.
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in found if not m.name.startswith("_"))


def _names(kind: str) -> list[str]:
    return names_in(KINDS[kind])


def problem_names() -> list[str]:
    """Return the names of all problems, sorted, without importing them."""
    return _names("problem")


def estimator_names() -> list[str]:
    """Return the names of all estimators, sorted, without importing them."""
    return _names("estimator")


def _class(kind: str, name: str) -> type:
    """Import the one public class of the file that ``name`` names."""
    names = _names(kind)
    if name not in names:
        raise unknown(kind, name, names)
    module = importlib.import_module(f"{KINDS[kind]}.{name}")
    base_module = importlib.import_module(f"sdebench.{kind}")
    return only_subclass(module, getattr(base_module, kind.capitalize()))


def only_subclass(module: ModuleType, base: type) -> type:
    """Return the one public subclass of ``base`` in a module of a catalogue.

    Raises
    ------
    SDEBenchError
        If there is none, or several.
    """
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base)
        and c.__module__ == module.__name__
        and not c.__name__.startswith("_")
    ]
    if len(found) != 1:
        room, name = module.__name__.split(".")[-2:]
        raise SDEBenchError(
            f"{room}/{name}.py holds {len(found)} subclasses of {base.__name__}; "
            "expected exactly one: keep one public class per file"
        )
    return found[0]


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name:dim=50,schedule=vp"`` into the name and its parameters.

    Hyphens in names are read as underscores; values are JSON where they parse as
    JSON (numbers, true, lists) and plain words otherwise.  Brackets hold a
    specification as a value: ``"antithetic:estimator=[reinforce:baseline=none]"``.
    """
    name, _, rest = spec.partition(":")
    parameters: dict[str, Any] = {}
    depth, item, items = 0, "", []
    for character in rest:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            items.append(item)
            item = ""
        else:
            item += character
    for part in [*items, item] if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ParameterError(
                f"parameter {part!r} in {spec!r} has no value; write "
                "name:parameter=value,parameter=value"
            )
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value.strip()
            if parsed.startswith("[") and parsed.endswith("]"):
                parsed = parsed[1:-1]
        parameters[key.strip().replace("-", "_")] = parsed
    return name.strip().replace("-", "_"), parameters


def _coerce(kind: str, name: str, field: dataclasses.Field[Any], value: Any) -> Any:
    """Bring a value given as text or JSON to the type of the field's default."""
    wanted = type(field.default)
    if wanted is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not wanted:
        raise ParameterError(
            f"{kind} {name}: parameter {field.name} = {value!r} is not a "
            f"{wanted.__name__}; the default is {field.default!r}"
        )
    return value


def _build(kind: str, spec: str, given: dict[str, Any]) -> Any:
    if found := file_spec(spec):
        name, parameters = parse(f"{found.path.stem}:{found.parameters}")
        cls = load_class(found.path, found.class_name, kind)
    else:
        name, parameters = parse(spec)
        cls = _class(kind, name)
    parameters.update(given)
    return build(cls, kind, name, parameters)


def build(cls: type, kind: str, name: str, parameters: dict[str, Any]) -> Any:
    """Return an instance with parameters brought to the types of their defaults."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key, value in parameters.items():
        if key not in fields:
            raise unknown(f"parameter of {kind} {name}", key, fields)
        parameters[key] = _coerce(kind, name, fields[key], value)
    return cls(**parameters)


def problem(spec: str, **parameters: Any) -> Problem:
    """Return the problem named by ``spec``, e.g. ``problem("two_modes", beta=0.1)``.

    Parameters
    ----------
    spec : name, or ``"name:parameter=value,…"``; hyphens may stand for underscores.
        Or a file of your own, ``"path/to/file.py[:Class][:parameter=value,…]"``.
    **parameters : override the published defaults.

    Raises
    ------
    UnknownNameError
        For an unknown problem or parameter; names the nearest valid ones.
    ParameterError
        For a parameter of the wrong type or out of range.
    """
    built: Problem = _build("problem", spec, parameters)
    return built


def estimator(spec: str, **options: Any) -> Estimator:
    """Return the estimator named by ``spec``; the arguments are those of `problem`."""
    built: Estimator = _build("estimator", spec, options)
    return built


def label(name: str, values: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return ``name:key=value,…`` with the values that differ from the defaults."""
    changed = {k: v for k, v in values.items() if v != defaults.get(k)}
    text = ",".join(f"{k}={_spell(v)}" for k, v in changed.items())
    return f"{name}:{text}" if text else name


def _spell(value: Any) -> str:
    """Return a value as `parse` reads it; specifications stand in brackets."""
    if not isinstance(value, str):
        return json.dumps(value)
    return f"[{value}]" if ":" in value else value
