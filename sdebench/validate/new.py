"""Start files: a working estimator or problem with comments on what to change."""

from __future__ import annotations

import keyword
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from sdebench import registry
from sdebench.errors import ParameterError, SDEBenchError

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


def write_new(kind: str, name: str, folder: Path | str = ".") -> Path:
    """Write ``folder/name.py`` from the template of a kind and return its path.

    Parameters
    ----------
    kind : "estimator" or "problem".
    name : the file's stem, lower case with underscores; the thing's name everywhere.

    Raises
    ------
    ParameterError
        For a name that cannot be a module's, or that the catalogue has.
    SDEBenchError
        If the file exists or cannot be written.
    """
    stem = name.removesuffix(".py").replace("-", "_")
    if not stem.isidentifier() or keyword.iskeyword(stem) or stem != stem.lower():
        raise ParameterError(
            f"{name!r} cannot be a file's name in Python; give a lower-case word with "
            "underscores, such as my_estimator"
        )
    if stem in getattr(registry, f"{kind}_names")():
        raise ParameterError(f"{stem} is in the catalogue; choose another name")
    if stem in sys.stdlib_module_names or stem in packages_distributions():
        raise ParameterError(
            f"{stem} is an installed module, and a file of that name would hide it; "
            "choose another name"
        )
    path = Path(folder) / f"{stem}.py"
    if path.exists():
        raise SDEBenchError(f"{path} exists; choose another name or remove it")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Python, not HTML
    )
    class_name = "".join(part.capitalize() for part in stem.split("_"))
    text = environment.get_template(f"{kind}.py.jinja").render(
        name=stem, class_name=class_name
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise SDEBenchError(f"cannot write {path}: {error.strerror}") from error
    return path
