"""Run studies, keep their tables in a folder and write its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdebench.experiments import files
from sdebench.experiments.experiment import Progress
from sdebench.experiments.files import Outcome, markdown_table
from sdebench.report.format import markdown
from sdebench.studies._study import Study

FORMATS = ("png", "svg", "pdf")


def run(study: Study, folder: Path, seed: int, progress: Progress) -> Outcome:
    """Run a study and write its files into ``folder``.

    Raises
    ------
    ResultsError
        If the folder cannot be written.
    """
    evidence = study.experiment(seed, progress)
    figure = study.figure(evidence)
    record = files.complete(
        {
            "name": study.name,
            "subject": study.subject,
            "source": study.source,
            "procedure": study.procedure,
            "sentence": study.summary(evidence),
            "formats": list(FORMATS) if figure else [],
            "table": study.table(evidence).to_dict("records"),
        },
        seed,
    )
    command = files.command_of(record, "studies")
    return files.write(folder, record, evidence, figure, FORMATS, command)


def write_page(folder: Path) -> Path:
    """Write ``README.md`` from all records in ``folder``."""
    return files.write_page(folder, "studies", _page)


def _page(records: Sequence[dict[str, Any]]) -> str:
    overview = [
        {
            "study": f"[{record['name']}](#{record['name']})",
            "subject": markdown(record["subject"]),
        }
        for record in records
    ]
    parts = [
        "# Studies",
        "Numbers of papers beside ours, and curves without a source, made by "
        "`sdebench studies`. A source's number is *published*, printed or drawn in the "
        "paper, or *derived* from its "
        "formulae. Ours is exact, and then *equal* to the printed one up to its last "
        "digit or off by the difference said; or it is measured, and the printed one "
        "lies *inside* its interval or *outside*. All intervals of a study hold "
        "together with probability 99.9 %.",
        files.overview(overview),
        *(_section(record) for record in records),
    ]
    return "\n\n".join(parts) + "\n"


def _section(record: dict[str, Any]) -> str:
    name, formats = record["name"], record["formats"]
    links = ", ".join(f"[{form}]({name}.{form})" for form in formats[1:])
    figure = [f"![{name}]({name}.png)", f"The figure as {links}."] if formats else []
    return "\n\n".join(
        [
            f"## {name}",
            f"**{markdown(record['subject'])}**",
            markdown(record["sentence"]),
            *figure,
            markdown_table(record["table"]),
            f"*Source.* {markdown(record['source'])}.",
            f"*Experiment.* {markdown(record['procedure'])}",
            files.made_by(record, "studies"),
        ]
    )
