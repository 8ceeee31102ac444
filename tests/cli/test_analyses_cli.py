"""The commands of the QK analyses: `why`, `mechanisms`, `distance`, `pairs`, `marginals`, `qk
--groups`."""

from __future__ import annotations

import json

import folders
import numpy as np
import pytest
from tiny import within

import qkattr
from qkattr.cli.main import main

IDS = "0,40,41,42,40,43"
PLACE = ("--layer", "1", "--head", "2", "--query", "-1", "--key", "1")
COMMANDS = ("why", "mechanisms", "distance")
#: Of the absolute sum: float32 sums, made in another order.
SUM = 2e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("analyses")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    bundle = qkattr.load(root / "model", root / "saes")
    qkattr.trace(bundle, [int(i) for i in IDS.split(",")], qk=0).save(root / "result")
    (root / "more.txt").write_text("hi hi hi 12\n\nhi 12 hi hi 12\n")
    (root / "groups.toml").write_text('[mine]\nfeatures = ["1:0", "1:1", "1:2", "1:3"]\n')
    (root / "twice.toml").write_text('[a]\nfeatures = ["1:0"]\n[b]\nfeatures = ["1:0"]\n')
    return root


@pytest.fixture
def run(root, monkeypatch, capsys):
    monkeypatch.chdir(root)

    def call(*arguments, json_=True):
        code = main([*map(str, arguments), *(["--json"] if json_ else [])])
        out = capsys.readouterr().out
        assert code == 0, out
        return json.loads(out) if json_ else out

    return call


PROMPT = (IDS, "--ids", "-m", "model", "-s", "saes")
WEIGHTS = ("pairs", "-m", "model", "-s", "saes", "--layer", "1")


@pytest.mark.parametrize("form", ["odds", "log"])
def test_why(run, form):
    found = run("why", *PROMPT, *PLACE, "--form", form, "--top", 400)
    scale = sum(abs(k["value"]) for k in found["keys"]) + abs(found["entropy"])
    within("sum", found["sum"] - found["entropy"], found["value"], SUM, scale)
    within("keys", sum(k["value"] for k in found["keys"]), found["sum"], SUM, scale)
    within("attention", sum(k["probability"] for k in found["keys"]), 1.0, 1e-6)
    pairs = [*found["pushes"], *found["pulls"]]
    assert all(p["value"] > 0 for p in found["pushes"])
    assert all(p["value"] < 0 for p in found["pulls"])
    within("pairs", sum(p["value"] for p in pairs), found["sum"], 1e-4, scale * 10)
    for versus in found["versus"]:
        other = next(k for k in found["keys"] if k["position"] == versus["key"])
        here = next(k for k in found["keys"] if k["position"] == found["key"])
        within("ratio", versus["log_ratio"], here["capped"] - other["capped"], 1e-5, scale)


def test_mechanisms_of_one_and_of_several_prompts(run):
    one = run("mechanisms", *PROMPT, *PLACE, "--top", 400)
    qk = run("qk", *PROMPT, *PLACE)
    within("score", one["score"], qk["score"], SUM, sum(abs(p["value"]) for p in qk["pairs"]))
    carried = sum(m["carried"] for m in one["mechanisms"])
    within("carried", carried, one["score"], 1e-6, sum(abs(p["value"]) for p in qk["pairs"]))
    both = run("mechanisms", *PROMPT, *PLACE, "--top", 400, "--features")
    among = [p["value"] for p in qk["pairs"] if p["query"]["kind"] == p["key"]["kind"] == "feature"]
    assert one["rest"] == 0 and both["score"] == one["score"] and among
    within("features", both["score"] - both["rest"], sum(among), SUM, sum(map(abs, among)))
    named = [c["kind"] for m in both["mechanisms"] for c in m["query"] if c["weight"]]
    assert set(named) == {"feature"}
    place = (*PLACE[:4], "--query", "-1", "--key", "0")
    text = ("hi hi 12", "-m", "model", "-s", "saes", *place)
    alone = run("mechanisms", *text)
    several = run("mechanisms", *text, "--more", "more.txt")
    assert (alone["n_prompts"], several["n_prompts"]) == (1, 3)
    lines = ["hi hi hi 12", "hi 12 hi hi 12"]
    rest = [run("mechanisms", line, "-m", "model", "-s", "saes", *place)["score"] for line in lines]
    within("scores add up", several["score"], alone["score"] + sum(rest), 1e-5, 10)


def test_distance(run):
    found = run("distance", *PROMPT, *PLACE, "--max", 20)
    here = found["query"] - found["key"]
    assert len(found["score_profile"]) == 20 and found["rotary"]
    within("here", found["score_profile"][here], found["score"], 1e-5, 10)
    within("split", found["invariant"] + found["positional"], found["score"], 1e-6, 10)
    for pair in found["pairs"]:
        within("pair", pair["mean"] + pair["positional"], pair["value"], 1e-6, 10)
        assert len(pair["profile"]) == 20
    assert len(run("distance", *PROMPT, *PLACE, "--max", 1)["score_profile"]) == here + 1


def test_groups(run):
    found = run("qk", *PROMPT, *PLACE, "--groups", "groups.toml")
    groups = found["groups"]
    size = sum(abs(p["value"]) for p in found["pairs"])
    within("sum", groups["sum"], found["score"], SUM, size)
    within("table", sum(map(sum, groups["table"])), groups["sum"], 1e-9, size)
    own = [p for p in found["pairs"] if p["query"]["kind"] == "feature"
           and p["query"]["index"] in range(4)]  # fmt: skip
    row = groups["table"][groups["query"].index("mine")] if own else []
    within("mine", sum(row), sum(p["value"] for p in own), 1e-9, size)


def test_pairs_of_a_prompt(run):
    found = run("pairs", *PROMPT, "--layer", 1, "--top", 6, "--all")
    assert found["layers"] == [1] and set(found["heads"]) == {f"1.{n}" for n in range(4)}
    for name, sign in (("positive", 1), ("negative", -1)):
        values = [sign * p["value"] for p in found[name]]
        assert values == sorted(values, reverse=True) and min(values) > 0
        best = found[name][0]
        where = ("--query", best["query"]["position"], "--key", best["key"]["position"])
        qk = run("qk", *PROMPT, "--layer", 1, "--head", best["head"], *where)
        pair = max(qk["pairs"], key=lambda p: sign * p["value"])
        within("value", best["value"], pair["value"], 1e-5, abs(pair["value"]))
        assert [best[s]["index"] for s in ("query", "key")] == [
            pair[s]["index"] for s in ("query", "key")
        ]
        assert best["probability"] == pytest.approx(qk["probability"], rel=1e-5)
    alone = run("pairs", "./result", "--layer", 1, "--head", 2)
    assert list(alone["heads"]) == ["1.2"] and alone["error_share"] == 0
    kinds = {p[s]["kind"] for p in alone["positive"] for s in ("query", "key")}
    assert kinds == {"feature"}


@pytest.mark.parametrize("subject", [PROMPT, ("./result",)])
def test_pairs_lists_the_strongest_feature_pairs_of_all_not_those_among_the_strongest(run, subject):
    every = run("pairs", *subject, "--layer", 1, "--top", 4096, "--all")
    for top in (1, 5, 40):
        found = run("pairs", *subject, "--layer", 1, "--top", top)
        assert found["features"] and found["searched"] < every["searched"]
        for name in ("positive", "negative"):
            among = [p for p in every[name] if p["query"]["kind"] == p["key"]["kind"] == "feature"]
            assert len(found[name]) == min(top, len(among))
            values, expected = ([p["value"] for p in x[:top]] for x in (found[name], among))
            within("value", values, expected, 1e-5, np.abs(expected))
    assert "--all lists them" in run("pairs", *subject, json_=False)
    assert "Error slots have" in run("pairs", *subject, "--all", json_=False)


def test_pairs_without_features_says_so(run):
    said = run("pairs", *PROMPT, "--layer", 0, json_=False)
    assert "0 terms searched" in said and "No position has features" in said


def test_pairs_of_weights(run, root):
    weights = ("pairs", "-m", "model", "-s", "saes", "--layer", 1, "--head", 2)
    found = run(*weights, "--distance", 3, "--top", 5)
    assert found["scales"]["source"] is None and found["distance"] == 3
    assert [len(found[k]) for k in ("positive", "negative")] == [5, 5]
    ids = np.random.default_rng(0).integers(0, 40, (3, 20)).astype(np.uint16)
    np.save(root / "rows.npy", ids)
    scaled = run(*weights, "--distance", 3, "--top", 5, "--text", "rows.npy")
    by = scaled["scales"]["attn"] ** 2
    for one, other in zip(found["positive"], scaled["positive"], strict=True):
        assert one["query"] == other["query"] and one["key"] == other["key"]
        within("scaled", other["value"], one["value"] * by, 1e-5, abs(other["value"]))


def test_marginals(run):
    found = run("marginals", *PROMPT, "--attention", 0.2, "--sinks-too", "--limit", 3, "--layer", 1)
    assert len(found["places"]) == 3 <= found["n_places"]
    for place in found["places"]:
        assert place["probability"] >= 0.2
        where = [str(place[k]) for k in ("head", "query", "key")]
        flags = zip(("--head", "--query", "--key"), where, strict=True)
        qk = run("qk", *PROMPT, "--layer", 1, *(x for pair in flags for x in pair))
        for side in ("query_marginals", "key_marginals"):
            size = sum(abs(m["value"]) for m in qk[side])
            for mine, theirs in zip(place[side], qk[side], strict=False):
                within("marginal", mine["value"], theirs["value"], 1e-5, size)
                assert (mine["kind"], mine["index"]) == (theirs["kind"], theirs["index"])
    only = run("marginals", "./result", "--attention", 0, "--query", "-1", "--key", 1, "--layer", 1,
               "--head", 2)  # fmt: skip
    assert [(p["head"], p["query"], p["key"]) for p in only["places"]] == [(2, 5, 1)]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("pairs", *PROMPT), "terms searched"),
        (("pairs", "-m", "model", "-s", "saes", "--layer", "1", "--head", "0"), "Norm scales"),
        (("marginals", *PROMPT), "Where heads look"),
    ],
)
def test_tables_and_figures_of_everything(run, tmp_path, arguments, said):
    pytest.importorskip("matplotlib", reason="figures are an extra")
    figure = tmp_path / "f.svg"
    assert said in run(*arguments, "--figure", figure, json_=False)
    assert "<svg" in figure.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_tables_folders_and_figures(run, root, tmp_path, command):
    pytest.importorskip("matplotlib", reason="figures are an extra")
    figure = tmp_path / "f.png"
    said = run(command, *PROMPT, *PLACE, "--figure", figure, json_=False)
    assert "Head 1.2" in said and figure.read_bytes()[:4] == b"\x89PNG"
    one, two = run(command, "./result", *PLACE), run(command, *PROMPT, *PLACE)
    score = "value" if command == "why" else "score"
    assert one[score] == pytest.approx(two[score], rel=1e-5)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "more, said",
    [
        (("--layer", "9"), "layer 9 is out of range"),
        (("--head", "99"), "head 99 is out of range"),
        (("--query", "0"), "comes after the query"),
        (("--key", "77"), "position"),
        (("--figure", "x.bmp"), "ending names no figure format"),
        (("-m", "nothing"), "no such model"),
    ],
)
def test_bad_places(refused, command, more, said):
    assert said in refused(command, *PROMPT, *PLACE, *more)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("why", *PROMPT, *PLACE, "--form", "x"), "form is 'x'; give odds or log"),
        (("why", *PROMPT, *PLACE[:4], "--query", "0", "--key", "0"), "nothing competes with it"),
        (("distance", *PROMPT, *PLACE, "--max", "0"), "distances should lie in 1.."),
        (("mechanisms", *PROMPT, *PLACE, "--more", "absent.txt"), "cannot read absent.txt"),
        (("mechanisms", "./result", *PLACE, "--more", "more.txt"), "--more goes with a prompt"),
        (("qk", *PROMPT, *PLACE, "--groups", "twice.toml"), "in the groups 'a' and 'b'"),
        (("qk", *PROMPT, *PLACE, "--groups", "absent.toml"), "cannot read absent.toml"),
        (("qk", *PROMPT, *PLACE, "--label", "zebra"), "no feature has a label"),
        (("pairs", *PROMPT, "--layer", "9"), "layer 9 is out of range"),
        (("pairs", *PROMPT, "--layer", "1", "--head", "99"), "head 99 is out of range"),
        (("pairs", *PROMPT, "--head", "1"), "--head is a head of one block; give --layer too"),
        (("pairs", *PROMPT, "--distance", "1"), "--distance goes without a prompt"),
        (("pairs", *PROMPT, "--top", "0"), "top should lie in 1..4096, got 0"),
        ((*WEIGHTS[:-2],), "give --layer and --head, or a prompt"),
        ((*WEIGHTS, "--head", "0", "--all"), "--all goes with a prompt"),
        ((*WEIGHTS, "--head", "0", "--distance", "9999"), "distance 9999 should lie in 0.."),
        ((*WEIGHTS, "--head", "0", "--typical"), "without cards for boundary 1 nothing says"),
        ((*WEIGHTS[:-2], "--layer", "0", "--head", "0"), "boundary 0, which has no SAE"),
        (("marginals", *PROMPT, "--attention", "2"), "attention should lie in 0..1, got 2"),
        (("marginals", *PROMPT, "--top", "9999"), "top should lie in 1.."),
        (("marginals", *PROMPT, "--query", "zebra"), "no token 'zebra' in the prompt"),
    ],
)
def test_bad_input(refused, arguments, said):
    assert said in refused(*arguments)
