"""The results as a static site: an index, a page per problem and per estimator.

Every page is one file without external parts: it works from the file system, offline,
and a policy in its head forbids the browser to load anything else.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sdebench.errors import ResultsError
from sdebench.report import site_text
from sdebench.report.site_pages import Pages

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

INDEX, MARKER = "index.html", ".sdebench-report"
_MANY = 10  # pages from which on workers save time


def write_site(frame: pd.DataFrame, folder: str | Path) -> Path:
    """Write the results as a static site and return its first page.

    Parameters
    ----------
    frame : measured rows, of `sdebench.run` or `sdebench.load`.
    folder : of the pages; made if it does not exist.  Pages of an earlier site in it
        are overwritten, the index last.

    Raises
    ------
    ResultsError
        If there are no rows, or the folder holds other files or cannot be written.
    """
    folder = Path(folder)
    if not len(frame):
        raise ResultsError("there are no results to report; run `sdebench run` first")
    _check(folder)
    pages = _render(Pages(frame))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text("made by sdebench report\n", encoding="utf-8")
        for name, text in pages.items():  # the index comes last
            temporary = folder / f".{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(folder / name)
    except OSError as error:
        raise ResultsError(
            f"the report cannot be written to {folder}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error
    return folder / INDEX


def _check(folder: Path) -> None:
    """Refuse a folder with files that are not a site of ours."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ResultsError(f"{folder} is a file; give a folder for the report")
    if any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ResultsError(
            f"{folder} holds files that are not a report of sdebench; give an empty "
            "folder or one that does not exist"
        )


def _render(pages: Pages) -> dict[str, str]:
    """Return the text of every page by file name, the index last."""
    import joblib

    tasks = [
        *(("estimator", name) for name in pages.estimator_files),
        *(("problem", label) for label in pages.problem_files),
        ("index", ""),
    ]
    # Figures take a second each; starting workers takes three.
    workers = 1 if len(tasks) < _MANY else joblib.cpu_count()
    texts = joblib.Parallel(workers)(joblib.delayed(_page)(pages, *t) for t in tasks)
    files = [*pages.estimator_files.values(), *pages.problem_files.values(), INDEX]
    return dict(zip(files, texts, strict=True))


def _page(pages: Pages, kind: str, name: str) -> str:
    """Return the text of one page."""
    content = getattr(pages, kind)(*([name] if name else []))
    template = _templates().get_template(f"{kind}.html")
    return template.render(index=INDEX, origin=pages.origin(), **content)


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("sdebench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["breakable"] = site_text.breakable
    return templates
