"""The frame of the studies: comparisons, files, page and command line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from sdebench import studies
from sdebench.cli import main
from sdebench.errors import ResultsError, UnknownNameError
from sdebench.experiments.experiment import exact
from sdebench.experiments.files import read_evidence
from sdebench.measure.intervals import Interval
from sdebench.studies._page import run, write_page
from sdebench.studies._study import (
    PUBLISHED,
    Study,
    agreement,
    compared,
    comparison_table,
    count_agreeing,
    text_of,
)


@dataclass(frozen=True)
class Toy(Study):
    """Two numbers beside ours."""

    subject: ClassVar[str] = "Numbers | beside ours."
    source: ClassVar[str] = "nobody"
    procedure: ClassVar[str] = "They are given."

    called: str = "toy"
    drawn: bool = True

    @property
    def name(self) -> str:
        return self.called

    def experiment(self, seed, progress):
        progress(1, 1)
        if self.called == "broken":
            raise RuntimeError("no number")
        return pd.DataFrame(
            [
                compared("one", "0.3830", exact(0.38304), PUBLISHED),
                compared("two", "2.0", Interval(2.3, 2.2, 2.4)),
            ]
        )

    def summary(self, evidence):
        return f"{count_agreeing(evidence)} of {len(evidence)} agree."

    def figure(self, evidence):
        from sdebench.report.style import new_figure

        if not self.drawn:
            return None
        figure = new_figure(2.0, 1.0)
        figure.subplots().plot(evidence["value"])
        return figure


def no_progress(done: int, total: int) -> None:
    pass


# ---- studies by name ---------------------------------------------------------------
def test_every_file_is_a_study():
    folder = Path(studies.__file__).parent
    stems = {f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")}
    assert set(studies.study_names()) == stems >= {"path_kl", "mixed_sampling"}


@pytest.mark.parametrize("name", studies.study_names())
def test_a_study_says_what_it_is(name):
    study = studies.study(name.replace("_", "-"))
    assert study.name == name
    for text in (study.subject, study.source, study.procedure):
        assert len(text) > 30
    assert not study.source.endswith(".")


def test_an_unknown_study_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean path_kl"):
        studies.study("path_lk")


# ---- comparisons -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("printed", "ours", "said"),
    [
        ("0.383", exact(0.38258), "equal"),
        ("0.383", exact(0.3835), "equal"),
        ("0.383", exact(0.3836), "+6.0 × 10⁻⁴"),
        ("0.3830", exact(0.38258), "−4.2 × 10⁻⁴"),
        ("-1.5", exact(-1.46), "equal"),
        ("1.5", exact(-1.5), "−3"),
        ("0", exact(0.0), "equal"),
        ("0.90", Interval(0.95, 0.906, 1.0), "outside, +0.050"),
        ("0.90", Interval(0.95, 0.904, 1.0), "inside"),
        ("0.90", Interval(0.85, 0.8, 0.894), "outside, −0.050"),
        ("0.90", Interval(0.85, -inf, inf), "inside"),
    ],
)
def test_agreement(printed, ours, said):
    assert agreement(printed, ours) == said


@pytest.mark.parametrize(
    ("printed", "ours", "text"),
    [
        ("0.383", exact(0.38258), "0.3826"),
        ("12", exact(12.34), "12.3"),
        ("0.0", exact(0.0), "0 (exact)"),
        ("0.9375", Interval(0.9375, 0.9355, 0.9394), "0.9375 [0.9355, 0.9394]"),
        ("0.00", Interval(0.001, -0.0123, 0.0141), "0.0010 [-0.0123, 0.0141]"),
    ],
)
def test_our_numbers_as_texts(printed, ours, text):
    assert text_of(ours, printed) == text


def test_the_table_has_all_rows():
    table = comparison_table(Toy().experiment(0, no_progress))
    assert table.to_dict("records") == [
        {
            "quantity": "one",
            "source": "0.3830 (published)",
            "ours": "0.38304",
            "agreement": "equal",
        },
        {
            "quantity": "two",
            "source": "2.0 (derived)",
            "ours": "2.30 [2.20, 2.40]",
            "agreement": "outside, +0.30",
        },
    ]


# ---- files and page ---------------------------------------------------------------
def test_files_and_page_agree(tmp_path):
    outcome = run(Toy(), tmp_path, 7, no_progress)
    stored = json.loads((tmp_path / "toy.json").read_text("utf-8"))
    assert stored == outcome.record
    assert stored["sentence"] == "1 of 2 agree."
    assert outcome.figure == tmp_path / "toy.png"
    page = write_page(tmp_path).read_text("utf-8")
    assert r"| [toy](#toy) | Numbers \| beside ours. |" in page
    assert "| one        | 0.3830 (published) | 0.38304" in page
    links = re.findall(r"\]\((\w+\.\w+)\)", page)
    assert set(links) == {f"toy.{form}" for form in ("png", "svg", "pdf", "csv")}
    assert all((tmp_path / link).is_file() for link in links)
    evidence = read_evidence(tmp_path / "toy.csv")
    assert comparison_table(evidence).to_dict("records") == stored["table"]


def test_every_file_carries_the_command(tmp_path):
    command = "sdebench studies toy --seed 7"
    run(Toy(), tmp_path, 7, no_progress)
    assert (tmp_path / "toy.csv").read_text("utf-8").startswith(f"# {command}\n")
    for form in ("png", "svg", "pdf"):
        assert command.encode() in (tmp_path / f"toy.{form}").read_bytes()
    assert f"`{command}`" in write_page(tmp_path).read_text("utf-8")


def test_the_same_seed_gives_the_same_files(tmp_path):
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        run(Toy(), folder, 0, no_progress)
        write_page(folder)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert len(written[0]) == 6


def test_a_study_may_have_no_figure(tmp_path):
    outcome = run(Toy(drawn=False), tmp_path, 0, no_progress)
    assert outcome.figure is None
    page = write_page(tmp_path).read_text("utf-8")
    assert "![toy]" not in page
    assert "figure" not in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "toy.csv",
        "toy.json",
    }


def test_a_strange_record_is_refused(tmp_path):
    (tmp_path / "toy.json").write_text("{", "utf-8")
    with pytest.raises(ResultsError, match=r"toy\.json .*sdebench studies"):
        write_page(tmp_path)


# ---- command line -----------------------------------------------------------------
@pytest.fixture
def toys(monkeypatch) -> dict[str, Toy]:
    found: dict[str, Any] = {name: Toy(called=name) for name in ("broken", "toy")}
    monkeypatch.setattr(studies, "study_names", lambda: sorted(found))
    monkeypatch.setattr(studies, "study", found.__getitem__)
    return found


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["studies", *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.usefixtures("toys")
def test_the_sentence_is_printed(tmp_path, capsys):
    assert command("toy", "--out", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["toy: 1 of 2 agree.", f"  {tmp_path / 'toy.png'}"]
    assert str(tmp_path / "README.md") in err


@pytest.mark.usefixtures("toys")
def test_a_failed_study_does_not_stop_the_others(tmp_path, capsys):
    assert command("--json", "--folder", str(tmp_path), "--seed", "3") == 1
    broken, toy = json.loads(capsys.readouterr().out)
    assert broken == {"name": "broken", "error": "RuntimeError: no number"}
    assert (toy["seed"], toy["figure"]) == (3, str(tmp_path / "toy.png"))


def test_the_list_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("--list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["study"] for row in listed] == studies.study_names()
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_a_users_error(capsys):
    assert command("path-k") == 2
    assert "did you mean path_kl?" in capsys.readouterr().err
