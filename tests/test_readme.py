"""What the README shows works as it stands, and says what the results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import sdebench

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)


def block(marker):
    (found,) = [text for text in BLOCKS if marker in text]
    return found


def test_the_estimator_passes(tmp_path):
    path = tmp_path / "fixed_baseline.py"
    text = block("class FixedBaseline")
    path.write_text(text)
    settings = {"problems": "brownian_linear", "paths": 0.25, "time_limit": None}
    assert sdebench.check_estimator(str(path), **settings).passed
    last = "            total = total + view.control_parameter_vjp(n, x, w)"
    assert last in text
    path.write_text(re.sub(f"{re.escape(last)}[^\n]*\n", "", text))
    with pytest.raises(sdebench.ValidationError, match="biased in"):
        sdebench.check_estimator(str(path), **settings)


def test_the_problem_passes(tmp_path):
    path = tmp_path / "brownian_quadratic.py"
    path.write_text(block("class BrownianQuadratic"))
    assert sdebench.check_problem(str(path)).passed


def test_the_problem_from_a_value_function_passes(tmp_path):
    path = tmp_path / "cosine_well.py"
    path.write_text(block("class CosineWell"))
    names = ("HJB equation", "terminal condition", "coefficient tables")
    report = sdebench.check_problem(str(path), only=names)
    assert {c.status for c in report.checks} <= {"passed", "note"}
    assert sdebench.measure(str(path), "pathwise", n_replicates=4).status == "ok"


def test_the_python_example_runs():
    names = {}
    exec(block("problem.truth.log_normalizer()"), names)
    assert names["result"].verdict == "discretization bias only"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results/claims").glob("*.json")), ids=lambda p: p.stem
)
def test_every_claim_is_listed_with_its_verdict(path):
    verdict = json.loads(path.read_text("utf-8"))["verdict"]
    line = re.search(
        rf"^- \[[^]]*\]\([^)]*#{path.stem}\).*?(?=^-|^$)", README, re.M | re.S
    )
    assert line, path.stem
    assert f"**{verdict}**" in line[0]


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    missing = [link for link in links if "://" not in link]
    assert [link for link in missing if not (ROOT / link).exists()] == []
