import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from _site import HOSTILE, make, measured
from click.testing import CliRunner

import sdebench
from sdebench import registry, store
from sdebench.cli import cli
from sdebench.errors import ParameterError, ResultsError
from sdebench.report import headline, site, site_pages, summary
from sdebench.report.format import plain
from sdebench.report.site_pictures import problem_figure
from sdebench.report.site_rows import file_names
from sdebench.report.site_svg import _luminance, inline, themed
from sdebench.report.site_text import answers, breakable, linked, mathml, parameters
from sdebench.report.style import looks, new_figure, style
from sdebench.report.table import COLUMNS, best_rows

SUBJECTS = [registry.problem(n) for n in registry.problem_names()]
SUBJECTS += [registry.estimator(n) for n in registry.estimator_names()]


class Page(HTMLParser):
    """What the tests ask of a page: its tags with attributes, rows and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.rows, self.bold, self.words = [], [], 0, []
        self.source = path.read_text(encoding="utf-8")
        self._in_cells = False
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "table":
            self._in_cells = attributes.get("id") == "cells"
        elif tag == "tr" and self._in_cells:
            self.rows.append((attributes.get("class", "").split(), []))
        elif tag in ("td", "th") and self._in_cells:
            self.rows[-1][1].append([attributes.get("data-v"), ""])
        elif tag == "b" and self._in_cells:
            self.bold += 1

    def handle_data(self, data):
        self.words.append(data)
        if self._in_cells and self.rows and self.rows[-1][1]:
            self.rows[-1][1][-1][1] += data.strip()

    def handle_endtag(self, tag):
        if tag == "table":
            self._in_cells = False

    def values(self, name):
        return [a[name] for _, a in self.tags if name in a]


@pytest.fixture(scope="module")
def folder(frame, tmp_path_factory):
    return make(frame, tmp_path_factory)


@pytest.fixture(scope="module")
def pages(folder):
    return {path.name: Page(path) for path in folder.glob("*.html")}


# ---- formulae ----------------------------------------------------------------------
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_every_catalogue_file_has_a_formula_that_converts(subject):
    assert subject.formula, f"give {subject.name} a class attribute `formula`"
    root = ElementTree.fromstring(mathml(subject.formula))
    assert root.tag.endswith("math")
    assert root.get("display") == "block"
    words = "".join(root.itertext())
    assert not re.search(r"[\\&{}$]", words), words
    # Each line of the formula is a row of a table.
    rows = list(root.iter("{http://www.w3.org/1998/Math/MathML}mtr"))
    assert len(rows) >= subject.formula.count(r"\\")


def test_a_formula_that_does_not_convert_is_an_error_that_shows_it():
    with pytest.raises(ParameterError, match=r"x_a_b.*cannot be converted"):
        mathml("x_a_b")


@pytest.mark.parametrize("text", [r"\text{<b>}", r"\text{<b>a</b>}"])
def test_a_formula_with_markup_in_it_is_refused(text):
    with pytest.raises(ParameterError, match="cannot be converted"):
        mathml(text)


# ---- pages -------------------------------------------------------------------------
def test_there_is_a_page_for_every_problem_and_estimator(pages):
    assert set(pages) == {
        "index.html",
        "problem-brownian_linear.html",
        "problem-two_modes-beta-0.1.html",
        "problem-damped_oscillator.html",
        "problem-renamed-b-1.html",
        "estimator-pathwise.html",
        "estimator-reinforce.html",
        "estimator-path_importance_sampling.html",
    }


def test_every_link_resolves_and_ids_are_unique(pages):
    ids = {name: page.values("id") for name, page in pages.items()}
    seen = 0
    for name, page in pages.items():
        assert len(ids[name]) == len(set(ids[name])), name
        for tag, attributes in page.tags:
            link = attributes.get("href")
            if link is None or link.startswith(("https://arxiv.org/abs/", "data:,")):
                continue
            file, _, place = link.partition("#")
            assert (file or name) in pages, (name, link)
            assert not place or place in ids[file or name], (name, tag, link)
            seen += 1
        for place in re.findall(r"url\(#([^)]+)\)", page.source):
            assert place in ids[name]
    assert seen > 100


def test_pages_load_nothing_from_elsewhere(pages):
    for page in pages.values():
        policy = [a for t, a in page.tags if t == "meta" and "http-equiv" in a]
        assert policy[0]["content"].startswith("default-src 'none'")
        assert not {"link"} & {t for t, a in page.tags if a.get("rel") == "stylesheet"}
        assert not [s for s in page.values("src") if not s.startswith("data:")]
        assert not re.search(r"@import|@font-face|url\((?!#)", page.source)
        source = re.sub(r"data:image/png;base64,[^\"]*", "", page.source)
        outside = re.findall(r"(?:https?:)?//[\w.]+\w/[^\s\"'<]*", source)
        allowed = ("https://arxiv.org/abs/", "http://www.w3.org/")
        assert all(o.startswith(allowed) for o in outside), outside


def test_names_are_escaped(pages):
    assert all(HOSTILE not in page.source for page in pages.values())
    words = "".join(pages["problem-renamed-b-1.html"].words)
    assert HOSTILE in words


def test_what_is_not_in_the_catalogue_has_its_numbers_and_says_so(pages):
    for name in ("problem-renamed-b-1.html", "problem-damped_oscillator.html"):
        page = pages[name]
        assert "is not in the catalogue of this version" in page.source
        assert "Exact answers" not in page.source
        assert "<math" not in page.source
        assert len(page.rows) > 4
    assert "<math" in pages["problem-brownian_linear.html"].source


def test_what_was_not_measured_is_counted_and_shown_with_its_reason(pages):
    index = pages["index.html"]
    words = " ".join(" ".join(index.words).split())
    assert "not applicable: the reward | tilt has no gradient" in words
    assert re.search(r"<b>1</b> not applicable", index.source)
    refused = [entries for kind, entries in index.rows[1:] if "refused" in kind]
    assert len(refused) == 1
    assert not any(value for value, _ in refused[0][4:])


def test_the_foot_says_what_made_the_numbers(pages):
    for page in pages.values():
        words = "".join(page.words)
        assert "sdebench run quick --seed 7 --problem 'a<b'" in words
        for text in ("3f2c91ab40", "AMD EPYC 7B13, 2 cores", "2025-11-23", "0.1.0"):
            assert text in words


def test_the_index_holds_every_cell_and_marks_the_short_form(frame, pages):
    measurements = measured(frame)
    (_, head), *rows = pages["index.html"].rows
    keys = pages["index.html"].values("data-key")
    assert len(head) == len(keys)
    assert len(rows) == len(measurements)
    assert sum("short" in kind for kind, _ in rows) == len(headline(measurements)) > 0
    cells = summary(measurements).to_dict("records")
    for cell, (_, entries) in zip(cells, rows, strict=True):
        for key, (_, text) in zip(keys, entries, strict=True):
            if cell["status"] == "ok" or not COLUMNS[key].numeric:
                assert text == COLUMNS[key].text(cell).strip()


def test_numbers_sort_by_what_they_show(frame, pages):
    page = pages["index.html"]
    place = page.values("data-key").index("bias")
    cells = summary(measured(frame)).to_dict("records")
    limits = 0
    for cell, (_, entries) in zip(cells, page.rows[1:], strict=True):
        value, text = entries[place]
        if cell["relative_bias"] != cell["relative_bias"]:
            assert value is None
            continue
        limit = cell["relative_bias_low"] <= 0.0
        shown = cell["relative_bias_high" if limit else "relative_bias"]
        assert float(value.rstrip("a")) == pytest.approx(shown, rel=1e-5)
        assert value.endswith("a") == bool(cell["absolute"])
        limits += text.startswith("<")
    assert limits > 0


def test_bold_is_what_the_tables_mark(frame, pages):
    cells = summary(measured(frame)).to_dict("records")
    best = [best_rows(cells, column) for column in COLUMNS.values()]
    assert pages["index.html"].bold == sum(map(len, best)) > 0
    problems = [n for n in pages if n.startswith("problem")]
    assert sum(pages[n].bold for n in problems) == pages["index.html"].bold


def test_pages_stay_small(folder):
    assert max(p.stat().st_size for p in folder.glob("*.html")) < 500_000


def test_the_index_is_written_last(folder):
    newest = max(folder.glob("*.html"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "index.html"


def test_file_names_are_safe_and_all_different():
    names = ["a:b=1", "a:b=1.0", "A:B=1", "a b 1", "../../etc", "ä", "β"]
    found = file_names("problem", names)
    assert len({v.lower() for v in found.values()}) == len(names)
    for name in found.values():
        assert re.fullmatch(r"problem-[A-Za-z0-9_.-]*\.html", name)


# ---- the folder --------------------------------------------------------------------
def some(frame):
    return measured(frame).head(2)


def test_a_folder_with_other_files_is_refused(frame, tmp_path):
    (tmp_path / "thesis.tex").write_text("two years of work")
    with pytest.raises(ResultsError, match="holds files that are not a report"):
        site.write_site(some(frame), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ResultsError, match="is a file; give a folder"):
        site.write_site(some(frame), tmp_path / "thesis.tex")


def test_no_rows_are_an_error(frame, tmp_path):
    with pytest.raises(ResultsError, match="no results to report"):
        site.write_site(frame.head(0), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_the_old_index_and_a_second_try_works(
    frame, tmp_path, monkeypatch
):
    rendered = []

    def render(pages):
        rendered.append(pages)
        text = f"version {len(rendered)}"
        return {"problem-a.html": text, "estimator-b.html": text, "index.html": text}

    monkeypatch.setattr(site, "_render", render)
    index = site.write_site(some(frame), tmp_path / "out")
    assert index.read_text() == "version 1"
    replace = site.Path.replace

    def full(self, target):
        if "estimator" in self.name:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(site.Path, "replace", full)
        with pytest.raises(ResultsError, match="No space left on device; free some"):
            site.write_site(some(frame), tmp_path / "out")
    assert index.read_text() == "version 1"
    site.write_site(some(frame), tmp_path / "out")
    assert index.read_text() == "version 3"


def test_the_command_writes_the_site_and_prints_its_first_page(
    frame, tmp_path, monkeypatch
):
    rows = some(frame).head(1).to_dict("records")
    for i, row in enumerate(rows):
        store.write(store.cell_file(tmp_path / "quick", f"cell{i}"), row)
    opened = []
    monkeypatch.setattr("click.launch", opened.append)
    done = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    index = tmp_path / "report" / "index.html"
    assert done.output.strip() == str(index)
    assert "pathwise" in index.read_text(encoding="utf-8")
    assert not opened
    monkeypatch.setattr(site, "_render", lambda pages: {"index.html": ""})
    done = CliRunner().invoke(
        cli, ["report", str(tmp_path), "-o", str(tmp_path / "there"), "--open"]
    )
    assert opened == [str(tmp_path / "there" / "index.html")]
    done = CliRunner().invoke(cli, ["report", str(tmp_path / "nothing")])
    assert isinstance(done.exception, ResultsError)


# ---- exact answers, words ----------------------------------------------------------
def test_answers_are_the_truth_with_reasons_for_the_gaps():
    problem = sdebench.problem("gaussian_tilt")
    found = answers(problem)
    first = found.groups[0][1][0]
    assert first.quantity == "log Z"
    assert first.continuous == plain(problem.truth.log_normalizer(), 8)
    assert first.discrete == plain(problem.truth.log_normalizer(n_steps=50), 8)
    assert [g[0].partition(",")[0] for g in found.groups[1:]] == list(problem.points)
    gradient = dict(found.groups)["halfway, θ = (0.500, 0.500)"][1].continuous
    exact = [plain(v, 8) for v in problem.truth.gradient("halfway").tolist()]
    assert gradient == f"({', '.join(exact)})"
    assert not found.reasons

    found = answers(sdebench.problem("four_modes"))
    log_z = found.groups[0][1][0]
    assert log_z.discrete == "not exact (1)"
    assert "has no closed law" in found.reasons[0]
    assert len(found.reasons) == len(set(found.reasons)) == 2


def test_sources_link_to_arxiv():
    spans = linked("Someone 2023, arXiv:2312.02027, section 4; arXiv:1505.01874")
    assert "".join(s.text for s in spans).endswith("arXiv:1505.01874")
    assert [s.address for s in spans if s.address] == [
        "https://arxiv.org/abs/2312.02027",
        "https://arxiv.org/abs/1505.01874",
    ]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_parameters_come_with_their_meaning(subject):
    values = getattr(subject, "parameters", None) or getattr(subject, "options", {})
    for entry in parameters(subject, values):
        assert entry.meaning, entry.name
        assert entry.value == str(values[entry.name])


def test_labels_may_break_at_their_options_only():
    assert breakable("a:b=<1") == "a:<wbr>b=&lt;1"


# ---- pictures ----------------------------------------------------------------------
def contrast(one, other):
    """Return the contrast of two relative luminances, 1 to 21."""
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)


def dark_luminance(color):
    other = re.fullmatch(rf"light-dark\({color},(#\w{{6}})\)", themed(color))[1]
    return _luminance([int(other[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_colors_of_figures_can_be_read_on_the_dark_page():
    page = dark_luminance("#ffffff")
    assert page == pytest.approx(_luminance([0x17 / 255] * 3))
    names = [*registry.estimator_names(), "reinforce:baseline=mean", "another"]
    for look in looks(names).values():
        for color in (look.color, look.ink):
            assert contrast(dark_luminance(mpl.colors.to_hex(color)), page) >= 4.5
    for gray in ("#000000", "#262626", "#595959"):
        assert contrast(dark_luminance(gray), page) >= 4.5


def test_a_figure_becomes_svg_in_theme_colors_with_ids_of_its_own():
    with style():
        figure = new_figure(3, 2)
        axes = figure.subplots()
        axes.plot([1.0, 2.0], [1.0, 3.0], "o-", color="#0173b2", label="<one>")
        axes.set_xlabel("t")
        axes.legend()
    one, two = (inline(figure, name, 'a "b" <c>') for name in ("one", "two"))
    root = ElementTree.fromstring(one.replace("xlink:", ""))
    assert root.get("aria-label") == 'a "b" <c>'
    assert root.get("role") == "img"
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    bare = re.sub(r"light-dark\(#\w{6},#\w{6}\)", "", one)
    assert not re.search(r"[ :]#[0-9a-f]{6}\b", bare)
    assert "light-dark(#0173b2," in one
    assert "<text" in one


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("two_modes", "does not reach the ideal tilt"),
        ("brownian_linear", "the law of X_T under the base process and under u*."),
        ("ou_linear", "the direction in which the tilt moves the mean"),
        ("ou_quadratic_easy", "u*(x, t) along the first coordinate, on the line"),
        ("four_modes", "smallest regions that hold 50 and 95 %"),
    ],
)
def test_pictures_show_the_laws_and_say_what_is_shown(spec, words):
    figure, text = problem_figure(sdebench.problem(spec))
    assert words in text
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=50)
    assert ("ideal" in text) == (spec == "two_modes")


def test_the_density_that_is_drawn_is_the_exact_one():
    problem = sdebench.problem("brownian_linear")
    figure, _ = problem_figure(problem)
    base, tilted = figure.axes[2].lines
    for line, mean in ((base, 0.0), (tilted, 1.0)):
        density, x = line.get_data()
        exact = np.exp(-0.5 * (x - mean) ** 2) / np.sqrt(2.0 * np.pi)
        np.testing.assert_allclose(density, exact, atol=1e-9)
    values = figure.axes[0].images[0].get_array()
    assert np.all(values[..., 3] == 0.9)  # u* = 1 everywhere


def test_a_problem_without_a_density_has_no_picture(monkeypatch):
    problem = sdebench.problem("brownian_linear")

    def missing(time):
        raise sdebench.errors.NotExactError("no density")

    monkeypatch.setattr(problem.truth, "tilted_marginal", missing)
    assert site_pages._law(problem) is None


def test_very_many_rows_are_no_picture(frame, monkeypatch):
    """The index of a whole catalogue leaves them to the pages of the problems."""
    table = summary(frame[frame.point == "halfway"])

    def captions():
        found = site_pages._pictures(table, table, "all")
        return {picture.caption for picture in found}

    tall = {site_pages._CAPTIONS[name] for name in ("bias", "variance")}
    assert tall <= captions()
    monkeypatch.setattr(site_pages, "_MOST_ROWS", len(table) - 1)
    assert captions()
    assert not tall & captions()
