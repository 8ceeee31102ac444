"""Packed files that are damaged, or are something else: one line says which."""

import json

import folders
import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType as Kind
from safetensors.numpy import save_file
from test_gguf_container import DAMAGED

import qkattr
from qkattr.errors import InputError
from qkattr.load.dictionaries import load_saes
from qkattr.load.dictionaries.packed import METADATA

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folders.write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(autouse=True)
def there(root, monkeypatch):
    monkeypatch.chdir(root)


def edited(root, path, edit):
    """The packed file with its tensors and metadata changed."""
    reader = gguf.GGUFReader(root / "packed.gguf")
    found = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    metadata = json.loads(reader.fields[METADATA].contents())
    edit(found, metadata)
    return save(path, found, json.dumps(metadata))


def save(path, found, text, kind=Kind.STRING):
    writer = gguf.GGUFWriter(path, "qkattr-saes")
    writer.add_key_value(METADATA, text, kind)
    for name, (array, of) in found.items():
        writer.add_tensor(name, array, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(name, value, kind=None):
    return lambda arrays, metadata: arrays.update({f"{HOOKS[0]}.{name}": (value, kind)})


def say(**fields):
    """A field of an SAE in the metadata, or of its config."""

    def edit(arrays, metadata):
        sae = metadata["saes"][0]
        for name, value in fields.items():
            (sae if name in sae else sae["config"])[name] = value

    return edit


def spoil(name, value):
    def edit(arrays, metadata):
        arrays[f"{HOOKS[0]}.{name}"][0].reshape(-1)[-1] = value

    return edit


def scale(name, value):
    """The scale of the last block."""

    def edit(arrays, metadata):
        rows = arrays[f"{HOOKS[0]}.{name}"][0]
        rows[-1, -18:-16] = np.array([value], "<f2").view(np.uint8)

    return edit


def quantised(shape, kind):
    return gguf.quantize(np.ones(shape, np.float32), kind), kind


ZEROS = np.zeros((32, 32), np.float32)
NO_SAES = "its metadata does not describe packed SAEs"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a, m: a.pop(f"{HOOKS[1]}.W_dec"), "lacks W_dec, which a topk SAE needs"),
        (lambda a, m: a.pop(f"{HOOKS[0]}.b_enc"), "lacks b_enc, which a topk SAE needs"),
        (lambda a, m: a.pop(f"{HOOKS[0]}.W_dec.gain"), "W_dec is Q4_0, expected floats"),
        (put("r_mag", np.zeros(3, np.float32)), "holds r_mag, for which a topk SAE has no use"),
        (put("b_enc.gain", np.zeros(3, np.float32)), "b_enc is F32 [32] with the gain F32 [3]"),
        (lambda a, m: a.update({"x.W_enc": (ZEROS, None)}), "holds 'x.W_enc', which no config"),
        (lambda a, m: a.update({"W_enc": (ZEROS, None)}), "holds 'W_enc', which no config"),
        (put("W_enc", *quantised((31, 32), Quant.Q4_0)), "W_enc has shape [31, 16]"),
        (put("W_enc", *quantised((32, 64), Quant.Q4_0)), "W_enc is Q4_0 [32, 64] with the gain"),
        (put("W_enc", *quantised((32, 32), Quant.Q4_1)), "W_enc is Q4_1 [32, 32] with the gain"),
        (put("W_enc", *quantised((32,), Quant.Q4_0)), "W_enc is Q4_0 [32] with the gain F32 [16]"),
        (put("W_enc", *quantised((2, 32, 32), Quant.Q4_0)), "W_enc is Q4_0 [2, 32, 32] with the"),
        (put("W_enc", ZEROS), "W_enc is F32 [32, 32] with the gain F32 [16], expected floats"),
        (put("W_enc.gain", np.zeros(16, np.float16)), "with the gain F16 [16]"),
        (put("W_enc.gain", np.zeros((4, 4), np.float32)), "with the gain F32 [4, 4]"),
        (put("W_enc.gain", np.zeros(15, np.float32)), "W_enc has shape [32, 15], its config"),
        (put("W_enc.gain", np.zeros(33, np.float32)), "with the gain F32 [33]"),
        (put("b_enc", np.zeros(32, np.int32)), "b_enc is I32, expected floats"),
        (put("b_dec", np.zeros(15, np.float32)), "b_dec has shape [15], its config"),
        (scale("W_dec", np.nan), "W_dec holds NaN or infinite values"),
        (scale("W_dec", -np.inf), "W_dec holds NaN or infinite values"),
        (spoil("W_enc.gain", np.nan), "W_enc holds NaN or infinite values"),
        (spoil("W_enc.gain", 1e30), "W_enc holds NaN or infinite values"),
        (spoil("W_enc.gain", 3e38), "W_enc holds NaN or infinite values"),
        (spoil("b_enc", -np.inf), "b_enc holds NaN or infinite values"),
        (lambda a, m: m.update(version=1), "has layout 1, this qkattr reads layout 2"),
        (lambda a, m: m.pop("version"), NO_SAES),
        (lambda a, m: m.pop("saes"), NO_SAES),
        (lambda a, m: m.update(more=1), NO_SAES),
        (lambda a, m: m["saes"].pop(), f"holds '{HOOKS[1]}.b_enc', which no config"),
        (lambda a, m: m["saes"].append(m["saes"][0]), "two SAEs have one hook"),
        (say(hook_name="blocks.0.hook_mlp_out"), f"holds '{HOOKS[0]}.b_enc', which no config"),
        (say(d_in=17), "W_enc has shape [32, 16], its config (d_in=17, d_sae=32) calls for"),
        (say(d_sae=2**60), NO_SAES),
        (say(d_sae=2**24), "its config (d_in=16, d_sae=16777216) calls for"),
        (say(d_sae=33), "its config (d_in=16, d_sae=33) calls for"),
        (say(d_sae=-1), NO_SAES),
        (say(d_sae=32.5), NO_SAES),
        (say(model_name=3), NO_SAES),
        (say(factor=-1.0), NO_SAES),
        (say(factor=1e40), NO_SAES),
        (say(l0="many"), NO_SAES),
        (say(activation="tanh"), "cannot have activation 'tanh'"),
        (say(activation=["topk"]), NO_SAES),
        (say(activation="relu"), "cannot have activation 'relu', k=5"),
        (say(activation="jumprelu", k=None), "lacks threshold, which a jumprelu SAE needs"),
        (say(k=None), "cannot have activation 'topk', k=None"),
        (say(k=33), "of d_sae=32 cannot have activation 'topk', k=33"),
        (say(k=0), "of d_sae=32 cannot have activation 'topk', k=0"),
        (say(normalize="whiten"), "and normalize 'whiten'"),
        (say(centre=1), NO_SAES),
        (say(a_new_thing=True), NO_SAES),
        (lambda a, m: m["saes"][0].update(bits=4), NO_SAES),
        (lambda a, m: m["saes"][0]["config"].pop("activation"), NO_SAES),
        (lambda a, m: m["saes"][0].pop("l0"), NO_SAES),
    ],
)  # fmt: skip
def test_damaged_files(refused, root, tmp_path, edit, message):
    path = edited(root, tmp_path / "damaged.gguf", edit)
    assert message in refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)


@pytest.mark.parametrize(
    "hook, message",
    [
        ("blocks.2.hook_resid_pre", "are both for boundary 2"),
        ("blocks.0.hook_mlp_out", "was trained at blocks.0.hook_mlp_out"),
        ("blocks.7.hook_resid_post", "is for boundary 8, the model has 2 blocks"),
        ("\x1b[31m\n" * 200, "was trained at"),
        ("", "was trained at"),
    ],
)
def test_hooks_that_are_refused(refused, root, tmp_path, hook, message):
    def edit(arrays, metadata):
        say(hook_name=hook)(arrays, metadata)
        for name in [name for name in arrays if name.startswith(HOOKS[0])]:
            arrays[hook + name.removeprefix(HOOKS[0])] = arrays.pop(name)

    path = edited(root, tmp_path / "damaged.gguf", edit)
    assert message in refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_containers(case, root, tmp_path):
    path, config = tmp_path / "damaged.gguf", qkattr.load(root / "model").config
    path.write_bytes(DAMAGED[case][0])
    message = "not a packed set" if case == "not a GGUF file" else DAMAGED[case][1]
    with pytest.raises(InputError) as e:
        folders.check_saes(path, config)
    assert message in str(e.value) and len(str(e.value)) < 400


def test_an_sae_that_is_missing(refused, root, tmp_path):
    def edit(arrays, metadata):
        metadata["saes"].pop()
        for name in [name for name in arrays if name.startswith(HOOKS[1])]:
            del arrays[name]

    path = edited(root, tmp_path / "damaged.gguf", edit)
    line = refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)
    assert "has no SAE for boundary 2; expected one after every block" in line


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 100_000, "null", '{"version": {}}', '{"version": 1e999}', "\\"]
)
def test_metadata_that_is_no_json(refused, root, tmp_path, text):
    path = save(tmp_path / "damaged.gguf", {}, text)
    refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)


@pytest.mark.parametrize("keep", [4, 7, 100, 3000, 0.5, -64])
def test_truncated_files(refused, root, tmp_path, keep):
    """The writer pads the end, whose bytes nothing needs."""
    path, whole = tmp_path / "damaged.gguf", (root / "packed.gguf").read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else keep])
    line = refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)
    assert "is not a whole GGUF file" in line


def test_files_of_something_else(refused, root, tmp_path):
    sae = next((root / "saes").rglob("*.safetensors"))
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("GGU")
    number = save(tmp_path / "number.gguf", {}, 3, Kind.UINT32)
    others = (tmp_path / "empty.gguf", tmp_path / "text.gguf", number)
    for path in (sae, root / "model" / "model.safetensors", *others):
        line = refused("tokens", "1,2", "--ids", "-m", "model", "-s", path)
        assert "is not a packed set of SAEs; give a file that `qkattr pack` wrote" in line


def test_a_file_of_the_first_layout(refused, tmp_path):
    """It was a safetensors file."""
    old = {"W_enc.codes": np.zeros((2, 2), np.uint8)}
    save_file(old, tmp_path / "old.safetensors", {"qkattr.packed_saes": '{"version":1,"saes":[]}'})
    line = refused("tokens", "1,2", "--ids", "-m", "model", "-s", tmp_path / "old.safetensors")
    assert line.endswith("was written by an older qkattr; pack the SAEs again\n")


def test_another_model(refused, root, tmp_path):
    folders.write_model(tmp_path / "wide", d=20)
    packed = root / "packed.gguf"
    line = refused("tokens", "1,2", "--ids", "-m", tmp_path / "wide", "-s", packed)
    assert "SAE at boundary 1 has d_in=16, the model has d_model=20" in line


@pytest.mark.parametrize("dtype, kind", [("<f4", Quant.F32), ("<f2", Quant.F16)])
def test_matrices_without_gains(root, tmp_path, dtype, kind):
    """Floats, as others may write them; their values are checked."""
    config = qkattr.load(root / "model").config
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(dtype)

    def edit(arrays, metadata, w=w):
        put("W_enc", w, kind)(arrays, metadata)
        del arrays[f"{HOOKS[0]}.W_enc.gain"]

    path = edited(root, tmp_path / "floats.gguf", edit)
    found = load_saes(path, config)[1]
    np.testing.assert_array_equal(found.w_enc_DM.T, w)
    w[3, 4] = np.nan
    edited(root, path, edit)
    folders.check_saes(path, config)
    with pytest.raises(InputError, match="W_enc holds NaN"):
        load_saes(path, config)


def test_the_header_is_checked_without_the_values(root, tmp_path):
    path = edited(root, tmp_path / "damaged.gguf", scale("W_dec", np.nan))
    config = qkattr.load(root / "model").config
    folders.check_saes(path, config)
    with pytest.raises(InputError, match="W_dec holds NaN"):
        load_saes(path, config)
