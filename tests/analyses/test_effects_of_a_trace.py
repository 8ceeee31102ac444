"""The effects that `trace` hands out: account, nodes, heads, and the pairs behind a score."""

from __future__ import annotations

import json
import re

import folders
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import within

import qkattr
from qkattr.cli.main import app
from qkattr.errors import InputError
from qkattr.export.effect_rows import accounts, away_from_sinks
from qkattr.graph.accounts import ACCOUNT_COLUMNS
from qkattr.kinds import Kind
from qkattr.model.edits import BlockEdits, Edits, PatternEdits
from qkattr.model.transformer import forward
from qkattr.sharding import pad_tokens

PROMPT = "hi hi hi 12 hi"
ACCOUNT = 1e-4  # of the target, as the method asks
NODES = 2e-4  # of the largest sum of |effect|: six significant digits a node, a thousand of them
SAME = 5e-5  # of the largest: the same numbers by another program
STEP = 5e-3  # of the target: a float32 difference over a step of a thousandth, and second order
SHOWN = 2e-5  # of the largest: five digits
# Nothing is dropped; sinks would end the graph, and with them the constants behind them.
WHOLE = dict(keep=1.0, max_rows=4096, max_edges=4096, sinks=False)
TARGETS = {
    "logits": dict(max_logits=6, logit_mass=1.0),
    "difference": dict(contrast=("hi", "12")),
    "score": dict(score=(1, 1, 4, 2)),
    "logits and scores": dict(max_logits=2, logit_mass=1.0, through_qk=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("effects")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return root


@pytest.fixture(scope="module")
def bundle(folder):
    return qkattr.load(folder / "model", folder / "saes")


@pytest.fixture(scope="module", params=list(TARGETS))
def traced(request, bundle):
    return qkattr.trace(bundle, PROMPT, **TARGETS[request.param], **WHOLE)


@pytest.fixture(scope="module")
def graph(traced):
    return json.loads(json.dumps(traced.to_json(links=0)))


def targets_in(graph) -> dict[str, dict]:
    return {n["node_id"]: n for n in graph["nodes"] if n["kind"] in ("logit", "score")}


def test_the_account_has_a_row_a_target_and_boundary_that_sums_to_it(graph):
    targets, rows = targets_in(graph), graph["qkattr"]["account"]
    expected = {(name, b) for name, node in targets.items() for b in range(node["boundary"] + 1)}
    assert {(row["node"], row["boundary"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert set(row) == {"boundary", "node", "target", *ACCOUNT_COLUMNS}
        total = sum(row[name] for name in ACCOUNT_COLUMNS)
        within("account", total, row["target"], ACCOUNT, abs(row["target"]))
        node = targets[row["node"]]
        within("value", node["effect"], row["target"], SHOWN, abs(row["target"]))


def test_targets_are_what_the_model_computed(traced, graph, bundle):
    logits = np.asarray(qkattr.run(bundle, traced.token_ids)[0][-1], float)
    for target in graph["qkattr"]["targets"]:
        node = targets_in(graph)[target["node"]]
        if node["kind"] == "logit":
            said = next(p for p in traced.predictions if p["id"] == node["index"])
            less = logits.mean() if said["against"] < 0 else logits[said["against"]]
            expected = logits[node["index"]] - less
        else:
            block, head, query, key, _ = graph["qkattr"]["scores"][node["index"]]
            place = dict(layer=block, head=head, query=query, key=key)
            expected = qkattr.qk_attribution(traced, **place).score
        within("target", target["value"], expected, SAME, max(abs(expected), np.ptp(logits)))


def test_the_nodes_of_a_boundary_and_the_constants_above_add_up_to_each_target(graph):
    """From the file alone: nothing of the graph was dropped here."""
    targets = targets_in(graph)
    parts = [n for n in graph["nodes"] if n["node_id"] not in targets]
    for i, (_, target) in enumerate(targets.items()):
        effect = [n["effects"][i] if len(targets) > 1 else n["effect"] for n in parts]
        for b in range(target["boundary"]):
            counted = [
                e
                for n, e in zip(parts, effect, strict=True)
                if (n["boundary"] > b if n["kind"] == "const" else n["boundary"] == b)
            ]
            size = sum(abs(e) for e in counted)
            within(f"nodes at {b}", sum(counted), target["effect"], NODES, size)


def test_effects_are_on_the_main_target(traced, graph):
    if "effects" not in graph["nodes"][0]:
        assert len(graph["qkattr"]["targets"]) == 1
        return
    sides = 2 if traced.graph.nodes.kind[traced.graph.targets[0]] == Kind.SCORE else 1
    for node in graph["nodes"]:
        if node["node_id"] not in targets_in(graph):
            within("main", node["effect"], sum(node["effects"][:sides]), 1e-5,
                   max(map(abs, node["effects"])))  # fmt: skip


# Heads --------------------------------------------------------------------------------------------


def test_head_effects_of_a_query_are_what_the_heads_bring(traced):
    """Derivatives of a query's scores sum to 0, and are A (e - mean) of the effects A e."""
    rows = traced.head_effects(source=0, target=0) + traced.head_effects()
    rows += [r for t in range(1, 5) for r in traced.head_effects(source=t, target=t)]
    by_query: dict = {}
    for row in rows:
        by_query.setdefault((row["layer"], row["head"], row["query"]), {})[row["key"]] = row
    assert len(by_query) > 3
    size = max(abs(row["effect"]) for row in rows)
    for (_, _, query), keys in by_query.items():
        listed = [keys[s] for s in sorted(keys)]
        A, e, d = (
            np.array([row[k] for row in listed]) for k in ("probability", "effect", "derivative")
        )
        if len(listed) == query + 1:
            within("attention", A.sum(), 1.0, SAME)
            within("derivative", d, e - A * e.sum(), SAME, size)


@pytest.mark.parametrize("by", ["masking", "effect", "influence", "attention"])
def test_heads_are_ranked_between_two_positions(traced, by):
    rows = traced.head_effects(7, by=by)
    assert len(rows) == 7 and all(row["query"] != row["key"] for row in rows)
    name = "probability" if by == "attention" else by
    size = [abs(row[name]) for row in traced.head_effects(by=by)]
    assert size == sorted(size, reverse=True)
    flow = traced.head_loadings(source=rows[0]["key"], target=rows[0]["query"]).influence
    assert rows[0]["influence"] == pytest.approx(flow[rows[0]["layer"], rows[0]["head"]])
    with pytest.raises(InputError, match="between two positions; give both, or neither"):
        traced.head_effects(source=1)


def test_heads_of_a_long_prompt_are_asked_of_the_model(bundle, monkeypatch):
    """Where not every place is listed."""
    from qkattr.analyses.heads import heads_at

    traced = qkattr.trace(bundle, PROMPT)
    listed = {(r["layer"], r["head"]): r for r in heads_at(traced, traced, query=4, key=1)}
    monkeypatch.setattr("qkattr.graph.accounts.PLACES", 1)
    assert not traced.graph.heads.complete
    computed = heads_at(traced, traced, query=4, key=1)
    assert len(computed) == len(listed) > 0
    for name in ("effect", "derivative", "score", "probability", "influence"):
        was = [listed[r["layer"], r["head"]][name] for r in computed]
        now = [r[name] for r in computed]
        within(name, now, was, SAME, max(map(abs, was)))


def test_masking_is_what_a_small_step_towards_it_takes_from_the_target(traced, bundle):
    """The pattern moved by a thousandth towards the one without the key, in the model itself."""
    step = 1e-3
    shape = traced.graph.nodes.kind[traced.graph.targets[0]] == Kind.SCORE
    params, tokens = bundle.params, jnp.asarray(pad_tokens(traced.token_ids))
    clean = forward(params, tokens, cfg=bundle.config)[1]
    for row in traced.head_effects(6):
        b, n, t, s = (row[name] for name in ("layer", "head", "query", "key"))
        pattern = np.asarray(clean.patterns[b], np.float64)
        without = pattern[n, t].copy()
        without[s] = 0
        mixed = pattern[n, t] + step * (without / without.sum() - pattern[n, t])
        patterns = np.zeros((bundle.config.n_blocks, *pattern.shape), np.float32)
        rows = np.zeros(patterns.shape[:3], bool)
        patterns[b, n, t], rows[b, n, t] = mixed, True
        edits = Edits(blocks=BlockEdits(patterns=PatternEdits(patterns, rows)))
        values = [
            target_in(traced, *forward(params, tokens, cfg=bundle.config, edits=e), shape)
            for e in (Edits(), edits)
        ]
        got = (values[0] - values[1]) / step
        within("masking", row["masking"], got, STEP, max(abs(row["masking"]), abs(values[0])))


def target_in(traced, logits, trace, is_score: bool) -> float:
    if is_score:
        block, head, query, key, _ = traced.scores[0]
        return float(trace.scores[block, head, query, key])
    said = next(p for p in traced.predictions if p["target"])
    row = np.asarray(logits[len(traced.token_ids) - 1], np.float64)
    return row[said["id"]] - (row.mean() if said["against"] < 0 else row[said["against"]])


# The whole account --------------------------------------------------------------------------------


def test_the_whole_account_adds_up_and_has_the_graphs_numbers(traced):
    found = qkattr.effects(traced, heads=True)
    n = len(traced.graph.targets)
    assert found.value.shape == (n,) and len(found.targets) == n
    assert found.targets[0] == traced.main_target
    for p, at in enumerate(found.boundary):
        total = found.account[p, : at + 1].sum(-1)
        within("account", total, found.value[p], ACCOUNT, abs(found.value[p]))
        for b in range(at):
            above = found.constant[p, b + 1 :].sum()
            size = np.abs(found.effect[p, b]).sum()
            within("sum", found.effect[p, b].sum() + above, found.value[p], ACCOUNT, size)
    nodes = traced.graph.nodes
    for i in np.flatnonzero(nodes.kind == Kind.FEATURE)[:20]:
        b, t = nodes.boundary[i], nodes.position[i]
        slot = np.flatnonzero(
            (found.kind[b, t] == Kind.FEATURE) & (found.index[b, t] == nodes.index[i])
        )
        np.testing.assert_allclose(found.effect[:, b, t, slot[0]], nodes.effect[i], rtol=1e-5)
    main = found.head[: 2 if "score" in traced.main_target else 1].sum(0)
    for row in traced.head_effects(20):
        dense = main[row["layer"], row["head"], row["query"], row["key"]]
        within("head", dense, row["effect"], SAME, np.abs(main).max())
    frame = found.to_pandas("account")
    np.testing.assert_allclose(frame[list(found.kinds)].sum(axis=1), frame.value, rtol=ACCOUNT)
    assert len(found.to_pandas("nodes")) > 10


def test_the_account_of_a_prompt_is_that_of_its_trace(traced, bundle):
    options = {k: v for k, v in traced.settings.items() if k in ("target", "contrast", "score")}
    options |= {k: traced.settings[k] for k in ("max_logits", "logit_mass")}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    asked = qkattr.subject(bundle, PROMPT, sinks=traced.options.sinks)
    found, of_trace = qkattr.effects(asked, **options), qkattr.effects(traced)
    n = len(found.targets)
    assert found.targets == of_trace.targets[:n] and found.head is None
    np.testing.assert_array_equal(found.account, of_trace.account[:n])
    top = found.top(5, boundary=1)
    assert [abs(r["effect"]) for r in top] == sorted((abs(r["effect"]) for r in top), reverse=True)
    assert {r["boundary"] for r in top} == {1}


def test_effects_refuse_what_they_cannot_use(bundle, traced):
    asked = qkattr.subject(bundle, "hi")
    for option in ("nonsense", "keep", "through_qk"):
        with pytest.raises(InputError, match=f"option '{option}' is not one of effects; its opt"):
            qkattr.effects(asked, **{option: 1})
    with pytest.raises(InputError, match="max_logits should lie in"):
        qkattr.effects(asked, max_logits=0)
    with pytest.raises(InputError, match="a result has its targets; leave target out"):
        qkattr.effects(traced, target=("hi",))


def test_effects_of_all_heads_have_a_limit(traced, monkeypatch):
    monkeypatch.setattr("qkattr.analyses.effects.MOST", 100)
    with pytest.raises(InputError, match="ask with heads=False"):
        qkattr.effects(traced, heads=True)


# Pairs --------------------------------------------------------------------------------------------


def test_pairs_move_the_target_over_all_keys(traced):
    """Each pair's effect, from the tables of every key and the derivatives of the heads."""
    row = next(r for r in traced.head_effects() if r["query"] == 4 and r["derivative"] != 0)
    layer, head, query = row["layer"], row["head"], row["query"]
    slope = {row["key"]: row["derivative"] for row in traced.head_effects()
             if (row["layer"], row["head"], row["query"]) == (layer, head, query)}  # fmt: skip
    own = traced.head_effects(source=query, target=query)
    slope[query] = next(r["derivative"] for r in own if (r["layer"], r["head"]) == (layer, head))
    tables = {
        s: qkattr.qk_attribution(traced, layer=layer, head=head, query=query, key=s) for s in slope
    }
    name = lambda side: (side["kind"], side["index"])
    expected: dict = {}
    for s, table in tables.items():
        assert table.target == traced.main_target
        for pair in table.pairs:
            key = name(pair["query"]), name(pair["key"])
            expected[key] = expected.get(key, 0.0) + pair["value"] * slope[s]
    table = tables[row["key"]]
    assert table.effect == pytest.approx(row["effect"], rel=1e-3, abs=1e-6)
    assert table.derivative == pytest.approx(row["derivative"], rel=1e-3, abs=1e-6)
    got = np.array([pair["effect"] for pair in table.pairs])
    want = np.array([expected[name(p["query"]), name(p["key"])] for p in table.pairs])
    within("pairs", got, want, 2e-4, np.abs(want).max())
    by_key = {name(m): m["effect"] for m in table.key_marginals}
    for key, effect in by_key.items():
        of_key = [p["effect"] for p in table.pairs if name(p["key"]) == key]
        within("marginal", effect, sum(of_key), SAME, np.abs(got).sum())


def test_without_a_trace_there_is_no_effect(bundle):

    table = qkattr.qk_attribution(qkattr.subject(bundle, PROMPT), layer=1, head=0, query=-1, key=1)
    assert table.target is None and table.effect is None and table.derivative is None
    assert "effect" not in table.pairs[0]


# Saved and shown ----------------------------------------------------------------------------------


def test_a_saved_result_keeps_its_effects_and_needs_no_model(traced, tmp_path):
    saved = qkattr.open(traced.save(tmp_path / "out").parent)
    assert saved.head_effects(20) == traced.head_effects(20)
    assert saved.head_effects(source=1, target=4) == traced.head_effects(source=1, target=4)
    was, now = (r.to_json(links=0)["qkattr"]["account"] for r in (traced, saved))
    assert was == now
    for table in ("effects", "account"):
        assert saved.to_pandas(table).equals(traced.to_pandas(table))
    assert saved.to_pandas("nodes").effect.equals(traced.to_pandas("nodes").effect)


def test_joined_with_its_model_pairs_have_the_same_effects(traced, bundle, tmp_path):
    joined = qkattr.open(traced.save(tmp_path / "out").parent, bundle=bundle)
    place = dict(layer=1, head=1, query=4, key=2)
    was, now = (qkattr.qk_attribution(r, **place) for r in (traced, joined))
    assert (now.target, now.effect) == (was.target, pytest.approx(was.effect, rel=1e-4))
    size = max(abs(p["effect"]) for p in was.pairs)
    for one, other in zip(was.pairs[:50], now.pairs[:50], strict=True):
        assert other["effect"] == pytest.approx(one["effect"], abs=1e-4 * size)


def test_heads_of_a_folder_are_listed_without_the_model(traced, tmp_path, capsys, monkeypatch):
    traced.save(tmp_path / "out")
    monkeypatch.setattr("qkattr.cli.options.Saes.open", lambda *a: pytest.fail("model read"))
    for given, expected in (
        ([], traced.head_effects(5)),
        (["--from", "2", "--to", "4"], traced.head_effects(5, source=2, target=4)),
    ):
        arguments = ["heads", str(tmp_path / "out"), *given, "--top", "5", "--json"]
        app(arguments, standalone_mode=False)
        found = json.loads(capsys.readouterr().out)
        assert found["of"] == traced.main_target and len(found["heads"]) == len(expected)
        for row, other in zip(found["heads"], expected, strict=True):
            assert row["effect"] == pytest.approx(other["effect"])
            assert ("loading" in row) == bool(given)


def test_the_page_tells_the_account_before_the_leak(traced):
    from qkattr.export.html import page

    text = page(traced)
    assert 0 < text.index("What the target is made of") < text.index("What leaked")
    for row in traced.head_effects(3):
        assert f"{row['layer']}.{row['head']}" in text


def test_what_is_shown_names_the_main_target(bundle):
    """Also beside scores; and whatever ranks the heads, the largest masking is that."""
    traced = qkattr.trace(bundle, PROMPT, through_qk=2)
    assert [a["name"] for a in accounts(traced)] == [traced.main_target]
    rows = traced.head_effects(by="effect")
    largest = max(abs(row["masking"]) for row in rows if row["key"] in traced.sink_positions)
    _, folded = away_from_sinks(traced, rows)
    said = re.search(r"largest masking of these is ([-+.\de]+),", folded)
    assert said and abs(float(said[1])) == pytest.approx(largest, rel=5e-3)


def test_places_that_were_not_kept_are_told(traced, tmp_path, capsys, monkeypatch):
    traced.save(tmp_path / "out")
    app(["heads", str(tmp_path / "out")], standalone_mode=False)
    assert "more places than a trace keeps" not in capsys.readouterr().out
    monkeypatch.setattr("qkattr.graph.accounts.PLACES", 1)
    app(["heads", str(tmp_path / "out")], standalone_mode=False)
    assert "more places than a trace keeps" in " ".join(capsys.readouterr().out.split())
