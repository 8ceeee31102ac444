"""`qkattr features`: what it makes, prints, exports, imports and refuses."""

from __future__ import annotations

import gzip
import json
import re

import folders
import numpy as np
import pytest

import qkattr
from qkattr.cli.main import main
from qkattr.export.feature_json import feature_json
from qkattr.features import Cards, with_cards
from qkattr.load.opening import load


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    rng = np.random.default_rng(1)
    ids = rng.integers(1, folders.VOCAB, (24, 16)).astype(np.uint16)
    ids[:, 0] = 0
    np.save(root / "rows.npy", ids)
    np.save(root / "floats.npy", ids.astype(float))
    code = main([str(a) for a in MAKE(root)])
    assert code == 0
    return root


def MAKE(root, out="cards.npz"):
    return [
        *("features", "--model", root / "model", "--saes", root / "saes"),
        *("--text", root / "rows.npy", "--length", 16, "--batch", 6, "--out", root / out),
    ]


@pytest.fixture
def run(root, capsys, monkeypatch):
    monkeypatch.chdir(root)

    def run(*arguments, code=0):
        found = main(["features", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert found == code, err
        if code:
            assert out == "" and re.fullmatch(r"qkattr: [^\n]+\n", err)
            assert err.rstrip("\n").isprintable()
            return err
        assert err == ""
        return out

    return run


def explanations(path, rows, compress=True):
    text = "\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())


def explained(layer="0-small-res-32", index="3", description="names of aunts", **rest):
    return dict(modelId="small", layer=layer, index=index, description=description, **rest)


def test_the_command_makes_cards(root):
    made = Cards.open(root / "cards.npz")
    assert made.boundaries.tolist() == [1, 2] and len(made) == 2 * folders.WIDTH
    assert made.meta["text"] == "rows.npy" and made.meta["text_rows"] == 24
    assert not (root / "cards.npz.scan").exists()
    assert made.norms.attn.shape == (2,) and made.norms.q.shape == (2, folders.HEADS)


def test_the_command_prints_a_card(run, root):
    card = Cards.open(root / "cards.npz").card(2, 5)
    out = run("--cards", "cards.npz", "--boundary", 2, "--index", 5)
    assert f"Feature 2:5  {card.label}"[:60] in out and "Top:" in out and "Quantile 0.9" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    value = json.loads(run("--cards", "cards.npz", "--boundary", 2, "--index", 5, "--json"))
    assert value == json.loads(json.dumps(feature_json(card)))


def test_the_command_searches_and_sums_up(run, root):
    made = Cards.open(root / "cards.npz")
    found = json.loads(run("--cards", "cards.npz", "--search", "E.G.", "--json"))["features"]
    expected = [(b, i) for (b, i), text in made.labels().items() if "e.g." in text]
    assert [(r["boundary"], r["index"]) for r in found] == expected != []
    assert "64 features" in run("--cards", "cards.npz", "--search", "") or expected
    one = json.loads(run("--cards", "cards.npz", "--boundary", 2, "--json"))
    assert [row["boundary"] for row in one["boundaries"]] == [2]
    assert one["boundaries"][0]["features"] == folders.WIDTH
    assert "Feature cards of" in run("--cards", "cards.npz")


def test_the_command_exports(run, root, tmp_path):
    run("--cards", "cards.npz", "--export", tmp_path / "a")
    assert len(list((tmp_path / "a" / "features" / "model").iterdir())) == 2 * folders.WIDTH
    run("--cards", "cards.npz", "--export", tmp_path / "b", "--boundary", 1)
    assert len(list((tmp_path / "b" / "features" / "model").iterdir())) == folders.WIDTH


@pytest.mark.parametrize("compress", [True, False])
def test_explanations_become_labels(run, root, tmp_path, compress):
    rows = [explained(), explained(index="3", description="second"), explained(layer="1-x-res")]
    explanations(tmp_path / "e.jsonl.gz", rows, compress)
    run("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", "--out", tmp_path / "new.npz")
    made = Cards.open(tmp_path / "new.npz")
    assert made.label(1, 3) == made.label(2, 3) == "names of aunts"
    given = made.card(1, 3)
    assert given.given and given.auc is given.strong_auc is None
    assert not made.card(1, 4).given
    assert made.label(1, 4) == Cards.open(root / "cards.npz").label(1, 4)
    assert "was given" in run("--cards", tmp_path / "new.npz", "--boundary", 1, "--index", 3)
    run("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", "--out", tmp_path / "pre.npz",
        "--resid-pre", code=2)  # fmt: skip
    explanations(tmp_path / "pre.jsonl", [explained(layer="1-x-res-jb")], compress=False)
    run("--cards", "cards.npz", "--labels", tmp_path / "pre.jsonl", "--out", tmp_path / "pre.npz",
        "--resid-pre")  # fmt: skip
    assert Cards.open(tmp_path / "pre.npz").label(1, 3) == "names of aunts"


def test_own_labels_become_labels(run, root, tmp_path):
    (tmp_path / "own.json").write_text('{"2:7": "my label"}')
    run("--cards", "cards.npz", "--labels", tmp_path / "own.json", "--out", tmp_path / "o.npz")
    assert Cards.open(tmp_path / "o.npz").label(2, 7) == "my label"


@pytest.mark.parametrize(
    "row,said",
    [
        (explained(layer="9-small-res-32"), "boundary 10; expected boundaries 1..2"),
        (explained(layer="0-small-mlp-32"), "not a set of SAEs over the residual stream"),
        (explained(layer="final"), "not a set of SAEs over the residual stream"),
        (explained(index="32"), "boundary 1 has 0..31"),
        (explained(index="-1"), "boundary 1 has 0..31"),
        (explained(index="many\x1b[31m"), "boundary 1 has 0..31"),
        (explained(description=None), "expected text"),
        (dict(layer="0-x", index="1"), "has no description"),
        ("{", "is not JSON"),
        ("[1]", "expected an object"),
        ("", "holds no explanations"),
    ],
)
def test_bad_explanations_are_refused(run, root, tmp_path, row, said):
    explanations(tmp_path / "bad.jsonl.gz", [row])
    before = (root / "cards.npz").read_bytes()
    assert said in run("--cards", "cards.npz", "--labels", tmp_path / "bad.jsonl.gz", code=2)
    assert (root / "cards.npz").read_bytes() == before


def test_explanations_of_another_boundary_are_refused(run, tmp_path):
    explanations(tmp_path / "e.jsonl.gz", [explained()])
    given = ("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", "--boundary", 2)
    assert "expected boundary 2" in run(*given, code=2)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(999))[:-300])
    assert "damaged" in run("--cards", "cards.npz", "--labels", tmp_path / "e.jsonl.gz", code=2)


CARDS = ("--cards", "cards.npz")


@pytest.mark.parametrize(
    "arguments,said",
    [
        (("--labels", "own.json"), "--out is missing"),
        (("--text", "rows.npy", *CARDS), "give one of the two"),
        (("--text", "rows.npy"), "--model is missing"),
        (("--text", "rows.npy", "--model", "model"), "--saes is missing"),
        (("--text", "rows.npy", "--model", "model", "--saes", "saes"), "--out is missing"),
        (("--text", "rows.npy", "--index", 3), "--index goes with --cards"),
        ((*CARDS, "--index", 3), "give --boundary too"),
        ((*CARDS, "--model", "model"), "--model goes with --text"),
        (("--boundary", 1, "--index", 3, "--saes", "saes"), "--saes goes with --text"),
        ((*CARDS, "--rows", 9), "--rows goes with --text"),
        ((*CARDS, "--no-bos"), "--bos/--no-bos goes with --text"),
        ((*CARDS, "--out", "new.npz"), "--out goes with --text or --labels"),
        (("--text", "rows.npy", "--boundary", 1), "--boundary goes with --cards"),
        (("--text", "rows.npy", "--json"), "--json goes with --cards"),
        ((*CARDS, "--index", 3, "--boundary", 1, "--search", "x"), "expected one of them"),
        ((*CARDS, "--index", 99, "--boundary", 1), "give one of 0..31"),
        ((*CARDS, "--index", -1, "--boundary", 1), "give one of 0..31"),
        ((*CARDS, "--index", 1, "--boundary", 7), "boundaries 1..2"),
        ((*CARDS, "--boundary", 7), "boundaries 1..2"),
        ((*CARDS, "--search", "no such label"), "none of 64 labels"),
        ((*CARDS, "--resid-pre"), "give --labels"),
        ((*CARDS, "--labels", "absent.jsonl.gz"), "cannot read"),
        ((*CARDS, "--export", "rows.npy"), "cannot write"),
        (("--cards", "absent.npz"), "no such file"),
        (("--cards", "rows.npy"), "no feature cards"),
    ],
)
def test_the_command_refuses(run, arguments, said):
    assert said in run(*arguments, code=2)


@pytest.mark.parametrize(
    "change,said",
    [
        (("--text", "absent.npy"), "no such file"),
        (("--text", "floats.npy"), "expected integers"),
        (("--out", "saes"), "is a folder"),
        (("--length", 500), "expected rows of 500"),
        (("--saes", "model"), "SAE"),
    ],
)
def test_making_cards_refuses(run, root, change, said):
    assert said in run(*MAKE(root, "other.npz")[1:], *change, code=2)
    assert not (root / "other.npz").exists()


def test_trace_takes_cards(root, capsys, tmp_path):
    given = ["trace", "hi 12 hi", "-m", root / "model", "-s", root / "saes", "--json"]
    assert main([str(a) for a in [*given, "--cards", root / "cards.npz"]]) == 0
    made = Cards.open(root / "cards.npz")
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    features = [n for n in nodes if n["kind"] == "feature"]
    assert features
    assert all(n["clerp"] == made.label(n["boundary"], n["index"]) for n in features)
    assert main([str(a) for a in [*given, "--cards", root / "rows.npy"]]) == 2


def test_the_page_shows_the_cards_of_what_it_names(root, tmp_path):
    """Each feature that the page names links to its card, which is there once, also when opened."""
    hostile = "<img src=x>\u202e"
    opened = Cards.open(root / "cards.npz")
    every = {feature: f"{hostile} {feature}" for feature in opened.labels()}
    every |= {(b, 0): hostile for b in opened.boundaries.tolist()}
    bundle = with_cards(load(root / "model", root / "saes"), opened.with_labels(every))
    result = qkattr.trace(bundle, "hi 12 hi", qk=4)
    html = result.save(tmp_path / "out").read_text()
    linked = set(re.findall(r'href="#f(\d+-\d+)"', html))
    assert linked and linked == {f"{b}-{i}" for b, i in result.cards}
    assert all(html.count(f'id="f{name}"') == 1 for name in linked)
    for example in next(iter(result.cards.values())).examples:
        assert f"{example.activation:.3g}" in html
    assert "<img" not in html and "\u202e" not in html
    again = qkattr.open(tmp_path / "out")
    assert again.cards == result.cards
    again.to_html(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html
