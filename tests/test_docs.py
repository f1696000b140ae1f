"""The site builds without a warning and is complete; the tutorial runs.

Files beside it that people and machines read (changelog, citation) are checked as well.
"""

from __future__ import annotations

import datetime
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sdebench
from sdebench import cli, report
from sdebench.claims import claim_names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "tutorial.ipynb"


def needs(*modules):
    """Skip a test where a package of the extra ``docs`` is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{missing} not installed: pip install -e '.[docs]'"
    )


needs_sphinx = needs("sphinx", "myst_nb", "furo")


def build(source, target):
    """Build the site, warnings being errors, as CONTRIBUTING.md says."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    return subprocess.run(
        [*command, "-d", target / "trees", source, target / "site"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the built site."""
    target = tmp_path_factory.mktemp("docs")
    done = build(DOCS, target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / "site"


class Resources(HTMLParser):
    """Collects what a browser fetches by itself: all but the targets of ``a``."""

    ATTRIBUTES = ("src", "srcset", "data", "poster", "href", "xlink:href")

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag != "a":
            self.found += [v for k, v in attributes if k in self.ATTRIBUTES and v]


def is_remote(address):
    return re.match(r"(?:[a-z]+:)?//", address) is not None


# ---- the site -----------------------------------------------------------------------
@needs_sphinx
def test_nothing_is_fetched_from_elsewhere(site):
    pages = [Resources(page.read_text()).found for page in site.rglob("*.html")]
    assert len(pages) > 9
    assert not [address for found in pages for address in found if is_remote(address)]
    for sheet in site.rglob("*.css"):
        addresses = re.findall(r"url\(['\"]?([^)'\"]+)|@import", sheet.read_text())
        assert not [a for a in addresses if is_remote(a)], sheet


def test_a_fetched_script_would_be_seen():
    page = '<a href="https://ok"></a><script src="https://cdn.example/x.js"></script>'
    assert [a for a in Resources(page).found if is_remote(a)] == [
        "https://cdn.example/x.js"
    ]


@needs_sphinx
def test_every_public_name_is_documented(site):
    page = (site / "api.html").read_text()
    names = [f"sdebench.{name}" for name in sdebench.__all__]
    names += [f"sdebench.report.{name}" for name in report.__all__]
    names += ["sdebench.view.Rollout", "sdebench.view.NEEDS"]
    names += ["sdebench.linear_problem.LinearProblem.build"]
    names += ["sdebench.tilting_problem.TiltingProblem.build"]
    assert not [name for name in names if f'id="{name}"' not in page]


@needs_sphinx
@pytest.mark.parametrize(
    ("name", "first_parameter"),
    [
        ("problem", "spec"),
        ("estimator", "spec"),
        ("measure", "problem"),
        ("run", "suite"),
        ("simulate", "problem"),
    ],
)
def test_modules_that_can_be_called_are_documented_as_functions(
    site, name, first_parameter
):
    page = (site / "api.html").read_text()
    function = rf'<dl class="py function">\s*<dt[^>]*id="sdebench\.{name}".*?</dt>'
    entry = re.search(function, page, re.S)
    assert entry
    assert f"sdebench.{name}({first_parameter}" in re.sub(r"<.*?>|\s", "", entry[0])


@needs_sphinx
@pytest.mark.parametrize("kind", ["problem", "estimator"])
def test_every_problem_and_estimator_has_its_entry(site, kind):
    page = (site / f"{kind}s.html").read_text()
    for name in getattr(sdebench, f"{kind}_names")():
        item = getattr(sdebench, kind)(name)
        entry = page.partition(f'<section id="{name.replace("_", "-")}">')[2]
        entry = entry.partition("</section>")[0]
        assert f'id="sdebench.{kind}s.{name}.{type(item).__name__}"' in entry
        assert "<strong>Source:</strong>" in entry, name
        assert ("<math" in entry) == bool(item.formula), name
        for option in getattr(item, "parameters" if kind == "problem" else "options"):
            assert f"<strong>{option}</strong>" in entry, (name, option)


@needs_sphinx
def test_every_claim_has_its_verdict(site):
    page = (site / "claims.html").read_text()
    for name in claim_names():
        entry = page.partition(f'<section id="{name.replace("_", "-")}">')[2]
        assert "Verdict: <strong>" in entry.partition("</section>")[0], name


@needs_sphinx
def test_formulas_leave_no_latex(site):
    for page in site.glob("*.html"):
        formulas = re.findall(r"<math.*?</math>", page.read_text(), re.S)
        assert not [f for f in formulas if re.search(r"\\|<mi>&</mi>|merror", f)], page


@needs_sphinx
def test_every_command_has_its_entry(site):
    page = (site / "command_line.html").read_text()
    for name in cli.cli.commands:
        assert f"Usage: sdebench {name}" in page


@needs_sphinx
def test_a_broken_link_fails_the_build(tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    for name in ("conf.py", "extension.py"):
        (source / name).write_text((DOCS / name).read_text())
    (source / "_static").mkdir()
    (source / "index.md").write_text("# Title\n\n[gone](gone.md)\n")
    done = build(source, tmp_path)
    assert done.returncode != 0
    assert "gone.md" in done.stderr


# ---- the tutorial -------------------------------------------------------------------
@needs("nbclient", "ipykernel", "matplotlib")
@pytest.mark.timeout(900)  # the first run compiles the kernels
@pytest.mark.slow
def test_tutorial_runs_from_scratch(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=600, resources=resources)
    client.execute()  # raises if a cell does
    texts = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    good, broken = texts[-2:]
    assert "✓ unbiased" in good
    assert "✗" not in good
    assert broken.count("✗") == 1
    assert "✗ unbiased" in broken


@needs("nbformat")
def test_tutorial_is_stored_with_its_outputs():
    import nbformat

    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]


# ---- texts --------------------------------------------------------------------------
TEXTS = sorted([*DOCS.glob("*.md"), NOTEBOOK, *ROOT.glob("C*.md")])


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_commands_exist(path):
    for name in re.findall(r"(?<!from )\bsdebench ([a-z]+)(?=[ `])", path.read_text()):
        assert name in cli.cli.commands, f"{path.name}: sdebench {name}"


def test_contributing_fits_on_a_page():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


def test_changelog_has_this_version_and_what_comes():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.M)
    assert versions[0] == "Unreleased"
    version, _, date = versions[1].partition(" – ")
    assert version == sdebench.__version__
    datetime.date.fromisoformat(date)


@needs("yaml")
def test_citation_file_is_complete():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}  # of the format 1.2.0
    assert required <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert str(citation["version"]) == sdebench.__version__
    assert isinstance(citation["date-released"], datetime.date)
    assert all(author["name"] for author in citation["authors"])
    assert citation["abstract"]
    assert citation["keywords"]
    assert citation["license"] == "MIT"
