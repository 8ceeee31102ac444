"""Packed SAEs: what they stand for by hand-written loops, what packing costs."""

import dataclasses
import json
import os
import re

import folders
import gguf
import numpy as np
import pytest
from folders import write_packed
from test_load_saes import MODEL, D, M, tensors, v6, write
from test_quantised import EIGHT_BITS, FLOAT16, FOUR_BITS, naive

import qkattr
from qkattr.cli import demo as demo_command
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.load import opening as bundle_module
from qkattr.load import smollm2
from qkattr.load.dictionaries import load_saes
from qkattr.load.dictionaries.packing import pack_saes
from qkattr.load.dictionaries.quantised import relative_error

KINDS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


# Files


def write_set(root, architecture="topk", **options):
    for i, hook in enumerate(HOOKS):
        config = v6(hook, architecture, **options)
        write(root / hook, config, tensors(architecture, seed=i))
    return root


def read(path):
    """The tensors of a GGUF file, by the gguf package's reader: bytes of blocks, and floats."""
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("bits, most", [(4, 0.1), (8, EIGHT_BITS)])
def test_a_packed_set_is_the_folder(tmp_path, architecture, bits, most):
    """d_model 6 is no multiple of the blocks."""
    root = write_set(
        tmp_path / "saes", architecture, normalize_activations="layer_norm",
        apply_b_dec_to_input=False, metadata={"prepend_bos": False},
    )  # fmt: skip
    path = tmp_path / "new" / "saes.gguf"
    errors = pack_saes(root, path, bits=bits)
    folders.check_saes(path, MODEL)
    ours, theirs = load_saes(path, MODEL), load_saes(root, MODEL)
    stored = read(path)
    assert ours[0] is None and theirs[0] is None and len(ours) == 3
    for hook, error, a, b in zip(HOOKS, errors, ours[1:], theirs[1:], strict=True):
        assert a.config == b.config and a.config.activation == KINDS[architecture]
        for name in ("b_enc_M", "b_dec_D", "threshold_M"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for name, x, y in (
            ("W_enc", a.w_enc_DM.T, b.w_enc_DM.T),
            ("W_dec", a.w_dec_MD, b.w_dec_MD),
        ):
            rows, gain = stored[f"{hook}.{name}"], stored[f"{hook}.{name}.gain"]
            np.testing.assert_allclose(x, naive(rows, gain, bits), **FLOAT16)
            assert relative_error(y, x) == getattr(error, name) < most
        assert a.w_enc_DM.shape == (D, M) and (error.bits, a.width) == (bits, M)


def test_wide_boundaries_and_the_same_bytes_again(tmp_path):
    root = write_set(tmp_path / "saes")
    paths = [tmp_path / f"{i}.gguf" for i in range(2)]
    for path in paths:
        errors = pack_saes(root, path, wide=(2,))
    assert [e.bits for e in errors] == [4, 8] and errors[1].W_dec < EIGHT_BITS < errors[0].W_dec
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert load_saes(paths[0], MODEL)[2].config.k == 3
    with pytest.raises(InputError, match="has no SAE for boundary 3, which --wide names"):
        pack_saes(root, paths[0], wide=(3,))


@pytest.mark.parametrize("value", [1e6, 1e-12])
def test_weights_beyond_float16(tmp_path, value):
    root = write_set(tmp_path / "saes")
    weights = tensors("topk") | {"W_dec": np.full((M, D), value, np.float32)}
    write(root / HOOKS[0], v6(HOOKS[0], "topk"), weights)
    with pytest.raises(InputError, match="bring it into the range of float16"):
        pack_saes(root, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("bits", [0, 3, 5, 16])
def test_other_formats_are_refused(tmp_path, bits):
    with pytest.raises(InputError, match="is not a format; expected 4 or 8 bits a weight"):
        pack_saes(write_set(tmp_path / "saes"), tmp_path / "out.gguf", bits=bits)


@pytest.mark.parametrize("d", [1, 31, 33, 64, 100])
def test_rows_are_padded_to_whole_blocks(tmp_path, d):
    """What the rows are padded with takes no part in what is read."""
    rng = np.random.default_rng(d)
    shapes = {"W_enc": (d, M), "W_dec": (M, d), "b_enc": (M,), "b_dec": (d,)}
    weights = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    write(tmp_path / "saes", v6(d_in=d), weights)
    model = dataclasses.replace(MODEL, n_blocks=1, windows=MODEL.windows[:1], d_model=d)
    path = tmp_path / "out.gguf"
    (error,) = pack_saes(tmp_path / "saes", path, bits=8)
    packed, (whole,) = load_saes(path, model)[1], load_saes(tmp_path / "saes", model)[1:]
    assert [t.shape[0] for t in gguf.GGUFReader(path).tensors if t.name.endswith("c")][-1] % 32 == 0
    assert packed.w_dec_MD.shape == (M, d) and packed.w_enc_DM.shape == (d, M)
    assert relative_error(whole.w_dec_MD, packed.w_dec_MD) == error.W_dec < EIGHT_BITS


def test_a_packed_file_can_be_packed_again(tmp_path):
    """What lies on the grid of 4 bits is kept by 8 bits but for its rounding to float16."""
    pack_saes(write_set(tmp_path / "saes"), tmp_path / "one.gguf", bits=4)
    errors = pack_saes(tmp_path / "one.gguf", tmp_path / "two.gguf", bits=8)
    assert all(e.bits == 8 and e.W_dec < EIGHT_BITS for e in errors)


# The command line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_packed(tmp_path_factory.mktemp("packed"))
    ids = np.random.default_rng(0).integers(1, 50, (6, 24)).astype(np.uint16)
    np.save(root / "rows.npy", ids)
    return root


@pytest.fixture
def run(root, capsys, monkeypatch):
    """Runs a command line that must succeed, and returns what it prints."""
    monkeypatch.chdir(root)

    def run(*arguments):
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return run


def test_pack_and_use(run, tmp_path):
    out = tmp_path / "new" / "saes.gguf"
    options = ("--text", "rows.npy", "--rows", 3, "--wide", 2, "--json")
    report = json.loads(run("pack", "saes", "--out", out, "-m", "model", *options))
    assert report["bytes"] == out.stat().st_size and report["rows"] == 3
    assert [b["boundary"] for b in report["boundaries"]] == [1, 2]
    assert [b["bits"] for b in report["boundaries"]] == [4, 8]
    for said, most in zip(report["boundaries"], (FOUR_BITS, EIGHT_BITS), strict=True):
        assert 0 < said["W_dec"] < most and 0 < said["W_enc"] < most
        assert (
            set(said["unexplained_variance"]) == set(said["loss_recovered"]) == {"before", "after"}
        )
    checks = {
        side: json.loads(run("check", "-m", "model", "-s", saes, *options[:4], "--json"))
        for side, saes in (("before", "saes"), ("after", out))
    }
    for side, check in checks.items():
        for mine, theirs in zip(report["boundaries"], check["boundaries"], strict=True):
            assert mine["loss_recovered"][side] == theirs["loss_recovered"]
    trace = json.loads(run("trace", "hi hi", "-m", "model", "-s", out, "--json"))
    assert trace["qkattr"]["bos"].endswith("as the SAEs were trained")
    assert re.fullmatch("[0-9a-f]{64}", trace["qkattr"]["provenance"]["saes_hash"])


def test_pack_as_a_table(run, tmp_path):
    said = run("pack", "saes", "--out", tmp_path / "a.gguf", "-m", "model")
    assert f"{(tmp_path / 'a.gguf').stat().st_size:,} bytes" in said.replace("\n", "")
    assert "W_dec error" in said and "recovered" not in said
    text = run("pack", "saes", "--out", tmp_path / "a.gguf", "-m", "model", "--text", "rows.npy")
    assert "Loss recovered is undefined (-) on these" in text or "Packing lost " in text


@pytest.mark.parametrize(
    "before,after,lost", [(0.8, 0.6, 0.25), (None, 0.6, None), (0.8, None, None)]
)
def test_what_packing_lost(before, after, lost):
    from qkattr.cli.pack import _lost, _said

    row = dict(loss_recovered=dict(before=before, after=after))
    assert _lost(row) == (None if lost is None else pytest.approx(lost))
    said = _said(dict(rows=3, boundaries=[row]))
    assert ("Packing lost 25" in said) == (lost is not None)


def test_hashes_tell_files_apart(root, tmp_path):
    path = tmp_path / "packed.gguf"
    pack_saes(root / "saes", path, bits=8)
    paths = (root / "packed.gguf", path, root / "saes")
    hashes = [qkattr.load(root / "model", saes).saes_hash for saes in paths]
    assert len(set(hashes)) == 3


def test_packing_fails_whole(root, refused, tmp_path, monkeypatch):
    out = tmp_path / "a.gguf"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused("pack", "saes", "--out", out, "-m", "model")
    assert "No space left on device; what was there is unchanged" in line
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"old"


def test_what_pack_refuses(refused, root, tmp_path):
    def pack(saes="saes", out=tmp_path / "a.gguf", model="model", *more):
        return refused("pack", saes, "--out", out, "-m", model, *more)

    assert "is not a .gguf file" in pack(out=tmp_path)
    assert "is not a .gguf file" in pack(out=tmp_path / "a.npz")
    assert "cannot write to" in pack(out=root / "rows.npy" / "a.gguf")
    assert "no such folder" in pack("absent")
    assert "is a file; give the folder" in pack("packed.gguf")
    saes = ("saes", tmp_path / "a.gguf", "model")
    assert "--rows says how --text" in pack(*saes, "--rows", 3)
    assert "--bos/--no-bos says how --text" in pack(*saes, "--no-bos")
    assert "--model is missing" in refused("pack", "saes", "--out", tmp_path / "a.gguf")
    assert "cannot read 'absent.npy'" in pack("saes", tmp_path / "a.gguf", "model",
                                             "--text", "absent.npy")  # fmt: skip
    assert "which --wide names" in pack("saes", tmp_path / "a.gguf", "model", "--wide", 9)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "rows, message",
    [
        (np.zeros(30, int), "holds int64 [30], expected integers [rows, tokens]"),
        (np.zeros((2, 30)), "holds float64 [2, 30], expected integers"),
        (np.full((2, 30), 60_000), "token id 60000, outside the model's vocabulary"),
        (np.full((2, 30), -1), "token id -1, outside"),
        (np.ones((2, 1000), int), "2 rows of 1000 tokens, expected rows of 16 to 64"),
        (np.ones((2, 3), int), "give at least 16 tokens"),
        (np.zeros((0, 30), int), "cannot read"),
        (np.array([[None]]), "it is not a whole array"),
    ],
)
def test_rows_that_are_refused(refused, tmp_path, rows, message):
    np.save(tmp_path / "rows.npy", rows)
    line = refused("check", "-m", "model", "-s", "saes", "--text", tmp_path / "rows.npy")
    assert message in line or rows.size == 0


def test_truncated_rows(refused, root, tmp_path):
    path = tmp_path / "rows.npy"
    for keep in (0, 5, 60, -1):
        path.write_bytes((root / "rows.npy").read_bytes()[:keep])
        line = refused("check", "-m", "model", "-s", "saes", "--text", path)
        assert "it is not a whole array" in line


# The set in the package


def test_a_package_without_its_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_DATA", tmp_path)
    for path in (smollm2.saes_path, smollm2.cards_path):
        with pytest.raises(InputError, match="is missing from the package; install qkattr again"):
            path()


def test_smollm2_may_be_the_packed_file(root, monkeypatch):
    monkeypatch.setattr(smollm2, "saes_path", lambda: root / "packed.gguf")
    bundle = qkattr.load(root / "model", "smollm2")
    assert [d is None for d in bundle.dictionaries] == [True, False, False]


def test_demo_is_a_trace(run, root, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "saes_path", lambda: root / "packed.gguf")
    real = dataclasses.replace(qkattr.load(root / "model", "smollm2"), read_cards=None)
    monkeypatch.setattr(bundle_module, "open_bundle", lambda *names, **options: real)
    monkeypatch.setattr(demo_command, "PROMPT", "hi hi hi 12")
    said = run("demo", "--out", tmp_path / "page").replace("\n", " ")
    assert f"Open {tmp_path / 'page' / 'index.html'}" in said
    assert (tmp_path / "page" / "index.html").is_file()
