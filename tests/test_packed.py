"""Packed SAEs: what they stand for by hand-written loops, what packing costs, what is refused."""

import dataclasses
import json
import os
import re

import folders
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_blockwise import EIGHT_BITS, FLOAT16, FOUR_BITS, naive
from test_load_saes import MODEL, D, M, tensors, v6, write

import qkattr
from qkattr.cli import demo as demo_command
from qkattr.cli.main import main
from qkattr.errors import InputError
from qkattr.load import opening as bundle_module
from qkattr.load import smollm2
from qkattr.load.dictionaries import load_saes
from qkattr.load.dictionaries.blockwise import relative_error
from qkattr.load.dictionaries.packed import METADATA, check_packed, open_packed, pack_saes

KINDS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


# Files


def write_set(root, architecture="topk", **options):
    for i, hook in enumerate(HOOKS):
        config = v6(hook, architecture, **options)
        write(root / hook, config, tensors(architecture, seed=i))
    return root


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("bits, block, most", [(4, 4, 0.1), (4, 32, 0.1), (8, 4, EIGHT_BITS)])
def test_a_packed_set_is_the_folder(tmp_path, architecture, bits, block, most):
    """d_model 6 is no multiple of the blocks."""
    root = write_set(
        tmp_path / "saes", architecture, normalize_activations="layer_norm",
        apply_b_dec_to_input=False, metadata={"prepend_bos": False},
    )  # fmt: skip
    path = tmp_path / "new" / "saes.safetensors"
    errors = pack_saes(root, path, bits=bits, block=block)
    check_packed(path, MODEL)
    ours, theirs = open_packed(path, MODEL), load_saes(root, MODEL)
    stored = load_file(path)
    assert ours[0] is None and theirs[0] is None and len(ours) == 3
    for hook, error, a, b in zip(HOOKS, errors, ours[1:], theirs[1:], strict=True):
        assert a.config == b.config and a.config.activation == KINDS[architecture]
        for name in ("b_enc_M", "b_dec_D", "threshold_M"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        for name, x, y in (
            ("W_enc", a.w_enc_DM.T, b.w_enc_DM.T),
            ("W_dec", a.w_dec_MD, b.w_dec_MD),
        ):
            parts = {p: stored[f"{hook}.{name}.{p}"] for p in ("codes", "scales", "gain")}
            np.testing.assert_allclose(x, naive(**parts, bits=bits), **FLOAT16)
            assert relative_error(y, x) == getattr(error, name) < most
        assert a.w_enc_DM.shape == (D, M) and (error.bits, a.width) == (bits, M)


def test_wide_boundaries_and_the_same_bytes_again(tmp_path):
    root = write_set(tmp_path / "saes")
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        errors = pack_saes(root, path, wide=(2,))
    assert [e.bits for e in errors] == [4, 8] and errors[1].W_dec < EIGHT_BITS < errors[0].W_dec
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert open_packed(paths[0], MODEL)[2].config.k == 3
    with pytest.raises(InputError, match="has no SAE for boundary 3, which --wide names"):
        pack_saes(root, paths[0], wide=(3,))


@pytest.mark.parametrize("value", [1e6, 1e-12])
def test_weights_beyond_float16(tmp_path, value):
    root = write_set(tmp_path / "saes")
    weights = tensors("topk") | {"W_dec": np.full((M, D), value, np.float32)}
    write(root / HOOKS[0], v6(HOOKS[0], "topk"), weights)
    with pytest.raises(InputError, match="bring it into the range of float16"):
        pack_saes(root, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("options", [dict(bits=3), dict(block=7), dict(block=0), dict(block=2048)])
def test_other_formats_are_refused(tmp_path, options):
    with pytest.raises(
        InputError, match="is not a format; expected 4 or 8 bits, and an even block"
    ):
        pack_saes(write_set(tmp_path / "saes"), tmp_path / "out.safetensors", **options)


# The command line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    folders.write_model(root / "model", tokenizer=True)
    folders.write_saes(root / "saes")
    pack_saes(root / "saes", root / "packed.safetensors")
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
    out = tmp_path / "new" / "saes.safetensors"
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
    said = run("pack", "saes", "--out", tmp_path / "a.safetensors", "-m", "model")
    assert f"{(tmp_path / 'a.safetensors').stat().st_size:,} bytes" in said.replace("\n", "")
    assert "W_dec error" in said and "recovered" not in said
    text = run(
        "pack", "saes", "--out", tmp_path / "a.safetensors", "-m", "model", "--text", "rows.npy"
    )
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
    path = tmp_path / "packed.safetensors"
    pack_saes(root / "saes", path, bits=8)
    paths = (root / "packed.safetensors", path, root / "saes")
    hashes = [qkattr.load(root / "model", saes).saes_hash for saes in paths]
    assert len(set(hashes)) == 3


def test_packing_fails_whole(root, refused, tmp_path, monkeypatch):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refused("pack", "saes", "--out", out, "-m", "model")
    assert "No space left on device; what was there is unchanged" in line
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"old"


def test_what_pack_refuses(refused, root, tmp_path):
    def pack(saes="saes", out=tmp_path / "a.safetensors", model="model", *more):
        return refused("pack", saes, "--out", out, "-m", model, *more)

    assert "is not a .safetensors file" in pack(out=tmp_path)
    assert "is not a .safetensors file" in pack(out=tmp_path / "a.npz")
    assert "cannot write to" in pack(out=root / "rows.npy" / "a.safetensors")
    assert "no such folder" in pack("absent")
    assert "is a file; give the folder" in pack("packed.safetensors")
    saes = ("saes", tmp_path / "a.safetensors", "model")
    assert "--rows says how --text" in pack(*saes, "--rows", 3)
    assert "--bos/--no-bos says how --text" in pack(*saes, "--no-bos")
    assert "--model is missing" in refused("pack", "saes", "--out", tmp_path / "a.safetensors")
    assert "cannot read 'absent.npy'" in pack("saes", tmp_path / "a.safetensors", "model",
                                             "--text", "absent.npy")  # fmt: skip
    assert "which --wide names" in pack("saes", tmp_path / "a.safetensors", "model", "--wide", 9)
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


# Damaged files


def edited(root, path, edit):
    """The packed file with its tensors and metadata changed."""
    with safe_open(root / "packed.safetensors", framework="numpy") as file:
        metadata = json.loads(file.metadata()[METADATA])
    arrays = load_file(root / "packed.safetensors")
    edit(arrays, metadata)
    save_file(arrays, path, {METADATA: json.dumps(metadata)})
    return path


def put(name, value):
    return lambda arrays, metadata: arrays.update({f"{HOOKS[0]}.{name}": value})


def say(**fields):
    return lambda arrays, metadata: metadata["saes"][0].update(fields)


def spoil(name, value):
    def edit(arrays, metadata):
        arrays[f"{HOOKS[0]}.{name}"].reshape(-1)[-1] = value

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a, m: a.pop(f"{HOOKS[1]}.W_dec.codes"), f"lacks {HOOKS[1]}.W_dec.codes"),
        (put("r_mag", np.zeros(3, np.float32)), "holds blocks.0.hook_resid_post.r_mag, which no"),
        (put("W_enc.codes", np.zeros((32, 15), np.uint8)), "is U8 [32, 15], its config"),
        (put("W_enc.codes", np.zeros((32, 16), np.float32)), "is F32 [32, 16], its config"),
        (put("W_enc.scales", np.zeros((32, 1), np.float32)), "is F32 [32, 1], its config"),
        (put("b_enc", np.zeros(32, np.int32)), "b_enc is I32 [32], its config calls for F32"),
        (put("b_dec", np.zeros(31, np.float32)), "b_dec is F32 [31], its config calls for F32"),
        (spoil("W_dec.scales", np.nan), "W_dec.scales holds NaN or infinite values"),
        (spoil("W_dec.scales", np.inf), "W_dec.scales holds NaN or infinite values"),
        (spoil("W_enc.gain", np.nan), "W_enc.gain holds NaN or infinite values"),
        (spoil("W_enc.gain", 1e30), "W_enc holds NaN or infinite values"),
        (spoil("b_enc", -np.inf), "b_enc holds NaN or infinite values"),
        (lambda a, m: m.update(version=2), "has layout 2, this qkattr reads layout 1"),
        (lambda a, m: m.pop("version"), "its metadata does not describe packed SAEs"),
        (lambda a, m: m.pop("saes"), "its metadata does not describe packed SAEs"),
        (lambda a, m: m["saes"].pop(), "has no SAE for boundary 2; expected one after every block"),
        (lambda a, m: m["saes"].append(m["saes"][0]), "two SAEs have one hook"),
        (say(hook_name="blocks.2.hook_resid_pre"), "are both for boundary 2"),
        (say(hook_name="blocks.0.hook_mlp_out"), "was trained at blocks.0.hook_mlp_out"),
        (say(hook_name="blocks.7.hook_resid_post"), "is for boundary 8, the model has 2 blocks"),
        (say(hook_name="\x1b[31m\n" * 200), "was trained at"),
        (say(d_in=17), "SAE at boundary 1 has d_in=17, the model has d_model=16"),
        (say(d_sae=2**60), "its config calls for U8 [1152921504606846976, 16]"),
        (say(d_sae=33), "its config calls for"),
        (say(d_sae=-1), "its metadata does not describe packed SAEs"),
        (say(bits=3), "its metadata does not describe packed SAEs"),
        (say(bits=8), "its config calls for U8 [32, 32]"),
        (say(block=7), "its metadata does not describe packed SAEs"),
        (say(block=2**40), "its metadata does not describe packed SAEs"),
        (say(activation="tanh"), "its metadata does not describe packed SAEs"),
        (say(activation="relu"), "a relu SAE of d_sae=32 cannot have k=5"),
        (say(activation="jumprelu", k=None), "lacks blocks.0.hook_resid_post.threshold"),
        (say(k=None), "a topk SAE of d_sae=32 cannot have k=None"),
        (say(k=33), "a topk SAE of d_sae=32 cannot have k=33"),
        (say(normalize="whiten"), "its metadata does not describe packed SAEs"),
        (say(a_new_thing=True), "its metadata does not describe packed SAEs"),
    ],
)  # fmt: skip
def test_damaged_files(refused, root, tmp_path, edit, message):
    path = edited(root, tmp_path / "damaged.safetensors", edit)
    assert message in refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "null", '{"version": {}}', '{"version": 1e999}', "\\"]
)
def test_metadata_that_is_no_json(refused, root, tmp_path, text):
    path = tmp_path / "damaged.safetensors"
    save_file(load_file(root / "packed.safetensors"), path, {METADATA: text})
    refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files(refused, root, tmp_path, keep):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes((root / "packed.safetensors").read_bytes()[:keep])
    line = refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)
    assert "is not a whole safetensors file" in line


def test_files_of_something_else(refused, root):
    sae = next((root / "saes").rglob("*.safetensors"))
    for path in (sae, root / "model" / "model.safetensors"):
        line = refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)
        assert "is not a packed set of SAEs" in line
    line = refused("tokens", "1,2", "--ids", "-m", "model", "-s", root / "rows.npy")
    assert "is not a whole safetensors file" in line


def test_another_model(refused, root, tmp_path):
    folders.write_model(tmp_path / "wide", d=20)
    packed = root / "packed.safetensors"
    line = refused("tokens", "1,2", "--ids", "-m", tmp_path / "wide", "-s", packed)
    assert "SAE at boundary 1 has d_in=16, the model has d_model=20" in line


def test_the_header_is_checked_without_the_values(root, tmp_path):
    path = edited(root, tmp_path / "damaged.safetensors", spoil("W_dec.scales", np.nan))
    config = qkattr.load(root / "model").config
    check_packed(path, config)
    with pytest.raises(InputError, match="scales holds NaN"):
        open_packed(path, config)


# The set in the package


def test_a_package_without_its_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_DATA", tmp_path)
    for path in (smollm2.saes_path, smollm2.cards_path):
        with pytest.raises(InputError, match="is missing from the package; install qkattr again"):
            path()


def test_smollm2_may_be_the_packed_file(root, monkeypatch):
    monkeypatch.setattr(smollm2, "saes_path", lambda: root / "packed.safetensors")
    bundle = qkattr.load(root / "model", "smollm2")
    assert [d is None for d in bundle.dictionaries] == [True, False, False]


def test_demo_is_a_trace(run, root, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "saes_path", lambda: root / "packed.safetensors")
    real = dataclasses.replace(qkattr.load(root / "model", "smollm2"), read_cards=None)
    monkeypatch.setattr(bundle_module, "open_bundle", lambda *names, **options: real)
    monkeypatch.setattr(demo_command, "PROMPT", "hi hi hi 12")
    said = run("demo", "--out", tmp_path / "page").replace("\n", " ")
    assert f"Open {tmp_path / 'page' / 'index.html'}" in said
    assert (tmp_path / "page" / "index.html").is_file()
