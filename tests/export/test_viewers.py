"""The graph JSON in other people's viewers: no wrong card, no name twice, readers without a word.

Expected values are what Neuronpedia's viewer and circuit-tracer's do with a file, written down here
anew from their sources; nothing of `qkattr.export.viewers` is used to check it.
"""

import collections
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess

import folders
import hypothesis.strategies as st
import pytest
from hypothesis import given

import qkattr
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.export.feature_json import export_features
from qkattr.export.viewers import node_layer, node_number, scan_of
from qkattr.features import ScanConfig, make_cards
from qkattr.kinds import Kind
from qkattr.load.registry import Source

#: The types for which Neuronpedia's viewer asks for no card.
CARDLESS = {"embedding", "mlp reconstruction error", "lorsa error", "logit", "bias", "unknown"}
SET = "res-x"

POST = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
#: SAEs by their hooks, options of the trace, and whether a layer's SAE is before its block.
GRAPHS = {
    "plain": (POST, {}, False),
    "pre": (["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"], {}, True),
    "embedding": (["hook_embed", *POST], {}, False),
    "raw": (POST[:1], dict(sinks=False), False),
    "scores": (POST, dict(through_qk=3, sinks=False), False),
    "one score": (POST[:1], dict(score=(1, 2, -1, 1)), False),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The bundle of each graph, with a source in place of Neuronpedia's."""
    root = tmp_path_factory.mktemp("viewers")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "made", boundaries=range(1, 4))
    found = {}
    for name, (hooks, _, pre) in GRAPHS.items():
        for i, hook in enumerate(hooks):
            made = root / "made" / f"blocks.{i}.hook_resid_post"
            shutil.copytree(made, root / name / hook)
            config = json.loads((made / "cfg.json").read_text())
            config["metadata"]["hook_name"] = hook
            (root / name / hook / "cfg.json").write_text(json.dumps(config))
        bundle = qkattr.load(root / "model", root / name, missing="raw")
        sources = {b: f"{b - (not pre)}-{SET}" for b in range(3)}
        found[name] = dataclasses.replace(bundle, source=Source("model-x", SET, sources, pre))
    return found


@pytest.fixture(scope="module", params=list(GRAPHS))
def result(request, bundles):
    return qkattr.trace(bundles[request.param], "hi hi hi 12 hi", **GRAPHS[request.param][1])


@pytest.fixture(scope="module")
def graph(result):
    return json.loads(json.dumps(result.to_json()))


def decoded(number):
    """Layer and index out of a node's number as both viewers compute them, or NaN."""
    inside = 8 * number + 1
    if inside < 0:
        return math.nan, math.nan
    total = math.floor((math.sqrt(inside) - 1) / 2)
    index = number - (total * total + total) / 2
    return total - index, index


def hover_id(node):
    return f"{node['layer']}_{node['feature']}_{node['ctx_idx']}"


def test_neuronpedia_shows_every_node_its_own_card_or_none(graph):
    """It asks for all cards in one request, which it refuses if one index is no whole number; then
    it gives a card to every node whose layer and index are the card's."""
    details = graph["metadata"]["feature_details"]
    asked = set()
    for node in graph["nodes"]:
        if node["feature_type"] not in CARDLESS:
            layer = re.match(r"\d+", node["layer"])
            index = decoded(node["feature"])[1]
            assert index == int(index)
            asked.add((layer and int(layer[0]), int(index)))
    top = max(int(n["layer"]) for n in graph["nodes"] if n["layer"] != "E" and n["kind"] != "logit")
    pre = graph["qkattr"]["settings"]["neuronpedia"]["pre"]
    shown = 0
    for node in graph["nodes"]:
        layer = str(top + 1) if node["feature_type"] == "logit" else node["layer"]
        index = decoded(node["feature"])[1]
        has = layer != "E" and not math.isnan(index) and (int(layer), int(index)) in asked
        if has:
            assert node["kind"] == "feature" and node["index"] == int(index)
            assert int(layer) == node["boundary"] - (not pre)
            assert decoded(node["feature"]) == (int(layer), node["index"])
        assert has == (node["kind"] == "feature" and node["layer"] != "E")
        shown += has
    assert shown and details == {"neuronpedia_source_set": SET}


def test_no_two_nodes_have_one_name_under_the_pointer(graph):
    named = collections.Counter(map(hover_id, graph["nodes"]))
    assert not {name: n for name, n in named.items() if n > 1}


def test_every_node_says_what_it_is(graph):
    kinds = {node["kind"] for node in graph["nodes"]}
    assert {"feature", "error", "bias", "const"} <= kinds
    for node in graph["nodes"]:
        assert node["feature_type"] in CARDLESS | {"cross layer transcoder"}
        assert node["clerp"] or node["kind"] == "feature"
        if node["feature_type"] == "logit":
            assert re.fullmatch(r".*\(p=[\d.]+\)", node["clerp"], re.DOTALL)
        if node["kind"] == "error":
            assert node["feature"] == -1  # as circuit-tracer writes it


BOUNDARIES, INDICES = st.integers(0, 100), st.integers(0, 2**21)


@st.composite
def places(draw):
    """A node as a graph may hold it: kind, boundary, index, position."""
    kind = draw(st.sampled_from([k for k in Kind if k != Kind.NONE]))
    boundary, position = draw(BOUNDARIES), draw(st.integers(0, 2**17))
    if kind in (Kind.TOKEN, Kind.POSITION):
        index = draw(INDICES) if kind == Kind.TOKEN else position
        return kind, 0, index, position
    if kind in (Kind.FEATURE, Kind.LOGIT, Kind.SCORE):
        return kind, 100 if kind == Kind.LOGIT else boundary, draw(INDICES), position
    return kind, boundary, -1, position


@given(st.lists(places(), min_size=2, max_size=40), st.booleans())
def test_numbers_are_distinct_per_kind(nodes, pre):
    seen = {}
    for kind, boundary, index, position in nodes:
        if kind == Kind.TOKEN:
            index = 5  # a position has one token
        layer = node_layer(kind, boundary, n_blocks=100, pre=pre)
        number = node_number(kind, layer, index, position)
        place = (kind, boundary, index, position)
        assert seen.setdefault((layer, number, position), place) == place
        if kind == Kind.FEATURE:
            assert decoded(number)[1] == index
            assert layer == "E" or decoded(number)[0] == int(layer)
        elif kind not in (Kind.TOKEN, Kind.LOGIT):
            assert number < 0 and math.isnan(decoded(number)[0])


# Feature files


def test_feature_files_have_the_numbers_of_the_nodes(result, graph, tmp_path):
    bundle = result.subject.bundle
    rows = [list(result.token_ids)] * 8
    cards = make_cards(bundle, rows, config=ScanConfig(batch=8))
    into = export_features(cards, tmp_path, cards.boundaries.tolist())
    assert into.name == graph["metadata"]["scan"] == "model-x"
    features = [node for node in graph["nodes"] if node["kind"] == "feature"]
    for node in features:
        card = json.loads((into / f"{node['feature']}.json").read_text())["qkattr"]
        assert card["boundary"] == node["boundary"]
        assert json.loads((into / f"{node['feature']}.json").read_text())["index"] == node["index"]
    assert len(list(into.iterdir())) == len(cards) and features


# The model's name


@pytest.mark.parametrize(
    "model, scan",
    [
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("google/gemma-2-2b@refs/pr/1", "gemma-2-2b"),
        ("/data/my models/Phi 3 (new)/", "Phi-3-new"),
        ("C:\\models\\gpt2", "gpt2"),
        ("./llama.Q4_K.gguf", "llama.Q4_K"),
        ("smollm2", "smollm2"),
        ("/données/é/模型", "model"),
        ("..", "model"),
        ("", "model"),
        ("a" + "/" * 9, "a"),
    ],
)
def test_the_models_name_is_one_that_the_site_takes(model, scan):
    assert scan_of({"model": model}) == scan
    assert re.fullmatch("[a-zA-Z0-9_.-]+", scan)


@given(st.text())
def test_any_models_name_becomes_one(model):
    assert re.fullmatch("[a-zA-Z0-9_.-]+", scan_of({"model": model}))


@pytest.mark.parametrize("scan", ["", "a b", "a/b", "é", "a\n", "..", "a:b"])
def test_names_that_the_site_refuses(result, tmp_path, scan, capsys):
    with pytest.raises(InputError, match="should have only letters"):
        result.save(tmp_path, scan=scan)
    assert not list(tmp_path.iterdir())
    assert main(["trace", "hi", "-m", "x", "-s", "x", "--scan", scan, "--json"]) == 2
    assert "should have only letters" in capsys.readouterr().err


def test_a_given_name_is_kept(result, tmp_path):
    def metadata(folder):
        return json.loads((folder / "graph.json").read_text())["metadata"]

    result.save(tmp_path / "a", scan="gpt2-small")
    saved = qkattr.open(tmp_path / "a")
    saved.save(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert metadata(folder)["scan"] == "gpt2-small"
        assert "feature_details" not in metadata(folder)  # it has no such cards under that name
    saved.save(tmp_path / "c", scan="model-x")
    assert metadata(tmp_path / "c")["feature_details"] == {"neuronpedia_source_set": SET}
    assert result.to_json()["metadata"]["scan"] == "model-x"
    layers = [n["layer"] for n in result.to_json()["nodes"]]
    assert [n["layer"] for n in saved.to_json()["nodes"]] == layers


def test_a_name_on_the_command_line(bundles, tmp_path, capsys):
    bundle = bundles["plain"]
    command = ["trace", "hi hi", "-m", bundle.model, "-s", bundle.saes, "--scan", "my-model.2"]
    assert main([*command, "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["scan"] == "my-model.2"
    assert qkattr.open(tmp_path).settings["scan"] == "my-model.2"
    assert main(command) == 2
    assert "give --out or --json with it" in capsys.readouterr().err


def test_links_on_the_command_line(bundles, tmp_path, capsys):
    bundle = bundles["plain"]
    command = ["trace", "hi hi", "-m", bundle.model, "-s", bundle.saes, "--json"]
    assert main([*command, "--links", "5", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "graph.json").read_text())
    assert len(printed["links"]) == len(written["links"]) == 5
    assert main([*command, "--links", "all"]) == 0
    every = json.loads(capsys.readouterr().out)["qkattr"]["links"]
    assert every["listed"] == every["all"] == len(qkattr.open(tmp_path).graph.edges) > 5


@pytest.mark.parametrize("links", ["-1", "some", "1.5", "", "9" * 20, "ALL"])
def test_links_that_are_no_number(links, capsys):
    assert main(["trace", "hi", "-m", "x", "-s", "x", f"--links={links}", "--json"]) == 2
    assert "--links expects a number of links, or all; got" in capsys.readouterr().err
    assert main(["trace", "hi", "-m", "x", "-s", "x", "--links", "5"]) == 2
    assert "give --out or --json with it" in capsys.readouterr().err


# circuit-tracer's reader

_READ = """
import importlib.util, json, pathlib, sys
package = pathlib.Path(importlib.util.find_spec("circuit_tracer").origin).parent
spec = importlib.util.spec_from_file_location("m", package / "frontend" / "graph_models.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.Model.model_validate(json.load(open(sys.argv[1])), strict=True)
print(len(model.nodes), model.metadata.scan)
"""


@pytest.mark.skipif(
    "QKATTR_CIRCUIT_TRACER" not in os.environ, reason="needs circuit-tracer, see the docstring"
)
def test_circuit_tracers_own_reader_takes_the_file(result, tmp_path):
    """Its models alone are loaded, so that it needs none of its dependencies but pydantic:

    python -m venv ct && ct/bin/pip install pydantic && ct/bin/pip install --no-deps circuit-tracer
    QKATTR_CIRCUIT_TRACER=ct/bin/python pytest tests/export/test_viewers.py
    """
    result.save(tmp_path)
    command = [os.environ["QKATTR_CIRCUIT_TRACER"], "-c", _READ, str(tmp_path / "graph.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(result.graph.nodes)} model-x\n"


def test_what_circuit_tracer_wants_is_there(graph):
    metadata, nodes = graph["metadata"], graph["nodes"]
    assert isinstance(metadata["transcoder_list"], list)
    for node in nodes:
        assert type(node["feature"]) is int and type(node["layer"]) is str
        if node["layer"] != "E" and node["kind"] == "feature":  # whose files its page asks for
            assert metadata["transcoder_list"][int(node["layer"])] == metadata["scan"]
