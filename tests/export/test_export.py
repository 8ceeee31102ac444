"""The graph JSON, the columns beside it, the page, and what a `Result` answers."""

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser

import folders
import jsonschema
import numpy as np
import pytest
from graph_schema import NEURONPEDIA, QKATTR

import qkattr
from qkattr import files
from qkattr.cli import options
from qkattr.cli import qk as qk_cli
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.export import graph_json
from qkattr.export.folder import TABLES
from qkattr.export.html import page

# The parts of a link are rounded to 7 digits, and were summed in float32 over a row.
PARTS_TOLERANCE = 1e-4

OPTIONS = {
    "plain": {},
    "through_qk": dict(through_qk=3, qk=4),
    "score": dict(score=(1, 2, -1, 1), through_errors=False),
    "contrast": dict(contrast=("hi", " hi"), linearisation="half", sinks=False),
    "targets": dict(target=("hi", " ", 3), max_rows=6, max_edges=3, read="encoder"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return qkattr.load(root / "model", root / "saes")


@pytest.fixture(scope="module", params=list(OPTIONS))
def result(request, bundle):
    return qkattr.trace(bundle, "hi hi hi 12 hi", **OPTIONS[request.param])


@pytest.fixture(scope="module")
def plain(bundle):
    return qkattr.trace(bundle, "hi hi hi 12 hi")


# The graph JSON


@pytest.fixture(scope="module")
def graph(result):
    def no_constant(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(json.dumps(result.to_json()), parse_constant=no_constant)


@pytest.mark.parametrize("schema", [NEURONPEDIA, QKATTR])
def test_the_graph_fits_its_schema(graph, schema):
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(graph)


def test_nodes_have_names_of_their_own_and_links_join_nodes(graph):
    names = [node["node_id"] for node in graph["nodes"]]
    assert len(set(names)) == len(names) and len(graph["links"]) > 10
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= set(
        names
    )
    pairs = [(link["source"], link["target"]) for link in graph["links"]]
    assert len(set(pairs)) == len(pairs)


def test_links_go_up_one_boundary_or_read_their_own(graph):
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    for link in graph["links"]:
        source, target = nodes[link["source"]], nodes[link["target"]]
        direct = target["kind"] in ("logit", "score") or source["kind"] == "const"
        assert target["boundary"] - source["boundary"] == (0 if direct else 1)
        assert source["ctx_idx"] <= target["ctx_idx"]


def test_parts_of_a_link_sum_to_it(graph):
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    row = {}
    for link in graph["links"]:
        row[link["target"]] = row.get(link["target"], 0.0) + abs(link["weight"])
    for link in graph["links"]:
        if nodes[link["source"]]["kind"] != "const":
            parts = link["resid"] + link["mlp"] + sum(link["heads"].values())
            assert abs(parts - link["weight"]) <= PARTS_TOLERANCE * row[link["target"]]


def test_logits_say_their_probability(graph):
    logits = [node for node in graph["nodes"] if node["kind"] == "logit"]
    for node in logits:
        said = re.fullmatch(r'Output "(.*)" \(p=(\d\.\d{3})\)', node["clerp"], re.DOTALL)
        assert said and abs(float(said[2]) - node["token_prob"]) < 1e-3


def test_stored_qk_attributions_sum_to_their_score(graph):
    for table in graph["qkattr"]["qk"].values():
        assert abs(table["sum"] - table["score"]) < 1e-3
        if len(table["pairs"]) == table["n_pairs"]:
            assert abs(sum(p["value"] for p in table["pairs"]) - table["sum"]) < 1e-3
        assert abs(sum(s["absolute"] for s in table["shares"].values()) - 1) < 1e-4


# Saving and opening


def test_columns_survive_to_the_last_bit(result, tmp_path):
    saved = qkattr.open(result.save(tmp_path / "out").parent)
    for table, kind in TABLES.items():
        for field in dataclasses.fields(kind):
            was = getattr(getattr(result.graph, table), field.name)
            now = getattr(getattr(saved.graph, table), field.name)
            assert was.dtype == now.dtype and was.tobytes() == now.tobytes()
    for name in ("tokens", "token_ids", "bos", "predictions", "sinks", "provenance", "vocabulary"):
        assert getattr(saved, name) == getattr(result, name)
    assert saved.graph.leak == result.graph.leak
    np.testing.assert_array_equal(saved.scores, result.scores)
    assert saved.to_json() == json.loads(json.dumps(result.to_json()))


def test_a_result_joined_with_its_model_answers_as_before(plain, bundle, tmp_path):
    plain.save(tmp_path)
    place = dict(layer=1, head=3, query=2, key=1)
    with pytest.raises(InputError, match="opened without its model"):
        qkattr.qk_attribution(qkattr.open(tmp_path), **place)
    joined = qkattr.open(tmp_path, bundle=bundle)
    assert qkattr.qk_attribution(joined, **place) == qkattr.qk_attribution(plain, **place)


def test_what_is_stored_in_full_needs_no_model(plain, tmp_path):
    plain.save(tmp_path)
    saved = qkattr.open(tmp_path)
    full = [table for table in saved.qk.values() if table.n_pairs == len(table.pairs)]
    for table in full:
        place = {name: getattr(table, name) for name in ("layer", "head", "query", "key")}
        assert qkattr.qk_attribution(saved, **place) is table
    assert full


# The page


class _Resources(HTMLParser):
    """Whatever a page would fetch or run."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        assert not any(k.startswith("on") for k, _ in attrs)


def test_the_page_stands_alone(result):
    html = page(result)
    seen = _Resources()
    seen.feed(html)
    assert not seen.tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    assert seen.links and all(link.startswith("#") for link in seen.links)
    assert {link[1:] for link in seen.links} <= set(re.findall(r'id="(\w+)"', html))
    assert "://" not in html and "@import" not in html and "url(" not in html


def test_the_page_shows_what_it_should(plain):
    html = page(plain)
    for token in plain.tokens:
        assert f">{token.replace('<', '&lt;').replace('>', '&gt;')}<sub>" in html
    assert len(plain.qk) == html.count("looks at <span") == 8
    leak = html.split('id="leak"')[1]
    for row in plain.graph.leak:
        assert f'<td class="num">{row["surviving"]:.4f}</td>' in leak
    for name, value in {**plain.settings, **plain.provenance}.items():
        assert f"<td>{name}</td>" in html and str(value).split("'")[0] in html


def test_the_page_is_written_alone(plain, tmp_path):
    path = plain.to_html(tmp_path / "sub" / "page.html")
    assert path.read_text(encoding="utf-8") == page(plain)
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    assert plain._repr_html_().startswith("<iframe srcdoc=")


# Tables


def test_tables_for_pandas(result):
    nodes, edges, heads = (result.to_pandas(table) for table in ("nodes", "edges", "heads"))
    graph = result.graph
    assert len(nodes) == len(graph.nodes) and len(edges) == len(graph.edges)
    assert nodes.node_id.is_unique and set(edges.source) | set(edges.target) <= set(nodes.node_id)
    summed = heads.groupby(["source", "target"]).loading.sum()
    attention = edges.set_index(["source", "target"]).attention
    np.testing.assert_allclose(summed, attention[summed.index], rtol=1e-4, atol=1e-5)
    through = edges[(edges.block >= 0) & ~edges.source.str.contains("const")]
    scale = through.weight.abs().max()
    parts = through.residual + through.mlp + through.attention
    np.testing.assert_allclose(parts, through.weight, atol=PARTS_TOLERANCE * scale)
    with pytest.raises(
        InputError, match="no table 'rows'; expected one of edges, heads, nodes, effects, account"
    ):
        result.to_pandas("rows")


@pytest.mark.parametrize("table", ["edges", "heads", "nodes", "effects", "account"])
def test_tables_without_pandas(result, table, monkeypatch):
    """As after a plain install."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="^to_pandas needs pandas, .*; pip install pandas$"):
        result.to_pandas(table)


# How many links are listed


def links_of(result, folder, *given):
    path = result.save(folder, links=given[0] if given else None).parent / "graph.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("links", [0, 1, 7, 50])
def test_the_strongest_links_are_listed(plain, tmp_path, links):
    """Against a sort of all of them by influence, which graph.npz holds whatever is listed."""
    listed, every = links_of(plain, tmp_path, links), plain.to_json(links="all")["links"]
    assert len(every) == len(plain.graph.edges) > 50
    influence = plain.graph.edge_influence()
    strongest = sorted(range(len(every)), key=lambda i: -influence[i])[:links]
    assert listed["links"] == [json.loads(json.dumps(every[i])) for i in sorted(strongest)]
    assert listed["qkattr"]["links"] == {"listed": links, "all": len(every)}
    assert len(qkattr.open(tmp_path).graph.edges) == len(every)
    jsonschema.Draft7Validator(NEURONPEDIA).validate(listed)


@pytest.mark.parametrize("links", ["all", 10**9])
def test_all_links_are_listed(plain, tmp_path, links, monkeypatch):
    monkeypatch.setattr(graph_json, "LINKS", 3)
    found = links_of(plain, tmp_path, links)
    assert len(found["links"]) == found["qkattr"]["links"]["listed"] == len(plain.graph.edges)
    assert len(links_of(plain, tmp_path)["links"]) == len(plain.to_json()["links"]) == 3


@pytest.mark.parametrize("links", [-1, 1.5, "some", True, "10"])
def test_a_number_of_links_that_is_none(plain, tmp_path, links):
    with pytest.raises(InputError, match='^links is .*, expected a number of links, or "all"$'):
        plain.save(tmp_path / "out", links=links)
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_what_the_standard_encoder_writes():
    value = {
        "a": [1, 2.5, float("nan"), float("inf"), True, None, 1e-07, -0.0, 1e22],
        "text": "é日🙂\x00\n\"\\\u2028", "tuple": (1, (2,)), 3: {},
    }  # fmt: skip
    assert json.loads(files.encoded(value)) == json.loads(files.dumps(value))
    for half in ("a\udc80", "\ud83d"):
        written = files.encoded({"a": half, "b": float("nan")})
        assert json.loads(written) == {"a": half, "b": None}
    computed = {"a": np.float64(0.5), "b": np.int64(3), "c": np.float32(0.25), "d": np.bool_(True)}
    assert json.loads(files.encoded(computed)) == {"a": 0.5, "b": 3, "c": 0.25, "d": True}


# What a saved folder answers without its model


def test_the_pairs_shown_are_stored(plain, tmp_path, monkeypatch, capsys):
    """More pairs than are stored, groups and JSON want all of them, and so the model."""
    monkeypatch.setattr(graph_json, "LISTED", 5)
    folder = str(plain.save(tmp_path / "out").parent)
    table = max(plain.qk.values(), key=lambda table: table.n_pairs)
    names = ("layer", "head", "query", "key")
    place = [part for n in names for part in (f"--{n}", str(getattr(table, n)))]
    ask = ["qk", folder, *place, "--all"]
    assert table.n_pairs > 6
    qk_cli.show(table, 5, all=True)  # of the result in memory, which has all pairs
    with_model = capsys.readouterr().out
    loaded = []

    def refuse(self):
        loaded.append(True)
        raise InputError("the model is asked for")

    monkeypatch.setattr(options.Saes, "open", refuse)
    for top in ("1", "5"):
        assert main([*ask, "--top", top]) == 0 and not loaded
        said = capsys.readouterr().out
    assert said == with_model
    for more in (["--top", "6"], ["--json"], ["--json", "--top", "5"], ["--label", "x"]):
        loaded.clear()
        assert main([*ask, *more]) == 2 and loaded
        assert "the model is asked for" in capsys.readouterr().err
