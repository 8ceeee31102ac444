"""`why --against`: the difference of two keys, against loops over terms that NumPy made."""

from __future__ import annotations

import json
import types
from collections import defaultdict

import folders
import jax
import naive
import numpy as np
import pytest
import tiny
from qk_places import FOUR, places
from test_why import identities
from tiny import within

import qkattr
from qkattr.analyses.why import why
from qkattr.cli.main import main
from qkattr.qk.why import competition

#: Of the largest |row| or of a sum of |rows|: the weights against NumPy's.
ROW = 2e-5
#: Of the absolute sum: float32 sums, made in another order.
SUM = 2e-5
IDS = [0, 40, 41, 42, 40, 43]
LAYER, HEAD, QUERY, KEY, OTHER = 1, 2, 5, 1, 4


@pytest.mark.parametrize("house", FOUR)
@pytest.mark.parametrize("b", range(tiny.L))
def test_rows_of_a_difference_equal_a_loop(house, b):
    case = tiny.case(house)
    (weights, x, parts), cfg = case.block(b), case.cfg.block
    seen = naive.run_block(weights, np.asarray(x), cfg)
    vectors, identity, compared = np.asarray(parts.vectors()), identities(parts), 0
    for head, query, key in places(weights, len(x)):
        other = key - 1 if key else query
        if other == key or query - other >= int(weights.window):
            continue
        found = jax.device_get(
            competition(
                weights, x, parts, identity, head=head, query=query, key=key, other=other,
                form="difference", top=30, cfg=cfg,
            )
        )  # fmt: skip
        q = naive.qk_vectors(weights, seen, cfg, vectors[query], head, query, "query")
        slots = vectors.shape[1]
        rows, net = np.zeros((slots, len(x), slots)), np.zeros((slots, identity.size))
        for s, sign in ((key, 1.0), (other, -1.0)):
            raw = seen.scores[head, query, s]
            ratio = float(naive.cap(raw, cfg)) / raw
            k = naive.qk_vectors(weights, seen, cfg, vectors[s], head, s, "key")
            for a in range(slots):
                for c in range(slots):
                    rows[a, s, c] = sign * ratio * cfg.scale * float(q[a] @ k[c])
                    net[a, identity[s, c]] += rows[a, s, c]
        largest, total = np.abs(rows).max(), np.abs(rows).sum()
        scores = naive.cap(seen.scores[head, query, [key, other]], cfg)
        within("value", found.value, scores[0] - scores[1], ROW, total)
        within("sum", found.total, found.value, ROW, total)
        assert found.entropy == 0
        within("by query", found.by_query_A, rows.sum((1, 2)), ROW, total)
        within("by component", found.by_component_SC, rows.sum(0), ROW, total)
        for sign, listed in ((1, found.pushes), (-1, found.pulls)):
            ranked = np.sort((sign * rows).ravel())[::-1][:30]
            within("rows", sign * listed.value, ranked, ROW, largest)
        for sign, listed in ((1, found.net_pushes), (-1, found.net_pulls)):
            ranked = np.sort((sign * net).ravel())[::-1][:30]
            within("pairs", sign * listed.value, ranked, ROW, largest)
        compared += 1
    assert compared > 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("against")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return root


@pytest.fixture(scope="module")
def result(root):
    result = qkattr.trace(qkattr.load(root / "model", root / "saes"), IDS, qk=0)
    result.save(root / "result")
    return result


def found_at(result, **options):
    return why(result, layer=LAYER, head=HEAD, query=QUERY, key=KEY, top=4096, **options)


def name(side):
    return side["kind"], side["index"]


@pytest.mark.parametrize("other", [OTHER, 0, 3, QUERY])
def test_pairs_are_those_of_one_key_less_those_of_the_other(result, other):
    """Against `qk_attribution` at either key, added up in a loop."""
    found = found_at(result, against=other)
    net, total, scores = defaultdict(float), 0.0, []
    for key, sign in ((KEY, 1), (other, -1)):
        qk = qkattr.qk_attribution(result, layer=LAYER, head=HEAD, query=QUERY, key=key)
        scores.append(qk.score)
        for pair in qk.pairs:
            net[name(pair["query"]), name(pair["key"])] += sign * pair["value"]
            total += abs(pair["value"])
    assert found.form == "difference" and found.against == other and found.entropy == 0
    within("value", found.value, scores[0] - scores[1], SUM, total)
    within("sum", found.sum, found.value, SUM, total)
    listed = {(name(r["query"]), name(r["key"])): r["value"] for r in found.pushes + found.pulls}
    for pair, value in net.items():
        within("pair", listed.get(pair, 0.0), value, SUM, total)
    assert {k["position"] for k in found.keys} == {KEY, other}
    assert {k["weight"] for k in found.keys} == {1.0, -1.0}
    assert all(set(r["at"]) <= {KEY, other} for r in found.pushes + found.pulls + found.features)
    assert {r["at"] for r in found.row_pushes + found.row_pulls} <= {KEY, other}
    within("features", sum(f["value"] for f in found.features), found.sum, SUM, total)
    assert found.versus == []


def test_the_other_way_round_is_the_negative(result):
    one = found_at(result, against=OTHER)
    two = why(result, layer=LAYER, head=HEAD, query=QUERY, key=OTHER, against=KEY, top=4096)
    assert one.value == pytest.approx(-two.value, rel=1e-5)
    pushes, pulls = ([r["value"] for r in rows] for rows in (one.pushes, two.pulls))
    np.testing.assert_allclose(pushes, [-v for v in pulls], rtol=1e-4, atol=1e-6)


def test_it_is_what_versus_says(result):
    for row in found_at(result).versus:
        two = found_at(result, against=row["key"])
        assert two.value == pytest.approx(row["log_ratio"], rel=1e-5)
        assert two.pushes[0]["value"] == pytest.approx(row["pushes"][0]["value"], rel=1e-5)


def test_without_it_nothing_changes(result):
    found = found_at(result)
    assert found.against is None and found.form == "odds" and found.versus
    assert len(found.keys) == QUERY + 1


@pytest.fixture
def run(root, result, capsys, monkeypatch):
    monkeypatch.chdir(root)
    prompt = (",".join(map(str, IDS)), "--ids", "-m", "model", "-s", "saes")
    place = ("--layer", LAYER, "--head", HEAD, "--query", QUERY, "--key", KEY)

    def call(*more, subject=prompt):
        code = main(["why", *subject, *map(str, place), *map(str, more)])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("subject", [None, ("./result",)])
def test_the_command(run, subject):
    given = {} if subject is None else dict(subject=subject)
    code, out, _ = run("--against", OTHER, "--json", **given)
    found = json.loads(out)
    assert code == 0 and (found["against"], found["form"]) == (OTHER, "difference")
    assert len(found["keys"]) == 2
    code, out, _ = run("--against", -2, **given)
    said = " ".join(out.split())
    assert code == 0 and "Its score less that of" in said and "over both keys" in said
    assert " and not" not in said and "entropy" not in said


def test_the_figure(run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures are an extra")
    figure = tmp_path / "f.svg"
    assert run("--against", OTHER, "--figure", figure)[0] == 0
    assert "its score less that of" in figure.read_text()


@pytest.mark.parametrize("subject", [None, ("./result",)])
@pytest.mark.parametrize(
    "more, said",
    [
        (("--against", KEY), "which is the key itself; give another position"),
        (("--against", "zebra"), "no token 'zebra'"),
        (("--against", 9), "position 9"),
        (("--query", 3, "--against", 5), "does not see the other key"),
        (("--against", OTHER, "--form", "log"), "form log weighs all keys, and against"),
    ],
)
def test_what_is_refused(run, more, said, subject):
    code, out, err = run(*more, **({} if subject is None else dict(subject=subject)))
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_a_key_outside_the_window_is_refused():
    from qkattr.analyses.why import other_key
    from qkattr.errors import InputError

    facts = types.SimpleNamespace(windows=[3])
    asked = types.SimpleNamespace(tokens=list("abcdef"), facts=facts, position=int)
    assert other_key(asked, (0, 0, 5, 4), 3) == 3
    with pytest.raises(InputError, match="give a position from 3 to 5"):
        other_key(asked, (0, 0, 5, 4), 2)
