"""PROMPT|DIR: a word that looks like a folder is not explained as text unless it is said to be."""

from __future__ import annotations

import folders
import pytest

import qkattr
from qkattr.cli.main import main

PLACE = ("--layer", "1", "--head", "0", "--query", "-1", "--key", "0")
COMMANDS = {
    "qk": PLACE,
    "why": PLACE,
    "mechanisms": PLACE,
    "distance": PLACE,
    "heads": ("--from", "0", "--to", "-1"),
    "marginals": (),
    "pairs": (),
    "steer": ("--edit", "1:0@0:key:1.0"),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a result in `demo` and one without in `empty`."""
    root = tmp_path_factory.mktemp("here")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    (root / "empty").mkdir()
    qkattr.trace(qkattr.load(root / "model", root / "saes"), "hi hi 12").save(root / "demo")
    return root


@pytest.fixture
def refused(here, monkeypatch, capsys):
    monkeypatch.chdir(here)

    def run(*arguments) -> str:
        assert main([*arguments, "-m", "model", "-s", "saes"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_nearly_the_name_of_a_folder(refused, command):
    said = refused(command, "dem0", *COMMANDS[command])
    assert "'dem0' is no folder; 'demo' is one; give a folder" in said and "--as-text" in said


@pytest.mark.parametrize("word", ["demos", "Demo", "demoo", "out/demo", "./demo2", "demo2/", "~/x"])
def test_what_looks_like_a_folder(refused, word):
    assert "is no folder" in refused("qk", word, *PLACE)


def test_a_folder_without_a_result(refused):
    assert "'empty' is a folder without a result" in refused("qk", "empty", *PLACE)


@pytest.mark.parametrize("prompt", ["hi hi", "dem0 hi", "either/or hi", "hi", "12hi", "./ hi"])
def test_text_is_text(here, monkeypatch, capsys, prompt):
    monkeypatch.chdir(here)
    place = ("--layer", "1", "--head", "0", "--query", "-1", "--key", "0", "--top", "1")
    assert main(["qk", prompt, *place, "-m", "model", "-s", "saes"]) == 0
    assert "Head 1.0 at" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["dem0", "a/b", "demo"])
def test_as_text(here, monkeypatch, capsys, word):
    monkeypatch.chdir(here)
    place = (*PLACE, "--top", "1", "--as-text")
    assert main(["qk", word, *place, "-m", "model", "-s", "saes"]) == 0
    assert f"at '{word[-1]}' {len(word)} looks at '<s>' 0" in capsys.readouterr().out


def test_a_folder_that_is_one(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    assert main(["heads", "demo", "--from", "1", "--to", "2"]) == 0
    assert "Heads that matter" in capsys.readouterr().out
