"""Labels from every kind of file, from Neuronpedia, and through the command line."""

import dataclasses
import functools
import gzip
import http.server
import json
import threading

import folders
import pytest

import qkattr
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.export.graph_json import graph_json
from qkattr.export.viewers import cantor
from qkattr.labels import forms, neuronpedia
from qkattr.labels.read import labelled, read_given, read_labels
from qkattr.load.registry import Source

WIDTHS = {1: 32, 2: 32}
EXPECTED = {(1, 3): "first", (2, 31): "second, last"}
IDS = [0, 40, 41, 42, 40]


def row(layer, index, text):
    return {"modelId": "m", "layer": f"{layer}-res", "index": str(index), "description": text}


ROWS = [row(0, 3, "first"), row(1, 31, " second,\n last ")]


def node(node_id, clerp, **more):
    return {"node_id": node_id, "clerp": clerp, "feature_type": "residual sae", **more}


KINDS = {
    "explanations.jsonl": "\n".join(map(json.dumps, ROWS)),
    "explanations": "\n".join(map(json.dumps, ROWS)),
    "array.json": json.dumps(ROWS),
    "pairs.json": json.dumps({"1:3": "first", " 2:31 ": "second, last"}),
    "boundary.csv": 'boundary,index,label\n1,3,first\n2,31,"second, last"\n',
    "layer.csv": '\ufeffLayer,Feature,Description\n0,3,first\n1-res,31,"second,\nlast"\n',
    "crlf.csv": 'boundary,index,label\r\n1,3,first\r\n2,31,"second, last"\r\n',
    "ours.json": json.dumps(
        {
            "nodes": [
                node("0_3_4", "first", kind="feature", boundary=1, index=3),
                node("1_31_2", "second, last", kind="feature", boundary=2, index=31),
                node("E_5_0", "token", kind="token", boundary=0, index=5),
                node("1_error_2", "", kind="error", boundary=2, index=None),
            ]
        }
    ),
    "theirs.json": json.dumps(
        {
            "nodes": [
                node("0_3_4", "old"),
                node("x", "second, last", feature=cantor(1, 31)),
                {"node_id": "E_5_0", "clerp": "token", "feature_type": "embedding"},
                {"node_id": "3_7_4", "clerp": "Output", "feature_type": "logit"},
            ],
            "qParams": {"clerps": [["0_3_4", "first"], ["gone", "x"], "?", ["a", 1]]},
        }
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_recognised(tmp_path, name, packed):
    content = KINDS[name].encode()
    path = tmp_path / (name + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_labels(path, WIDTHS) == read_labels(path) == EXPECTED


def test_layers_before_the_block(tmp_path):
    for name in ("explanations.jsonl", "array.json", "layer.csv", "theirs.json"):
        (tmp_path / name).write_text(KINDS[name], encoding="utf-8")
        found = read_labels(tmp_path / name, {0: 32, 1: 32}, pre=True)
        assert found == {(b - 1, i): text for (b, i), text in EXPECTED.items()}
    path = f"{tmp_path / 'layer.csv'}:pre"
    assert set(read_given([path], WIDTHS | {0: 32}, None)) == {(0, 3), (1, 31)}


def test_features_of_one_boundary(tmp_path):
    (tmp_path / "l.json").write_text('{"3": "three", "4": "four"}')
    (tmp_path / "l.csv").write_text("index,label\n3,three\n4,four\n")
    for name in ("l.json", "l.csv"):
        expected = {(2, 3): "three", (2, 4): "four"}
        assert read_labels(tmp_path / name, WIDTHS, boundary=2) == expected
        assert read_given([f"{tmp_path / name}:2"], WIDTHS, None) == expected


def test_of_two_labels_the_last_counts(tmp_path):
    (tmp_path / "a.json").write_text('{"1:3": "a", "1:4": "a"}')
    (tmp_path / "b.json").write_text('{"1:3": "b"}')
    given = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert read_given(given, WIDTHS, None) == {(1, 3): "b", (1, 4): "a"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "item 0 is '1', expected an object with a layer"),
        ("a.json", '{"x": "y"}', "'x' names no feature; write boundary:feature"),
        ("a.json", '{"3": "y"}', "say of which boundary all are, as in"),
        ("a.json", '{"1:3": 4}', "'1:3': its label is 4, expected text"),
        ("a.json", '{"1:32": "x"}', "is for feature '32'; boundary 1 has 0..31; give the labels"),
        ("a.json", '{"7:1": "x"}', "is for boundary 7; expected boundaries 1..2"),
        ("a.json", '{"nodes": [{"kind": "feature", "index": 3}]}', "has no boundary"),
        ("a.json", '{"nodes": [{"feature_type": "residual sae"}]}', "is for ''"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.csv", "", "is neither JSON nor CSV with a header"),
        ("a.csv", "a,b\n1,2\n", "is neither JSON nor CSV with a header"),
        ("a.csv", "index,label\n1,x\n", "is neither JSON nor CSV with a header"),
        ("a.csv", "boundary,index,label\n1,x,y\n", "row 2 is for feature 'x'"),
        ("a.csv", "boundary,index,label\nx,1,y\n", "is for boundary 'x'; give a number"),
        ("a.csv", "layer,index,label\n3-att-x,1,y\n", "not a set of SAEs over the residual"),
        ("a.csv", "boundary,index,label\n1,1\n", "its label is None, expected text"),
        ("a.csv", 'boundary,index,label\n1,1,"x\n', "is not CSV"),
        ("a.csv", b"\xff\xfe\x00", "it is not a whole UTF-8 or gzip file"),
        ("a.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "it is not a whole UTF-8 or gzip file"),
        ("a.jsonl", "{}\n", "has no layer; expected layer, index and description"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_labels(path, WIDTHS)
    assert message in str(caught.value) and len(str(caught.value)) < 600


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "WHOLE", 1000)
    monkeypatch.setattr(forms, "LINE", 1000)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b" " * 2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 2000))
    with pytest.raises(InputError, match="has more than 1000 bytes"):
        read_labels(tmp_path / "a.json.gz")
    with pytest.raises(InputError, match="a line has at most 1000 bytes"):
        read_labels(tmp_path / "a.jsonl.gz")
    monkeypatch.setattr(forms, "LINES", 1500)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((b" " * 900 + b"\n") * 2))
    with pytest.raises(InputError, match="and a file 1500"):
        read_labels(tmp_path / "a.jsonl.gz")


# In what is traced


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    folders.write_model(root / "model")
    folders.write_saes(root / "saes")
    return root


@pytest.fixture(scope="module")
def bundle(root):
    return qkattr.load(root / "model", root / "saes")


@pytest.fixture
def active(bundle):
    """A feature of boundary 1 that is a node and in a QK attribution."""
    result = qkattr.trace(bundle, IDS, qk=2)
    nodes = result.graph.nodes
    return [
        int(i)
        for i, b, k in zip(nodes.index, nodes.boundary, nodes.kind, strict=True)
        if (b, k) == (1, 1)
    ]


def command(root, capsys, *arguments):
    code = main([str(a) for a in (*arguments, "--json")])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


def test_labels_in_graph_and_scores(root, active, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    text = "<script>alert(1)</script> \x1b[31m [bold]x"
    (root / "labels.json").write_text(json.dumps({f"1:{i}": text for i in active}))
    loaded = ("--ids", "-m", "model", "-s", "saes", "--labels", "labels.json")
    ids = ",".join(map(str, IDS))
    graph = command(root, capsys, "trace", ids, *loaded, "--out", tmp_path / "out")
    named = [n for n in graph["nodes"] if n["kind"] == "feature" and n["boundary"] == 1]
    assert named and {n["clerp"] for n in named} == {text}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>alert(1)" not in page
    place = ("--layer", 1, "--head", 0, "--query", 3, "--key", 1)
    for prompt in ((ids, *loaded), ("./out", "-m", "model", "-s", "saes")):
        where = tmp_path if prompt[0] == "./out" else root
        monkeypatch.chdir(where)
        given = prompt if where == root else ("./out", "-m", root / "model", "-s", root / "saes")
        table = command(root, capsys, "qk", *given, *place)
        found = {p["query"]["label"] for p in table["pairs"] if p["query"]["kind"] == "feature"}
        assert text in found
    monkeypatch.chdir(root)
    assert main([*map(str, ("qk", ids, *loaded, *place))]) == 0
    assert "\x1b[31m" not in capsys.readouterr().out


def test_a_saved_result_takes_other_labels(root, bundle, active, capsys, tmp_path, monkeypatch):
    result = qkattr.trace(bundle, IDS, qk=2)
    place = next(iter(result.qk))
    layer, head, query, key = map(int, place.split("."))
    result.save(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.json").write_text(
        json.dumps({f"{layer}:{i}": f"other {i}" for i in range(folders.WIDTH)})
    )
    options = ("--layer", layer, "--head", head, "--query", query, "--key", key)
    saved = ("-m", root / "model", "-s", root / "saes", "--labels", "l.json")
    table = command(root, capsys, "qk", "./out", *options, *saved)
    features = [c for p in table["pairs"] for c in (p["query"], p["key"]) if c["kind"] == "feature"]
    assert all(c["label"] == f"other {c['index']}" for c in features)
    assert features or layer == 0


def test_labels_go_before_those_of_cards(bundle, active, tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({f"1:{active[0]}": "mine"}))
    once = labelled(bundle, [str(tmp_path / "l.json")])
    assert qkattr.trace(once, IDS).labels[1, active[0]] == "mine"
    assert qkattr.trace(bundle, IDS).labels == {}


def test_labels_need_saes(root):
    alone = dataclasses.replace(qkattr.load(root / "model"))
    with pytest.raises(InputError, match="there are none; give --saes"):
        labelled(alone, ["x"])


# Neuronpedia's names in the graph


@pytest.mark.parametrize("pre", [False, True])
def test_a_graph_says_where_its_cards_are(bundle, pre):
    sources = {b: f"{b - (not pre)}-res-x" for b in (1, 2)}
    known = dataclasses.replace(bundle, source=Source("scan-x", "res-x", sources, pre))
    result = qkattr.trace(known, IDS)
    graph = graph_json(result)
    assert graph["metadata"]["scan"] == "scan-x"
    assert graph["metadata"]["feature_details"] == {"neuronpedia_source_set": "res-x"}
    for n in graph["nodes"]:
        if n["kind"] == "feature":
            assert f"{n['layer']}-res-x" == sources[n["boundary"]]
            assert n["feature"] == cantor(int(n["layer"]), n["index"])
        if n["kind"] in ("token", "position"):
            assert n["layer"] == "E"
    again = Source.from_json(result.settings["neuronpedia"], bundle.config.n_blocks)
    assert sources.items() <= again.sources.items() and again.scan == "scan-x"
    plain = graph_json(qkattr.trace(bundle, IDS))
    assert plain["metadata"]["scan"] == "model"  # the last part of its path
    assert "feature_details" not in plain["metadata"]


# Neuronpedia's labels


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server in Neuronpedia's place; `requests` are the paths that were asked for."""
    root, requests = tmp_path / "site", []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(root))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(neuronpedia, "BASE", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(neuronpedia.hub, "offline", lambda: False)
    monkeypatch.setenv("QKATTR_CACHE", str(tmp_path / "cache"))
    yield root, requests
    server.shutdown()
    thread.join()
    server.server_close()


SOURCE = Source("m", "res", {1: "0-res", 2: "1-res", 9: "8-res"}, False)


def publish(root, layer, *batches):
    folder = root / "m" / f"{layer}-res" / "explanations"
    folder.mkdir(parents=True)
    for number, rows in enumerate(batches):
        content = gzip.compress("\n".join(map(json.dumps, rows)).encode())
        (folder / f"batch-{number}.jsonl.gz").write_bytes(content)


def test_labels_are_fetched_once(site, monkeypatch):
    root, requests = site
    publish(root, 0, [row(0, 3, "first")], [row(0, 4, "fourth")])
    publish(root, 1, [row(1, 31, "second, last")])
    said = []
    found = read_given(["neuronpedia"], WIDTHS, SOURCE, said.append)
    assert found == EXPECTED | {(1, 4): "fourth"} and len(said) == 2
    asked = len(requests)
    assert asked == 5  # three files, and one beyond the last of each source
    monkeypatch.setattr(neuronpedia.hub, "offline", lambda: True)
    assert read_given(["neuronpedia"], WIDTHS, SOURCE) == found and len(requests) == asked


def test_labels_that_cannot_be_fetched(site, monkeypatch):
    root, _ = site
    root.mkdir()
    with pytest.raises(InputError, match="Neuronpedia has no labels of m/res"):
        read_given(["neuronpedia"], WIDTHS, SOURCE)
    with pytest.raises(InputError, match="it is not known where Neuronpedia has labels"):
        read_given(["neuronpedia"], WIDTHS, None)
    with pytest.raises(InputError, match="no such SAEs: 'gpt2-res-jb'; did you mean gpt2-small"):
        read_given(["neuronpedia:gpt2-res-jb"], WIDTHS, None)
    with pytest.raises(InputError, match="not known to have labels on Neuronpedia"):
        read_given(["neuronpedia:qwen-scope-3-8b-base"], WIDTHS, None)
    other = Source("m", "new", {1: "0-new"}, False)
    monkeypatch.setattr(neuronpedia.hub, "offline", lambda: True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set; unset it, or give a file"):
        read_given(["neuronpedia"], WIDTHS, other)
    monkeypatch.setattr(neuronpedia.hub, "offline", lambda: False)
    monkeypatch.setattr(neuronpedia, "BASE", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be downloaded .*; try again, or give a file"):
        read_given(["neuronpedia"], WIDTHS, other)


def test_files_of_any_size_are_not_read(site, monkeypatch):
    root, _ = site
    publish(root, 0, [row(0, 3, "x" * 100)])
    monkeypatch.setattr(neuronpedia, "LARGEST", 20)
    with pytest.raises(InputError, match="has more than 20 bytes"):
        read_given(["neuronpedia"], WIDTHS, SOURCE)
    monkeypatch.setattr(neuronpedia, "LARGEST", 10_000)
    assert read_given(["neuronpedia"], WIDTHS, SOURCE) == {(1, 3): "x" * 100}
