"""docs/faithfulness.md says what the runs found: every table is written from their JSON."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from qkattr.load.text.prompts import read_prompts

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Each run's JSON, and the prompts that it is of.
RUNS = {
    "faithfulness.json": "faithfulness.toml",
    "faithfulness-other.json": "faithfulness-other.toml",
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("docs_faithfulness", DOCS / "faithfulness.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(script) -> str:
    return script.PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_runs(script, page):
    assert script.filled(page, script.read_reports()) == page


def test_every_table_is_on_the_page_once(script, page):
    assert sorted(re.findall(r"<!-- ([a-z ]+) -->", page)) == sorted(script.TABLES)


def test_a_changed_number_is_written_anew(script, page):
    reports = script.read_reports()
    reports[0]["heads"][0]["influence"]["mean"] = 7.25
    assert "7.25" in script.filled(page, reports).split("<!-- heads first -->")[1][:800]


@pytest.mark.parametrize("run, prompts", RUNS.items())
def test_the_runs_are_of_these_prompts(run, prompts):
    found = json.loads((DOCS / run).read_text(encoding="utf-8"))
    given = read_prompts(ROOT / "configs" / prompts)
    assert [p["text"] for p in found["prompts"]] == [p.prompt for p in given]
    assert len(given) >= 28


def test_the_other_prompts_are_of_other_kinds():
    """None is built like those of the first set: no title with a name, antonym, choice or gift."""
    style = r"\b(Aunt|Uncle|Mr|Mrs|Doctor|Professor|opposite|contraire|gave|handed)\b|\([A-D]\)"
    for prompt in read_prompts(ROOT / "configs" / "faithfulness-other.toml"):
        assert not re.search(style, str(prompt.prompt)), prompt.prompt


@pytest.mark.parametrize("run", RUNS)
def test_what_the_page_says_wins_does(run):
    """In both sets, others live: by rank, and where it is said by sign."""
    found = json.loads((DOCS / run).read_text(encoding="utf-8"))

    def mean(column: str, measure: str, by: str = "", ablation: str | None = None) -> float:
        rows = found["places"] if ablation is None else found["effects"]
        (row,) = [
            r for r in rows
            if (r["measure"], r["by"], r["others"], r["read"]) == (measure, by, "live", "logit")
            and r.get("ablation") == ablation
        ]  # fmt: skip
        return row[column]["mean"]

    masking = mean("rank", "masking", "jacobian")
    assert mean("rank", "masking", "live") > masking > mean("rank", "influence")
    assert masking > mean("rank", "derivative", "jacobian") > mean("rank", "attention")
    assert mean("sign", "masking", "live") > mean("sign", "masking", "jacobian")
    for ablation, name in (("zero", "effect"), ("mean", "less mean"), ("pattern", "masking")):
        at = dict(ablation=ablation)
        live, frozen = (mean("rank", name, by, **at) for by in ("live", "jacobian"))
        assert 0.8 <= live <= 0.955 and live > frozen + 0.2
        assert mean("sign", name, "live", **at) > mean("sign", name, "jacobian", **at)
        if ablation != "zero":
            masking = mean("rank", "masking", "jacobian", **at)
            assert masking > max(mean("rank", m, **at) for m in ("influence", "|loading|"))


def test_what_the_page_says_of_features_and_heads():
    first, other = (json.loads((DOCS / run).read_text(encoding="utf-8")) for run in RUNS)
    costs = []
    for found in (first, other):
        (row,) = [
            r for r in found["features"] if (r["side"], r["k"], r["scales"]) == ("key", 4, "live")
        ]
        costs += [round(row[c]["mean"], 2) for c in ("log_p_lost", "log_p_control")]
    assert costs == [0.89, 0.05, 0.15, 0.06]
    failed = [line for line in other["failures"] if "the 4 strongest key features" in line]
    assert len(failed) == 8 and len(other["prompts"]) == 28
    for row in (row for found in (first, other) for row in found["heads"] if row["n"] >= 4):
        others = max(row[order]["mean"] for order in ("influence", "loading", "attention"))
        assert row["effect"]["mean"] > others > 2 * row["random"]["mean"]
