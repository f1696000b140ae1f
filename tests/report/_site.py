"""A small site of made-up measurements, with the odd rows that a real one may have."""

import pandas as pd

from sdebench.report.site import write_site

HOSTILE = "renamed:<b>&\"'=1"


def measured(frame):
    """Return 2 known problems, one with unknown parameters and one renamed."""
    chosen = frame[
        frame.problem.isin(["brownian_linear", "two_modes", "damped_oscillator"])
        & frame.estimator.isin(["pathwise", "reinforce", "path_importance_sampling"])
    ].copy()
    chosen["problem_label"] = chosen.problem.replace(
        {"two_modes": "two_modes:beta=0.1"}
    )
    chosen["estimator_label"] = chosen.estimator
    chosen["default_steps"] = chosen.n_steps
    chosen["estimator_options"] = "{}"
    # The rows of a baseline each have different options: keep one per estimator.
    keys = ["problem", "estimator", "point"]
    chosen = chosen.drop_duplicates(keys)
    renamed = chosen[chosen.problem == "two_modes"].copy()
    renamed["problem"] = "renamed"
    renamed["problem_label"] = HOSTILE
    renamed["scale"] = 0.0  # so that its numbers are absolute
    refused = frame[(frame.status != "ok") & (frame.estimator == "pathwise")].head(1)
    names = {c: renamed[c].iloc[0] for c in ("problem", "problem_label")}
    refused = refused.assign(**names, estimator_label=refused.estimator)
    out = pd.concat([chosen, renamed, refused], ignore_index=True)
    out.attrs["command"] = "sdebench run quick --seed 7 --problem 'a<b'"
    return out


def make(frame, tmp_path_factory):
    """Return the folder of the site of `measured`, written once in a session."""
    folder = tmp_path_factory.getbasetemp() / "site"
    if not (folder / "index.html").exists():
        write_site(measured(frame), folder)
    return folder
