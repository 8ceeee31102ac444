"""Which rows of an attention score people are shown: bias, error and sink are folded, sinks and
features without a label are called by what is known of them."""

from __future__ import annotations

import dataclasses
import html
import re

import folders
import pytest
from tiny import within

import qkattr
from qkattr.analyses.why import why
from qkattr.cards.card import Card
from qkattr.cli.qk import show
from qkattr.export.effect_rows import away_from_sinks
from qkattr.export.html import page
from qkattr.export.summary import both_aucs, called
from qkattr.qk import rows as qk_rows

IDS = [0, 40, 41, 42, 40, 43]
PLACE = dict(layer=1, head=2, query=-1, key=1)
FOLDED = {"bias", "error", "sink"}
#: Sums of some hundred numbers, in another order.
SUMS = 1e-6


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return qkattr.trace(qkattr.load(root / "model", root / "saes"), IDS)


@pytest.fixture(scope="module")
def table(result):
    return qkattr.qk_attribution(result, **PLACE)


def has_folded(pair) -> bool:
    return bool({pair["query"]["kind"], pair["key"]["kind"]} & FOLDED)


def test_the_folded_line_is_the_sum_of_the_rows_left_out(table):
    left_out = [p["value"] for p in table.pairs if has_folded(p)]
    total = sum(abs(p["value"]) for p in table.pairs)
    assert left_out and len(left_out) < len(table.pairs)
    signed, absolute = qk_rows.folded_share(table.shares)
    within("signed", signed, sum(left_out), SUMS, total)
    within("absolute", absolute, sum(map(abs, left_out)) / total, SUMS)
    assert qk_rows.unfolded(table.pairs) == [p for p in table.pairs if not has_folded(p)]
    said = f"bias, sink and error: {signed:+.2f} of the score ({100 * absolute:.0f} % of the"
    assert qk_rows.folded_line(table.shares).startswith(said)
    for marginals in (table.query_marginals, table.key_marginals):
        folded = [m for m in marginals if m["kind"] in FOLDED]
        sums = qk_rows.folded_marginal(marginals)
        assert sums is not None
        for name in ("value", "contrast"):
            within(name, sums[name], sum(m[name] for m in folded), SUMS, total)


def test_qk_lists_the_rows_only_if_asked(table, capsys):
    show(table, 400)
    short = capsys.readouterr().out
    show(table, 400, all=True)
    long = capsys.readouterr().out
    assert re.search(r"^  bias  ", long, re.M) and "Bias, sink and error:" not in long
    assert not re.search(r"^  (bias|error)  ", short, re.M) and "Bias, sink and error:" in short
    assert "  bias, sink and error  " in short
    n = len(qk_rows.unfolded(table.pairs))
    assert short.count("feature ") < long.count("feature ")
    assert f"{table.pairs[-1]['value']:+.4f}" in long and n < len(table.pairs)


@pytest.mark.parametrize(
    "absolute, explains", [(0.05, True), (0.89, True), (0.91, False), (1.0, False)]
)
def test_it_is_said_where_features_explain_nothing(absolute, explains):
    shares = {
        "feature-feature": dict(signed=0.3, absolute=1 - absolute),
        "feature-bias": dict(signed=-1.0, absolute=absolute / 2),
        "error-sink": dict(signed=0.5, absolute=absolute / 2),
    }
    said = qk_rows.folded_line(shares)
    assert said.startswith(f"bias, sink and error: -0.50 of the score ({100 * absolute:.0f} %")
    assert ("do not explain the score" in said) != explains


def test_nothing_is_folded_where_there_is_nothing_to_fold():
    assert qk_rows.folded_line({"token-token": dict(signed=1.0, absolute=1.0)}) == ""
    assert qk_rows.folded_marginal([dict(kind="token", value=1.0, contrast=0.0)]) is None


def test_a_model_without_saes_is_not_explained(tmp_path, capsys):
    folders.write_model(tmp_path / "model", tokenizer=True)
    bundle = qkattr.load(tmp_path / "model")
    show(qkattr.qk_attribution(qkattr.subject(bundle, IDS), **PLACE), 20)
    said = capsys.readouterr().out
    assert "do not explain the score" in " ".join(said.split()) and "Pairs\n" not in said


def at_sink(table, position):
    """The table with its key a sink, at a position."""
    sink = dict(kind="sink", index=None, activation=None, label="")
    pairs = [{**p, "key": sink} for p in table.pairs[:5]]
    marginals = [dict(kind="sink", index=None, label="", value=1.0, contrast=1.0)]
    shares = {"feature-sink": dict(signed=table.score, absolute=1.0)}
    return dataclasses.replace(
        table, key=position, pairs=pairs, key_marginals=marginals, shares=shares
    )


@pytest.mark.parametrize(
    "position, said", [(0, "the first token"), (3, "the sink '"), (1, "the sink '")]
)
def test_a_head_that_rests_on_a_sink_says_so_instead_of_a_table(table, capsys, position, said):
    sunk = at_sink(table, position)
    assert qk_rows.rests_on(sunk).startswith(said) and qk_rows.rests_on(table) == ""
    show(sunk, 20)
    short = " ".join(capsys.readouterr().out.split())
    assert f"This head rests on {said}" in short and "Pairs" not in short
    show(sunk, 20, all=True)
    assert "Pairs" in capsys.readouterr().out


def test_the_page_has_no_tables_about_sinks(result, table):
    places = {"1.2.5.0": at_sink(table, 0), "1.2.5.1": table}
    shown = html.unescape(page(dataclasses.replace(result, qk=places)))
    assert shown.count("<h3>Head ") == 1 and "Not listed: bias, sink and error:" in shown
    panel = shown[shown.index('id="qk"') : shown.index('id="edges"')]
    assert "<bdi>bias</bdi>" not in panel and "<bdi>error</bdi>" not in panel
    only = html.unescape(page(dataclasses.replace(result, qk={"1.2.5.0": at_sink(table, 0)})))
    assert "<h3>Head " not in only


def test_heads_at_sinks_get_no_qk_attribution_and_are_counted_in_one_line(result):
    rows = result.head_effects()
    away = [r for r in rows if r["key"] not in result.sink_positions]
    assert 0 in result.sink_positions and 0 < len(away) < len(rows)
    places = [f"{r['layer']}.{r['head']}.{r['query']}.{r['key']}" for r in away[:8] if r["masking"]]
    assert list(result.qk) == places
    listed, folded = away_from_sinks(result, rows)
    assert listed == away and "a head looks at the first token" in folded
    assert f"{len(rows) - len(away):,} places" in folded and folded in html.unescape(page(result))


def test_without_sinks_no_place_is_folded(result):
    plain = qkattr.trace(result.subject.bundle, IDS, sinks=False)
    rows = plain.head_effects()
    assert away_from_sinks(plain, rows) == (rows, "") and "Not listed: " not in page(plain)[:20000]


def test_stored_pairs_are_enough_if_they_hold_the_strongest_without_bias(table):
    n = len(qk_rows.unfolded(table.pairs))
    cut = dataclasses.replace(table, pairs=table.pairs[:-1])
    left = len(qk_rows.unfolded(cut.pairs))
    assert qk_rows.enough_stored(table, n + 5)
    assert qk_rows.enough_stored(cut, left) and not qk_rows.enough_stored(cut, left + 1)
    assert qk_rows.enough_stored(dataclasses.replace(at_sink(table, 0), n_pairs=99), 20)


@pytest.mark.parametrize("form", ["odds", "log"])
def test_why_folds_before_it_takes_the_strongest(result, form):
    every = why(result, **PLACE, form=form, top=4000)
    short = why(result, **PLACE, form=form, top=4, folded=True)
    for name in ("pushes", "pulls", "row_pushes", "row_pulls"):
        expected = [row for row in getattr(every, name) if not has_folded(row)][:4]
        found = getattr(short, name)
        assert [(r["query"], r["key"]) for r in found] == [(r["query"], r["key"]) for r in expected]
        values = [[r["value"] for r in rows] for rows in (found, expected)]
        within(name, *values, SUMS)
    for name in ("query_side", "features"):
        listed = [r for r in getattr(every, name) if r["kind"] not in FOLDED][:4]
        assert [r["index"] for r in getattr(short, name)] == [r["index"] for r in listed]
    assert short.keys == every.keys and short.shares == every.shares and short.sum == every.sum
    assert any(has_folded(r) for r in every.pushes + every.pulls)


# What features are called


@pytest.mark.parametrize(
    "label, name",
    [
        ("unclear; e.g. ' Sue', ' Sally'", "strongest on ' Sue', ' Sally'"),
        ("rare; e.g. '12'", "strongest on '12'"),
        ("the word 'aunt' (when strong)", "the word 'aunt' (when strong)"),
        ("unclear", "unclear"),
        ("names; e.g. ' Sue'", "names; e.g. ' Sue'"),
        ("never active on this text", "never active on this text"),
    ],
)
def test_a_feature_that_no_rule_describes_is_called_by_its_tokens(label, name):
    assert called(label) == name


@pytest.mark.parametrize(
    "auc, strong, said",
    [
        (0.62, 0.95, "AUC 0.62 overall, 0.95 when strong"),
        (0.62, None, "AUC 0.62 overall"),
        (None, 0.95, "AUC 0.95 when strong"),
        (None, None, ""),
    ],
)
def test_every_auc_says_which_it_is(auc, strong, said):
    card = Card(
        boundary=1, index=0, label="x (when strong)", auc=auc, n=9, strong_auc=strong, strong_n=5,
        given=False, count=1, density=0.1, max=1.0, mean=0.5, histogram=[], examples=[],
        top_logits=[], bottom_logits=[],
    )  # fmt: skip
    assert both_aucs(card) == said
