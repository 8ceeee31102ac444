"""What `qkattr steer` prints, and its figures."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ElementTree

import folders
import pytest
from steering import (
    CLEAN,
    KEY,
    PROMPT,
    QUERY,
    SAME,
    p_top,
)

import qkattr
from qkattr import Edit
from qkattr.cli.main import main

# On the command line ------------------------------------------------------------------------------


def check_steering(said, n_scales: int):
    assert set(said) >= {
        *("tokens", "scales", "clean", "top", "tracked", "kl", "query", "patterns", "scores"),
        *("rose", "edits", "ablated", "n_heads", "share_of_heads", "freeze_others", "live_scales"),
        "keys",
    }
    for name in ("scales", "top", "kl", "patterns", "scores"):
        assert len(said[name]) == n_scales
    for top in (said["clean"], *said["top"]):
        assert len(top) == 10
        for token in top:
            assert set(token) == {"token", "id", "probability"}
            assert isinstance(token["token"], str) and isinstance(token["id"], int)
        p = [token["probability"] for token in top]
        assert p == sorted(p, reverse=True) and 0 < sum(p) <= 1 + SAME
    assert all(len(p) == n_scales for p in said["tracked"].values())
    edited = {head for edit in said["edits"] for head in edit["heads"]}
    for patterns, scores in zip(said["patterns"], said["scores"], strict=True):
        assert set(patterns) == set(scores) == edited
        for head, row in patterns.items():
            assert re.fullmatch(r"\d+\.\d+", head) and len(row) == len(said["tokens"])
            assert math.isclose(sum(row), 1, abs_tol=1e-5) and min(row) >= 0
            assert not any(row[said["query"] + 1 :])
            assert len(scores[head]) == said["query"] + 1
    keys = {"boundary", "kind", "index", "activation", "label", "position", "token", "side"}
    assert all(set(edit) == keys | {"heads"} for edit in said["edits"])


def test_json(cli):
    said = cli("--edit", f"1:error@{KEY}:key:1.0,1.2", "--scales", "2,1", "--track", "hi")
    check_steering(said, 2)
    assert said["scales"] == [2, 1] and said["query"] == QUERY
    assert list(said["tracked"])[0] == "hi" and said["kl"][1] < CLEAN
    assert (said["freeze_others"], said["live_scales"], said["ablated"]) == (False, False, [])
    said = cli(
        *("--edit", f"1:error@{KEY}:key:1.0,1.2", "--edit", "0:token@*:query:0.3"),
        *("--edit", "2:error@4:residual", "--ablate", "2.1", "--freeze-others", "--live-scales"),
        *("--scales", "0", "--query", 5),
    )
    check_steering(said, 1)
    assert said["query"] == 5 and said["ablated"] == ["2.1"]
    assert said["freeze_others"] and said["live_scales"]
    assert {edit["kind"] for edit in said["edits"]} == {"error", "token"}
    check_steering(cli("--ablate", "0.1,2.2", "--scales", "0,1"), 2)


def test_json_of_chosen_edits(cli, result):
    ends = ("--from", KEY, "--to", -1, "--heads", 8)
    said = cli(*ends, "--hydra", "--features", 2, "--scales", "0,1")
    check_steering(said, 2)
    chosen = qkattr.choose_edits(result, source=KEY, target=-1, heads=8, features=2)
    steering = qkattr.steer(result, chosen, scales=[0, 1])
    assert [edit["index"] for edit in said["edits"]] == [e["index"] for e in steering.edits]
    assert said["kl"] == pytest.approx(steering.kl, abs=SAME)
    nested = said["hydra"]
    assert set(nested) == {"token", "scale", "heads", "counts", "live", "frozen", "compensation"}
    assert set(nested["heads"]) == set(said["patterns"][0])
    assert nested["live"]["p"][-1] == pytest.approx(p_top(result, steering)[0], abs=SAME)
    for way in ("live", "frozen"):
        assert set(nested[way]) == {"p", "token", "flip"}
        assert len(nested[way]["p"]) == len(nested[way]["token"]) == len(nested["counts"])
    for more in (("--live-scales",), ("--ablate", "0.1")):
        other = cli(*ends, "--hydra", "--features", 2, *more)["hydra"]
        assert other["live"]["p"] != nested["live"]["p"]
    greedy = cli(*ends[:4], "--heads", "greedy:2", "--side", "query", "--scales", "0")
    assert {edit["side"] for edit in greedy["edits"]} == {"query"}


def test_a_folder_says_the_same_as_its_prompt(cli, result, root):
    result.save(root / "traced")
    more = ("--from", KEY, "--to", -1, "--heads", 6, "--scales", "0,2")
    of_folder = cli(*more, prompt=("traced",))
    assert of_folder == cli(*more)


def test_on_the_terminal(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    where = ("-m", "model", "-s", "saes", "--from", str(KEY), "--to", "-1", "--heads", "100%")
    assert main(["steer", PROMPT, *where, "--hydra", "--ablate", "0.0"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(c.isprintable() or c == "\n" for c in out)
    for said in ("Scaled", "Ablated: 0.0", "Next token", "others frozen", "The prediction "):
        assert said in out


@pytest.mark.parametrize(
    "edit, columns", [(f"1:error@{QUERY}:query:1.0", "attention"), ("1:error@2:residual", "KL")]
)
def test_what_is_followed_is_named(root, capsys, monkeypatch, result, edit, columns):
    """Of query-side edits too, whose table had an empty column."""
    monkeypatch.chdir(root)
    line = ["steer", PROMPT, "-m", "model", "-s", "saes", "--edit", edit, "--scales", "0"]
    assert main(line) == 0
    out, _ = capsys.readouterr()
    steering = qkattr.steer(result, [edit], scales=[0])
    (key,) = steering.keys
    named = f"{steering.tokens[key]!r} {key}"
    assert f"Unedited heads that look at {named}" in " ".join(out.split())
    assert (f"of the edited heads to {named}" in out) == (columns == "attention")
    (header,) = [row for row in out.splitlines() if "says" in row]
    assert header.split()[-1] == columns
    if steering.patterns[0]:
        (row,) = steering.patterns[0].values()
        assert f"{row[key]:.4f}" in out and "1 head, " in out


# Figures ------------------------------------------------------------------------------------------


SIGNATURES = {"svg": b"<?xml", "png": b"\x89PNG\r\n", "pdf": b"%PDF-"}


@pytest.mark.parametrize("ending", SIGNATURES)
def test_figures(result, edits, tmp_path, ending):
    pytest.importorskip("matplotlib")
    steering = qkattr.steer(result, edits, scales=[2, 0, 1])
    for name in ("one", "two"):
        path = qkattr.figure(steering, tmp_path / "new" / f"{name}.{ending}")
        assert path.read_bytes().startswith(SIGNATURES[ending])
    one, two = ((tmp_path / "new" / f"{name}.{ending}").read_bytes() for name in ("one", "two"))
    assert len(one) > 2000 and one == two


def test_figures_of_other_edits(result, tmp_path):
    """Beside the probabilities stands attention, where heads are edited."""
    pytest.importorskip("matplotlib")
    query = [f"1:error@{QUERY}:query:1.0,1.1"]
    for name, edits, ablated in (
        ("query", query, ()),
        ("residual", ["1:error@2:residual"], ()),
        ("ablated", [], [(1, 1)]),
    ):
        steering = qkattr.steer(result, edits, scales=[0, 1], ablate=ablated)
        drawn = qkattr.figure(steering, tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert ("Edited heads, from" in drawn) == (name == "query") and "Next token" in drawn


def test_hostile_tokens_in_a_figure(bundle, tmp_path):
    pytest.importorskip("matplotlib")
    ids = [bundle.tokenizer.bos_id, *(len(folders.TOKENS) + i for i in range(len(folders.HOSTILE)))]
    edit = Edit(1, "error", 1, "key", None)
    asked = qkattr.subject(bundle, ids)
    steering = qkattr.steer(asked, [edit], scales=[0, 1], track=folders.HOSTILE[:3])
    assert steering.tokens[1:] == folders.HOSTILE
    names = [*folders.HOSTILE, "$x_{", r"\$", "_hidden", "$a$"]
    for start in range(0, len(names), 4):
        some = names[start : start + 4]
        at = 1 + start % len(folders.HOSTILE)
        edits = [steering.edits[0] | dict(position=at + i, token="") for i in range(4)]
        changed = dataclasses.replace(
            steering, tracked=dict.fromkeys(some, [0.5, 0.4]), edits=edits, query=at
        )
        drawn = qkattr.figure(changed, tmp_path / "a.svg")
        text = drawn.read_text(encoding="utf-8")
        assert all(c.isprintable() or c == "\n" for c in text) and len(text) < 200_000
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
        assert not tags & {"script", "image", "a", "foreignObject"}
        assert "<script" not in text
    assert qkattr.figure(steering, tmp_path / "a.png").stat().st_size > 2000
