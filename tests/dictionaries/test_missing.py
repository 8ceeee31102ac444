"""--missing raw: a boundary without an SAE is one error component, here and in a saved result."""

import json

import folders
import numpy as np
import pytest

import qkattr
from qkattr.cli.main import main
from qkattr.kinds import Kind


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("missing")
    folders.write_model(root / "model", blocks=3)
    folders.write_saes(root / "saes", boundaries=(1, 3))
    return root


def test_a_missing_boundary_is_an_error_by_default(refused):
    for command in (["trace", "1,2,3", "--ids"], ["check"]):
        line = refused(*command, "-m", "model", "-s", "saes")
        assert "saes has no SAE for boundary 2; expected one after every block" in line
        assert "--missing raw" in line
    assert "missing is 'zero', expected error or raw" in refused(
        "trace", "1,2,3", "--ids", "-m", "model", "-s", "saes", "--missing", "zero"
    )


def test_raw_makes_it_one_error_node(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    command = ["trace", "5,9,7,11", "--ids", "-m", "model", "-s", "saes", "--missing", "raw"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    result = qkattr.open(tmp_path / "out")
    assert result.settings["missing"] == "raw"
    nodes = result.graph.nodes
    kinds = {b: set(np.asarray(nodes.kind)[np.asarray(nodes.boundary) == b]) for b in (1, 2, 3)}
    assert Kind.FEATURE in kinds[1] and Kind.FEATURE in kinds[3]
    assert Kind.ERROR in kinds[2] and not kinds[2] & {Kind.FEATURE, Kind.BIAS}
    place = ["--layer", "0", "--head", "0", "--query", "2", "--key", "1"]
    assert main(["why", str(tmp_path / "out"), *place]) == 0  # its settings open the same set


def test_check_passes_over_it(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    np.save(root / "rows.npy", np.arange(64).reshape(2, 32))
    command = ["check", "-m", "model", "-s", "saes", "--missing", "raw", "--text", "rows.npy"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [c["boundary"] for c in report["boundaries"]] == [1, 3]


def test_the_packed_file_and_the_library_do_the_same(root, tmp_path):
    from qkattr.load.dictionaries.packing import pack_saes

    pack_saes(root / "saes", tmp_path / "packed.gguf")
    for saes in (root / "saes", tmp_path / "packed.gguf"):
        bundle = qkattr.load(root / "model", saes, missing="raw")
        assert [d is None for d in bundle.dictionaries] == [True, False, True, False]
