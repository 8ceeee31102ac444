"""Saved results that are damaged, or do not belong to the model: one line and exit code 2."""

# ruff: noqa: F811 (fixtures of another module)
import json
import shutil

import numpy as np
import pytest
from test_bad_input import PLACE, root  # noqa: F401

import qkattr
from qkattr.errors import InputError


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root / "result", tmp_path / "copy")


def edit_json(folder, edit):
    raw = json.loads((folder / "graph.json").read_text())
    edit(raw)
    (folder / "graph.json").write_text(json.dumps(raw))


def test_folders_that_hold_no_result(refused, tmp_path, copy):
    assert "has no graph.json; expected a folder that `qkattr trace --out` wrote" in refused(
        "qk", tmp_path, *PLACE
    )
    (copy / "graph.npz").unlink()
    assert "has no graph.npz" in refused("qk", copy, *PLACE)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda r: r["qkattr"].update(schema=99), "has schema 99, this qkattr reads schema 3"),
        (lambda r: r.pop("qkattr"), "is not a qkattr graph"),
        (lambda r: r["qkattr"].pop("provenance"), "is not a qkattr graph"),
        (lambda r: r["qkattr"]["provenance"].update(run="x"), "graph.npz of different runs"),
        (lambda r: r["qkattr"].pop("leak"), "holds a damaged result (KeyError: 'leak')"),
        (lambda r: r["qkattr"].update(tokens=["a"]), "holds a damaged result"),
        (lambda r: r["qkattr"].update(scores=[1, 2]), "holds a damaged result"),
        (lambda r: r["qkattr"].update(qk={"0.0.0.0": {}}), "holds a damaged result"),
        (lambda r: r["qkattr"].update(labels={"x": "y"}), "holds a damaged result"),
    ],
)
def test_damaged_json(refused, copy, edit, message):
    edit_json(copy, edit)
    assert message in refused("qk", copy, *PLACE)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\xff"])
def test_json_that_is_none(refused, copy, text):
    (copy / "graph.json").write_bytes(text.encode("latin-1"))
    assert "is not a qkattr graph" in refused("qk", copy, *PLACE)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("how", ["cut", "overwritten"])
def test_damaged_columns(refused, copy, where, how):
    path = copy / "graph.npz"
    whole = path.read_bytes()
    at = int(where * len(whole))
    noise = b"" if how == "cut" else bytes(range(251, 0, -1)) + whole[at + 251 :]
    path.write_bytes(whole[:at] + noise)
    line = refused("qk", copy, *PLACE)
    assert "graph.npz is damaged; write it again" in line or "holds a damaged result" in line


def test_columns_that_point_nowhere(refused, copy):
    with np.load(copy / "graph.npz") as data:
        columns = dict(data)
    for name, column in (
        ("edges.source", columns["edges.source"] + 10_000),
        ("edges.heads", columns["edges.heads"][1:]),
    ):
        np.savez(copy / "graph.npz", **columns | {name: column})
        assert "holds a damaged result (ValueError" in refused("qk", copy, *PLACE)


def test_columns_of_another_run(refused, root, copy):
    bundle = qkattr.load(root / "model", root / "saes")
    qkattr.trace(bundle, [1, 2, 3], qk=0).save(copy.parent / "second")
    shutil.copy(copy.parent / "second" / "graph.npz", copy)
    assert "holds graph.json and graph.npz of different runs" in refused("qk", copy, *PLACE)


def test_results_of_another_model(refused, root):
    place = ("--layer", 0, "--head", 0, "--query", 2, "--key", 0)
    line = refused("qk", "result/", *place, "-m", "other")
    assert "the result was made with other model" in line
    line = refused("qk", "result/", *place, "-s", "other_saes")
    assert "the result was made with other SAEs" in line
    with pytest.raises(InputError, match="made with other model"):
        qkattr.open(root / "result", bundle=qkattr.load(root / "other", root / "saes"))


def test_prompt_options_do_not_go_with_a_result(refused):
    assert "--ids goes with a prompt" in refused("qk", "result/", "--ids", *PLACE)
    assert "--no-sink goes with a prompt" in refused("qk", "result/", "--no-sink", *PLACE)
