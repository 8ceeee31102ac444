"""Every command end to end, on a small and on the real model, and the keys programs rely on."""

import dataclasses
import inspect
import json
import re

import folders
import pytest

from qkattr.cli.main import main
from qkattr.features.check import HURTS

#: Float32 terms, thousands of them, summed in another order than the score.
SUM_TOLERANCE = 1e-3

PROMPT = "hi hi hi 12"
SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"

QK_KEYS = {
    *("tokens", "layer", "head", "query", "key", "score", "probability", "sum", "shares"),
    *("pairs", "query_marginals", "key_marginals"),
}
QK_KINDS = {"feature", "bias", "error", "token", "position", "sink"}
HEADER_KEYS = {
    *("version", "schema", "settings", "provenance", "completeness", "replacement", "leak"),
    *("sinks", "qk"),
}
LEAK_KEYS = {"boundary", "surviving", "feature", "token", "error", "sink", "dropped"}
SETTINGS = {"linearisation", "read", "precision", "sinks", "bos", "keep", "max_rows", "max_edges"}


class Cli:
    """Runs command lines with one model and its SAEs."""

    def __init__(self, capsys, model, saes):
        self.capsys, self.model, self.saes = capsys, str(model), str(saes)

    def __call__(self, *arguments, model=True):
        given = ["-m", self.model] if model else []
        if model and arguments[0] not in ("tokens", "check"):
            given += ["-s", self.saes]
        code = main([*map(str, arguments), *given])
        out, err = self.capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    def json(self, *arguments, **options):
        out = self(*arguments, "--json", **options)
        assert out.count("\n") == 1
        return json.loads(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    return root


@pytest.fixture
def cli(files, capsys):
    return Cli(capsys, files / "model", files / "saes")


@pytest.fixture
def real(capsys):
    return Cli(capsys, "smollm2", "smollm2")


def check_qk(qk):
    """The keys and sums of one object of `qkattr qk --json`."""
    assert set(qk) >= QK_KEYS
    assert 0 <= qk["probability"] <= 1 and qk["key"] <= qk["query"] < len(qk["tokens"])
    assert abs(qk["sum"] - qk["score"]) < SUM_TOLERANCE
    assert abs(sum(pair["value"] for pair in qk["pairs"]) - qk["sum"]) < SUM_TOLERANCE
    for pair in qk["pairs"]:
        assert set(pair) >= {"query", "key", "value", "contrast"}
        for side in (pair["query"], pair["key"]):
            assert set(side) >= {"kind", "index", "activation", "label"}
            assert side["kind"] in QK_KINDS
            assert (side["index"] is None) == (side["kind"] in ("bias", "error", "sink"))
            assert (side["activation"] is None) == (side["kind"] != "feature")
    values = [abs(pair["value"]) for pair in qk["pairs"]]
    assert values == sorted(values, reverse=True)
    for name in ("query_marginals", "key_marginals"):
        assert all(set(m) >= {"kind", "index", "value"} for m in qk[name])
        assert abs(sum(m["value"] for m in qk[name]) - qk["sum"]) < SUM_TOLERANCE
    shares = qk["shares"]
    assert all(set(share) >= {"signed", "absolute"} for share in shares.values())
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", name) for name in shares)
    assert abs(sum(share["signed"] for share in shares.values()) - qk["sum"]) < SUM_TOLERANCE
    assert abs(sum(share["absolute"] for share in shares.values()) - 1) < SUM_TOLERANCE


def check_graph(graph):
    """The keys of graph.json."""
    assert set(graph) >= {"metadata", "qParams", "nodes", "links", "qkattr"}
    assert all(set(node) >= {"boundary", "kind", "index", "ctx_idx"} for node in graph["nodes"])
    assert all(set(link) >= {"resid", "mlp", "heads", "weight"} for link in graph["links"])
    header = graph["qkattr"]
    assert set(header) >= HEADER_KEYS and header["schema"] == 3
    assert set(header["settings"]) >= SETTINGS
    assert set(header["provenance"]) >= {"model_hash", "saes_hash", "jax", "device"}
    assert all(set(row) >= LEAK_KEYS for row in header["leak"])
    for place, table in header["qk"].items():
        assert place == ".".join(str(table[k]) for k in ("layer", "head", "query", "key"))
        assert set(table) >= QK_KEYS


# On a small model


def test_trace_writes_a_folder_and_a_summary(cli, tmp_path):
    out = cli("trace", PROMPT, "--out", tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert {path.name for path in folder.iterdir()} == {"graph.json", "graph.npz", "index.html"}
    assert f"Open {folder / 'index.html'}" in out.replace("\n", " ")
    for said in (
        "Next token",
        "Strongest routes",
        "Heads that matter",
        "is made of",
        "What leaked",
    ):
        assert said in out
    check_graph(json.loads((folder / "graph.json").read_text()))
    assert main(["trace", PROMPT, "--out", str(folder), "-m", cli.model, "-s", cli.saes]) == 0


def test_trace_as_json_is_the_file(cli, tmp_path):
    printed = cli.json("trace", PROMPT, "--out", tmp_path)
    assert printed == json.loads((tmp_path / "graph.json").read_text())


def test_trace_options_are_named_in_the_output(cli):
    options = {
        "linearisation": "frozen-gate",
        "read": "encoder",
        "keep": 0.5,
        "max_rows": 9,
        "max_edges": 4,
        "max_slots": 3,
        "qk": 1,
        "through_qk": 1,
        "precision": "high",
    }
    flags = [a for name, value in options.items() for a in (f"--{name.replace('_', '-')}", value)]
    graph = cli.json("trace", PROMPT, *flags, "--no-sink", "--no-through-errors", "--no-bos")
    check_graph(graph)
    said = graph["qkattr"]["settings"]
    assert {name: said[name] for name in options} == options
    assert (said["sinks"], said["through_errors"], said["bos"]) == (False, False, False)
    assert len(graph["qkattr"]["qk"]) == 1 and graph["qkattr"]["sinks"] == []


def test_trace_of_a_score_and_of_a_contrast(cli):
    graph = cli.json("trace", PROMPT, "--score", "1.2.-1. hi#2")
    targets = [node for node in graph["nodes"] if node["kind"] == "score"]
    assert {node["node_id"] for node in targets} == {"score_1.2_5_3_query", "score_1.2_5_3_key"}
    graph = cli.json("trace", PROMPT, "--contrast", "hi", " hi")
    assert [node["kind"] for node in graph["nodes"]].count("logit") == 1
    cli("trace", PROMPT, "--score", "1.2.-1. hi#2")
    roles = {p["role"]: p["token"] for p in graph["qkattr"]["predictions"]}
    assert (roles["for"], roles["against"], "target" in roles) == ("hi", " hi", False)
    said = " ".join(cli("trace", PROMPT, "--contrast", "hi", " hi").split())
    assert re.search(r"'hi' [\d.]+ for: traced is its logit less that of ' hi'", said)
    assert re.search(r"' hi' [\d.]+ against: its logit is subtracted from that of 'hi'", said)


@pytest.mark.parametrize("layer", [0, 1])
def test_qk(cli, layer):
    place = ("--layer", layer, "--head", 2, "--query", -1, "--key", " hi#2")
    qk = cli.json("qk", PROMPT, *place)
    check_qk(qk)
    assert (qk["query"], qk["key"]) == (5, 3)
    assert qk["tokens"] == ["<s>", "hi", " hi", " hi", " ", "12"]
    short = cli.json("qk", PROMPT, *place, "--top", 3)
    for name in ("pairs", "query_marginals", "key_marginals"):
        assert short[name] == qk[name][:3]
    assert "its" in cli("qk", PROMPT, *place, "--top", 2)


def test_token_ids_give_the_same(cli):
    place = ("--layer", 1, "--head", 0, "--query", 5, "--key", 2)
    ids = ",".join(str(row["id"]) for row in cli.json("tokens", PROMPT, "--bos")["tokens"])
    assert cli.json("qk", ids, "--ids", *place) == cli.json("qk", PROMPT, *place)
    by_ids, by_text = (cli.json("trace", *prompt) for prompt in ((ids, "--ids"), (PROMPT,)))
    assert by_ids["qkattr"].pop("bos") == "token ids taken verbatim"
    assert by_text["qkattr"].pop("bos") == "BOS <s> first, as the SAEs were trained"
    assert by_ids == by_text


def test_questions_to_a_folder(cli, tmp_path):
    cli("trace", PROMPT, "--out", tmp_path)
    for head in range(4):
        place = ("--layer", 1, "--head", head, "--query", -1, "--key", " hi#1")
        saved = cli.json("qk", tmp_path, *place, model=False)
        check_qk(saved)
        assert saved["target"] and "effect" in saved["pairs"][0]
        assert without_effects(saved) == cli.json("qk", PROMPT, *place)
    ends = ("--from", "hi#1", "--to", -1)
    assert cli.json("heads", tmp_path, *ends, model=False) == cli.json("heads", tmp_path, *ends)


def without_effects(table):
    """A QK attribution as it is of a prompt that was not traced."""
    lists = ("pairs", "query_marginals", "key_marginals")
    plain = {
        k: [{n: v for n, v in row.items() if n != "effect"} for row in table[k]] for k in lists
    }
    return table | plain | dict.fromkeys(("target", "effect", "derivative"))


def test_heads(cli):
    report = cli.json("heads", PROMPT, "--from", " hi#1", "--to", "-1")
    assert (report["source"], report["target"], report["edges"] > 0) == (2, 5, True)
    for head in report["heads"]:
        assert set(head) >= {"layer", "head", "loading", "influence", "score", "probability"}
        place = ("--layer", head["layer"], "--head", head["head"], "--query", 5, "--key", 2)
        qk = cli.json("qk", PROMPT, *place, "--top", 1)
        assert abs(qk["score"] - head["score"]) < SUM_TOLERANCE
        assert abs(qk["probability"] - head["probability"]) < SUM_TOLERANCE
    assert len(cli.json("heads", PROMPT, "--from", 2, "--to", 5, "--top", 1)["heads"]) == 1
    assert ", by masking" in cli("heads", PROMPT, "--from", 2, "--to", 5)
    assert ", by effect" in cli("heads", PROMPT, "--by", "effect")


def test_tokens(cli):
    report = cli.json("tokens", PROMPT)
    assert [row["token"] for row in report["tokens"]] == ["hi", " hi", " hi", " ", "12"]
    assert [row["position"] for row in report["tokens"]] == [0, 1, 2, 3, 4]
    assert report["bos"] == "no BOS, as the tokenizer does"
    with_saes = cli.json("tokens", PROMPT, "-s", cli.saes)
    assert with_saes["tokens"][0]["token"] == "<s>"
    assert "' hi'" in cli("tokens", PROMPT)


def test_check(cli, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hi hi 12 " * 60)
    report = cli.json("check", "-s", cli.saes, "--text", text, "--rows", 2)
    assert (report["text"], report["rows"], report["tokens"]) == ("text.txt", 2, 128)
    assert report["fits"] == 0.8 and [row["boundary"] for row in report["boundaries"]] == [1, 2]
    for row in report["boundaries"]:
        assert 0 < row["l0"] <= 5 and row["width"] == folders.WIDTH
        assert row["unexplained_variance"] > 0 and 0 <= row["dead"] < row["width"]
        assert (row["loss_recovered"] is None) == (row["loss_mean"] - report["clean_loss"] < HURTS)
    out = cli("check", "-s", cli.saes, "--text", text)
    assert "SAEs on text.txt (3 rows, 192 tokens)" in out and "on this text" in out
    assert "SAEs on the packaged sample" in cli("check", "-s", cli.saes)
    lenient = cli.json("check", "-s", cli.saes, "--text", text, "--fits", 0)
    assert lenient["fits"] == 0


def test_options_of_trace_default_to_the_library_s():
    from qkattr.cli.options import expanded
    from qkattr.cli.trace import trace
    from qkattr.options import TraceOptions

    library = {field.name: field.default for field in dataclasses.fields(TraceOptions)}
    library["sink"] = library.pop("sinks")
    ours = {name: p.default for name, p in inspect.signature(expanded(trace)).parameters.items()}
    assert set(library) <= set(ours)
    assert {name: ours[name] for name in library} == library | {"target": None}


def test_help_and_version(capsys):
    assert main(["--version"]) == 0 and re.fullmatch(r"\d+\.\d+.*\n", capsys.readouterr().out)
    for command in ("trace", "qk", "heads", "tokens", "check"):
        assert main([command, "--help"]) == 0 and "--model" in capsys.readouterr().out
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Usage: qkattr" in err


# On the real model


@pytest.mark.slow
def test_real_trace(real, tmp_path):
    out = real("trace", SALLY, "--out", tmp_path / "sally")
    assert re.search(r"' Sally' +0\.[89]\d+ +traced", out)
    assert "' Sally' 6 → ' Aunt' 14 → ' Sally'" in out
    graph = json.loads((tmp_path / "sally" / "graph.json").read_text())
    check_graph(graph)
    best = max((n for n in graph["nodes"] if n["kind"] == "logit"), key=lambda n: n["token_prob"])
    assert best["clerp"].startswith('Output " Sally" (p=')
    place = ("--layer", 23, "--head", 7, "--query", -1, "--key", " Sally")
    saved = real.json("qk", tmp_path / "sally", *place, model=False)
    check_qk(saved)
    assert (saved["query"], saved["key"]) == (14, 6) and saved["probability"] > 0.5
    ends = ("--from", " Sally", "--to", "Aunt#2")
    report = real.json("heads", tmp_path / "sally", *ends, "--by", "effect", model=False)
    assert (report["source"], report["target"]) == (6, 14)
    assert {(h["layer"], h["head"]) for h in report["heads"][:6]} >= {(23, 2), (23, 0)}


@pytest.mark.slow
def test_real_prompts_as_text_and_as_ids(real):
    rows = real.json("tokens", SALLY)["tokens"]
    assert [rows[i]["token"] for i in (0, 5, 6, 14)] == [
        *("<|endoftext|>", " Aunt", " Sally", " Aunt"),
    ]
    ids = ",".join(str(row["id"]) for row in rows)
    by_name = ("--layer", 23, "--head", 7, "--query", "Aunt#2", "--key", "Sally")
    by_index = ("--layer", 23, "--head", 7, "--query", 14, "--key", "-9")
    one, other = real.json("qk", SALLY, *by_name), real.json("qk", ids, "--ids", *by_index)
    check_qk(one)
    assert one == other and one["tokens"][one["key"]] == " Sally"
    assert one["probability"] > 0.3


@pytest.mark.slow
def test_real_heads(real):
    out = real("heads", SALLY, "--from", " Sally", "--to", "-1")
    assert "from ' Sally' 6 to ' Aunt' 14, by masking" in " ".join(out.split())
    assert re.search(r"\n +23\.[027] +\S+ +\S+ +\S+ % +\S+ +0\.[5-9]\d+ ", out)


@pytest.mark.slow
def test_real_check(real):
    report = real.json("check", "-s", "smollm2", "--rows", 1)
    assert [row["boundary"] for row in report["boundaries"]] == list(range(1, 31))
    assert all(row["verdict"] == "ok" for row in report["boundaries"])


def test_only_a_folder_of_ours_is_written_into(cli, capsys, tmp_path, monkeypatch):
    """New, empty, or with a result in it; what someone else put there stays as it is."""
    command = ["trace", PROMPT, "-m", cli.model, "-s", cli.saes, "--out"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for _ in range(2):
        assert main([*command, str(ours)]) == 0
    theirs.mkdir()
    (theirs / "graph.json").write_text('{"mine": 1}')
    monkeypatch.chdir(theirs)
    capsys.readouterr()
    for out in (str(theirs), "", "."):
        assert main([*command, out]) == 2
        said = capsys.readouterr().err
        assert "holds other files and no result of qkattr" in said and "--force" in said
    assert [p.name for p in theirs.iterdir()] == ["graph.json"]
    assert (theirs / "graph.json").read_text() == '{"mine": 1}'
    assert main([*command, str(theirs), "--force"]) == 0
    assert main([*command, str(theirs)]) == 0
