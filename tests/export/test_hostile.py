"""Prompts, tokens, labels and paths that a page or a terminal must show and not act on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import folders
import pytest

import qkattr
from qkattr.cli.main import main
from qkattr.errors import printable


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    folders.write_model(root / "text", tokenizer=True)
    folders.write_saes(root / "saes")
    return root


@pytest.fixture(scope="module")
def hostile(root):
    bundle = qkattr.load(root / "text", root / "saes")
    return qkattr.trace(bundle, " ".join(folders.HOSTILE), qk=3)


def test_hostile_tokens_are_tokens(hostile):
    assert set(folders.HOSTILE) <= set(hostile.tokens)


def test_hostile_text_on_the_page(hostile):
    from qkattr.export.html import page

    html = page(hostile)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "49" not in html.split("{{ 7*7 }}")[0][-3:] and "{{ 7*7 }}" in html
    assert all(c.isprintable() or c == "\n" for c in html)
    assert len(html) < 200_000
    assert "<script" not in hostile._repr_html_()


def test_hostile_text_round_trip(hostile, tmp_path):
    hostile.save(tmp_path / "out")
    assert qkattr.open(tmp_path / "out").tokens == hostile.tokens


@pytest.mark.parametrize("color", [False, True])
def test_hostile_text_on_the_terminal(root, capsys, monkeypatch, color):
    monkeypatch.chdir(root)
    if color:
        monkeypatch.setenv("FORCE_COLOR", "1")
    prompt = " ".join(folders.HOSTILE)
    where = ["-m", "text", "-s", "saes"]
    place = ["--layer", "1", "--head", "2", "--query", "-1", "--key", "1"]
    for command in (
        ["tokens", prompt, "-m", "text"],
        ["trace", prompt, *where],
        ["qk", prompt, *where, *place],
        ["heads", prompt, *where, "--from", "1", "--to", "-1"],
    ):
        assert main(command) == 0
        out, err = capsys.readouterr()
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out) if color else out
        assert err == "" and all(c.isprintable() or c == "\n" for c in plain)
        assert "\x1b[31m" not in out and len(out) < 50_000
        assert color or "[bold red]x[/]" in "".join(out.split("\n")) or command[0] != "tokens"


def test_hostile_text_as_json(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    assert main(["tokens", " ".join(folders.HOSTILE), "-m", "text", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and out.rstrip("\n").isprintable()
    assert set(folders.HOSTILE) <= {row["token"] for row in json.loads(out)["tokens"]}


def test_paths_that_are_no_unicode(root, capsys, tmp_path):
    model, out = (os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/m\xff", b"/o\xff"))
    shutil.copytree(root / "text", model)
    assert main(["trace", "hi hi", "-m", model, "-s", str(root / "saes"), "--out", out]) == 0
    assert r"/o\udcff/index.html" in capsys.readouterr().out
    assert qkattr.open(out).settings["model"] == model
    assert r"/m\udcff" in (Path(out) / "index.html").read_text(encoding="utf-8")


def test_labels_with_half_a_surrogate_pair(hostile, tmp_path):
    hostile.labels[1, 3] = "a\udc80\x1b[0m<b>"
    hostile.save(tmp_path / "out")
    assert qkattr.open(tmp_path / "out").labels[1, 3] == "a\udc80\x1b[0m<b>"
    del hostile.labels[1, 3]


def test_json_has_no_nan():
    from qkattr.files import dumps

    value = {"a": [1.5, float("nan"), (float("-inf"),)], "b": {"c": "NaN"}}
    assert json.loads(dumps(value)) == {"a": [1.5, None, [None]], "b": {"c": "NaN"}}


def test_printable():
    assert printable("a\x1b\u202e\ud800\n é") == r"a\x1b\u202e\ud800\n é"


def test_a_reader_that_has_seen_enough(root):
    command = [sys.executable, "-c", "from qkattr.cli.entry import run; run()", "tokens"]
    command += ["--ids", ",".join(["7"] * 64), "-m", str(root / "text"), "--json"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
