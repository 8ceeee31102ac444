"""A small traced prompt, its edits, and the command line."""

from __future__ import annotations

import json

import folders
import pytest
from steering import (
    BLOCKS,
    KEY,
    PROMPT,
    QUERY,
    SALLY,
)

import qkattr
from qkattr.cli.main import main


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("steer")
    folders.write_model(root / "model", blocks=BLOCKS, tokenizer=True)
    folders.write_saes(root / "saes", boundaries=range(1, BLOCKS + 1))
    return root


@pytest.fixture(scope="session")
def bundle(root):
    return qkattr.load(root / "model", root / "saes")


@pytest.fixture(scope="session")
def result(bundle):
    return qkattr.trace(bundle, PROMPT, qk=0)


@pytest.fixture(scope="session")
def edits(result):
    """Every head, four features a block."""
    return qkattr.choose_edits(result, source=KEY, target=QUERY, heads="100%", by="influence")


@pytest.fixture
def cli(root, capsys, monkeypatch):
    """Runs `qkattr steer` of the prompt, or of what is given, and returns its JSON."""
    monkeypatch.chdir(root)

    def run(*more, prompt=(PROMPT, "-m", "model", "-s", "saes")):
        assert main(["steer", *prompt, "--json", *map(str, more)]) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.count("\n") == 1
        return json.loads(out)

    return run


@pytest.fixture(scope="session")
def sally():
    return qkattr.trace(qkattr.load("smollm2", "smollm2"), SALLY, qk=0)
